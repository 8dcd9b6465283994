"""Students of one teacher, whose predictions reach them through caches of equally many bytes.

The preset `text` (kdkernels/distill/presets/text.py): one teacher; students that begin with the
same weights and take the same steps. A budget is bytes for each token of the students' text. What
keeps a part of each prediction keeps as much of it as fits; what keeps all of it is written for as
many blocks of the text as fit. Every student but two reads a cache that was written to disk.
"""

import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kdkernels import Sampled, TopK, cache, kd_loss
from kdkernels.cache import identity
from kdkernels.cache.kinds import SampledKind, most_probable
from kdkernels.distill import validate
from kdkernels.distill.predictions import inference
from kdkernels.distill.presets import text
from kdkernels.source_rows import flat, map_rows

from ..measure import say

SIZED = 50  # blocks whose bytes say how much of a prediction may fit
DRAWS = 50  # among which different classes are counted
COMPARED = 8  # blocks of exact predictions that are compared with what is read of them
AT_A_TIME = 4  # blocks that the teacher predicts
BUCKET, RENORMALIZED, SAMPLED = "top-K, bucket", "top-K, renormalised", "sampled"
HIDDEN, LOGITS = "hidden states", "all logits"
HARD, LIVE, TEACHER = "hard labels", "no cache: the teacher runs", "(the teacher)"
FACTS = "seed alpha budget method kind blocks tokens bytes_per_token kept stored_kl".split()
METHODS = HARD, LIVE, BUCKET, RENORMALIZED, SAMPLED, HIDDEN, LOGITS, TEACHER
SCORES = "perplexity accuracy agreement calibration_error kl".split()


@dataclass(frozen=True)
class Settings:
    """What is run.

    budgets: bytes on disk for a token of the students' text.
    seeds: how many: of a student's initial weights, the blocks it sees, their order, and draws.
    alphas: of the students with soft targets: how much of the loss they are.
    """

    budgets: tuple[int, ...] = (40, 200)
    alphas: tuple[float, ...] = (1.0, text.ALPHA)
    seeds: int = 3
    blocks: int = text.STUDENT_BLOCKS
    steps: int = text.STUDENT_BLOCKS // text.BATCH  # each block once, where all are written
    teacher_steps: int = text.TEACHER_STEPS
    test_every: int = 2  # of the held-out blocks one in so many

    def small(self):
        tiny = dict(blocks=3, steps=2, teacher_steps=2, test_every=100)
        return replace(self, budgets=(40,), alphas=(1.0,), seeds=1, **tiny)


def run(settings):
    """-> {"rows": records, of the teacher and of each student, "facts": what else is to be said}"""
    corpus = text.load(text.load_tokenizer())
    say(f"the teacher, {settings.teacher_steps} steps")
    teacher = text.language_model(text.TEACHER_HIDDEN, 0)
    text.train(teacher, corpus.train, steps=settings.teacher_steps, rate=text.TEACHER_RATE)
    return taught(teacher, corpus, settings)


def taught(teacher, corpus, settings):
    """-> the same, of a teacher that is trained."""
    teacher.requires_grad_(False)
    test = text.Blocks(corpus.test.ids[:: settings.test_every])
    records = [{**line(method=TEACHER), **scores(teacher, teacher, test)}]
    for seed in range(settings.seeds):
        few = text.some_of(corpus.train, settings.blocks, seed)
        say(f"seed {seed}: the teacher's predictions")
        predicted = Predicted(teacher, few, max(settings.budgets), seed)
        for budget, method, source, blocks, found in targets(predicted, sorted(settings.budgets)):
            for alpha in [0.0] if source is None else settings.alphas:
                about = f"α = {alpha:g}, {method}" + (f", {budget} bytes a token" if budget else "")
                say(f"seed {seed}: {about}")
                student = text.language_model(text.STUDENT_HIDDEN, 1 + seed)
                training = dict(steps=settings.steps, rate=text.STUDENT_RATE, seed=seed)
                text.train(student, blocks, source, alpha=alpha, **training)
                known = dict(seed=seed, alpha=alpha, budget=budget, method=method, **found)
                known.update(blocks=len(blocks), tokens=blocks.ids.numel())
                records.append({**line(**known), **scores(student, teacher, test)})
    drawn = predicted.drawn[:SIZED, :, :DRAWS].flatten(0, 1)
    facts = {
        "length": few.ids.shape[1],
        "text_tokens": few.ids.numel(),
        "test_tokens": test.ids[:, 1:].numel(),
        "hidden": predicted.head.weight.shape[1],
        "head_mb": predicted.head.weight.nbytes / 1e6,
        "distinct": statistics.fmean(len(row.unique()) for row in drawn),
    }
    return {"rows": records, "facts": facts}


def line(**known):
    return {**dict.fromkeys(FACTS), **known}


def scores(model, teacher, test):
    """Of a model on held-out text: {a name of SCORES: number}."""
    found = validate(model, test, teacher=teacher, shift=True, batch_size=16)
    divergences = []
    for ids in test.ids.split(AT_A_TIME):
        with inference(model), inference(teacher):
            # What comes after the last token of a block is not in it.
            heads = [map_rows(x(input_ids=ids), lambda x: x[:, :-1]) for x in (model, teacher)]
            divergences.append(kd_loss(*heads, alpha=1.0, reduction="none").double().flatten())
    numbers = {name: getattr(found, name) for name in SCORES[:-1]}
    return {**numbers, "kl": torch.cat(divergences).mean().item()}


# What students learn from


def targets(predicted, budgets):
    """(budget, method, teacher as `Distiller` takes it, blocks to train on, facts) of each student.

    A cache is there until the next is asked for.
    """
    everything = predicted.blocks
    yield None, HARD, None, everything, {}
    yield None, LIVE, predicted.teacher, everything, {}
    for budget in budgets:
        with folder() as path:
            path, k = predicted.write_most(path, "topk", budget)
            for method, tail in ((BUCKET, "bucket"), (RENORMALIZED, "renormalize")):
                stored = cache.open(path, tail=tail)
                found = {**predicted.on_disk(path, stored), **predicted.topk_lost(stored, k)}
                yield budget, method, stored, everything, found
        with folder() as path:
            path, _ = predicted.write_most(path, "sampled", budget)
            stored = cache.open(path)
            # Draws are kept as they are.
            found = {**predicted.on_disk(path, stored), "stored_kl": 0.0}
            yield budget, SAMPLED, stored, everything, found
        yield from whole_predictions(predicted, LOGITS, "dense:fp16", budget)
    for budget in budgets:
        blocks = None
        for each in whole_predictions(predicted, HIDDEN, "hidden:bf16", budget):
            yield each
            blocks = each[3]
        if blocks is not None and len(blocks) == len(everything):
            break  # with more bytes it would be the same


def whole_predictions(predicted, method, kind, budget):
    """One of `targets`, or none where nothing fits: of as many blocks as the budget holds, or of a
    part of one."""
    ids = predicted.blocks.ids
    count, length = ids.shape

    with folder() as path:
        path = Path(path)

        def write(tokens):
            some = ids[: max(1, tokens // length), :tokens]
            return predicted.write(path / f"{tokens}", kind, some), some

        def fits(tokens):
            return size(write(tokens)[0]) <= budget * ids.numel()

        tokens = length * largest(lambda n: fits(n * length), count)
        tokens = tokens or largest(fits, length - 1)
        if tokens < 2:  # the last has no label
            return
        path, some = write(tokens)
        stored, blocks = cache.open(path), text.Blocks(some)
        lost = predicted.exact_lost(stored, some)
        found = {**predicted.on_disk(path, stored), "stored_kl": lost}
        yield budget, method, stored, blocks, found


def largest(fits, most):
    """The largest number in [0, most] that fits: what is smaller than one that fits does too.

    Nothing much larger is tried: it is written to disk.
    """
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high - 1, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def folder():
    return tempfile.TemporaryDirectory(prefix="kdkernels-bench-")


def size(path):
    """Bytes of a cache, but for a teacher's head: it is the same for any amount of text."""
    return sum(x.stat().st_size for x in path.iterdir() if x.name != "head.safetensors")


class Predicted:
    """What the teacher says of blocks (N, L), of which caches are written.

    Args:
        most: bytes a token of the largest budget: more classes than that, or more than twice as
            many draws, are not kept.

    Attributes:
        top: the most probable classes: ids and logprobs, (N, L, most).
        drawn: (N, L, 2 most) int32, one after the other: the first n are n draws.
        hidden: (N, L, H).
    """

    def __init__(self, teacher, blocks, most, seed):
        self.teacher, self.blocks = teacher, blocks
        self.identity = identity.of_teacher(teacher, "text")
        self.limits = {"topk": most, "sampled": 2 * most}
        draws = SampledKind(text.VOCABULARY, 2 * most)
        ids, logprobs, drawn, hidden = found = [], [], [], []
        for number, block in enumerate(blocks.ids):
            with inference(teacher):
                head = map_rows(teacher(input_ids=block[None]), flat)
            logits = head.hidden @ head.weight.T
            top = most_probable(logits, most)
            sampled = draws.draw(logits, seed << 32 | number).ids.int()
            new = top["ids"], top["logprobs"], sampled, head.hidden
            for each, x in zip(found, new, strict=True):
                each.append(x)
        ids, logprobs, self.drawn, self.hidden = map(torch.stack, found)
        self.top = TopK(ids, logprobs)
        self.head = replace(head, hidden=head.hidden[:0])

    def write(self, path, kind, ids):
        """A cache of the first blocks, or of the first tokens of the first -> its path."""
        name, _, option = kind.partition(":")
        head = self.head if name == "hidden" else None
        options = dict(vocab_size=text.VOCABULARY, teacher=self.identity, head=head)
        with cache.Writer(path, kind, **options) as writer:
            for number, block in enumerate(ids):
                writer.add(block, self._prediction(name, option, number, len(block)))
        return path

    def write_most(self, path, name, budget):
        """A cache of all blocks with as many entries a row as the budget holds -> (its path, how
        many)."""
        ids = self.blocks.ids

        def written(number, some):
            return self.write(Path(path, f"{number}-{len(some)}"), f"{name}:{number}", some)

        def fits(number, some):
            return size(written(number, some)) <= budget * some.numel()

        number = largest(lambda n: fits(n, ids[:SIZED]), self.limits[name])
        while not fits(number, ids):
            number -= 1
        return written(number, ids), number

    def on_disk(self, path, stored):
        """Facts of a cache; bytes for a token of all of the blocks, whichever are in it."""
        return dict(kind=stored.kind.spec, bytes_per_token=size(path) / self.blocks.ids.numel())

    def topk_lost(self, stored, k):
        """Means over all tokens -> {"kept": the probability of the K classes, "stored_kl": nats
        from what the students are to learn, as computed, to what is read}."""
        kept, lost = [], []
        for number, ids in enumerate(self.blocks.ids):
            computed = self._prediction("topk", k, number, len(ids))
            read = stored[ids]
            p, q = (by_id(x) for x in (computed, read))
            kept.append(p.sum(-1))
            p, q = (whole(x, read.tail) for x in (p, q))
            lost.append(torch.where(p > 0, p * (p.log() - q.log()), 0).sum(-1))
        kept, lost = (torch.cat(x).mean().item() for x in (kept, lost))
        return {"kept": kept, "stored_kl": lost}

    def exact_lost(self, stored, ids):
        """The same of all of a prediction, for the first blocks of a cache."""
        ids = ids[:COMPARED]
        computed = replace(self.head, hidden=self.hidden[: len(ids), : ids.shape[1]])
        return kd_loss(stored[ids], computed, alpha=1.0).item()

    def _prediction(self, name, option, number, length):
        """Of the first tokens of a block."""
        if name == "topk":
            return map_rows(self.top, lambda x: x[number, :length, : int(option)])
        if name == "sampled":
            ids = self.drawn[number, :length, : int(option)]
            return Sampled(ids, torch.ones_like(ids))
        hidden = self.hidden[number, :length]
        return replace(self.head, hidden=hidden)


def by_id(prediction):
    """A `TopK` of rows (n, K) -> probabilities (n, K) float64, ordered by id."""
    return prediction.logprobs.double().exp().gather(-1, prediction.ids.long().argsort(-1))


def whole(p, tail):
    """Probabilities (n, K) of classes -> of all there is: (n, K + 1) or (n, K)"""
    total = p.sum(-1, keepdim=True)
    return p / total if tail == "renormalize" else torch.cat([p, (1 - total).clamp(min=0)], -1)
