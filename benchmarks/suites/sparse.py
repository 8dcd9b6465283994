"""A dense student and a teacher of which K classes are known: the K most probable, or a sample."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from kdkernels import Sampled, TopK, kd_loss
from kdkernels.kept import keep

from ..case import Case, Copy, Definition, Yardstick
from ..peers import variants_of
from . import dense


@dataclass
class Kept(dense.Logits):
    teacher: TopK | Sampled  # ids and what is known of them (N, K)


class Order(Yardstick):
    """The part of kdkernels' time that brings the teacher's ids in order, and checks them."""

    title = "kdkernels, the ids' order alone"

    def __init__(self, case, inputs):
        self.given = inputs.teacher, inputs.labels
        self.objective = SimpleNamespace(
            ignore_index=-100, temperature=case.temperature, vocab_size=case.vocab
        )

    def run(self):
        keep(*self.given, self.objective)


@dataclass(frozen=True)
class Sparse(Case):
    k: int = 64
    tail: str = "bucket"  # of TopK; or "sampled"

    suite, variants = "sparse", variants_of("sparse")

    def __post_init__(self):
        if self.k > self.vocab:
            raise ValueError(f"k={self.k}: V is {self.vocab}")
        if self.temperature != 1 and self.tail != "renormalize":
            raise ValueError(f"temperature={self.temperature:g}: tail={self.tail} is for T = 1")
        if self.divergence != "forward_kl" and self.tail == "sampled":
            raise ValueError(f"divergence={self.divergence}: tail=sampled is for the forward KL")
        if self.divergence == "reverse_kl" and self.tail == "renormalize":
            raise ValueError("divergence=reverse_kl is infinite with tail=renormalize")

    @property
    def shape(self):
        return f"{super().shape}, K = {self.k} ({self.tail})"

    @property
    def bytes(self):
        """The student is read and the gradient written, whatever K is."""
        return self.matrix * (1 + self.backward)

    @property
    def yardsticks(self):
        return {"copy": Copy, "order": Order}

    def small(self):
        return replace(self, rows=4, vocab=max(4096, 2 * self.k))

    def draw(self):
        x = dense.draw_logits(self)
        logprobs = x.teacher[: dense.DISTINCT].float().log_softmax(-1)
        g = torch.Generator(self.device).manual_seed(0)
        if self.tail == "sampled":
            drawn = torch.multinomial(logprobs.exp(), self.k, replacement=True, generator=g)
            ids, values = counted(drawn)
        else:
            values, ids = logprobs.topk(self.k)
        shuffled = torch.randperm(ids.shape[1], generator=g, device=self.device)
        source = torch.arange(self.rows, device=self.device) % len(ids)
        ids, values = (part[:, shuffled][source] for part in (ids, values))
        teacher = Sampled(ids, values) if self.tail == "sampled" else TopK(ids, values, self.tail)
        return Kept(x.student, teacher, x.labels)

    def definitions(self, x):
        """An entry's size: the probabilities of student and teacher, the rest's spread over its
        classes as the student has them."""
        n, t, alpha = self.rows, self.temperature, self.alpha
        rows = self.checked() if self.backward else torch.arange(0)
        inside = torch.zeros(n, dtype=torch.bool).index_fill_(0, rows, True)
        total, grads, sizes = 0.0, [], []
        options = self.options(num_items=n, backend="eager")
        for part in self.chunks():
            here = inside[part].to(x.labels.device)
            s, labels = x.student.detach()[part].double(), x.labels[part]
            teacher = part_of(x.teacher, part)
            s.requires_grad_(bool(here.any()))
            loss = kd_loss(s, teacher, labels, **options)
            total += loss.detach()
            if not s.requires_grad:
                continue
            loss.backward()
            with torch.no_grad():
                grads.append(s.grad[here])
                s, labels, teacher = s.detach()[here], labels[here], part_of(teacher, here)
                both = (s / t).softmax(-1)
                if alpha > 0:
                    p, ids = self.probabilities(teacher), teacher.ids.clamp(min=0)  # −1 pads
                    others = both.scatter(-1, ids, 0.0)
                    rest = (1 - p.sum(-1, keepdim=True)).clamp(min=0)
                    spread = others * (rest / others.sum(-1, keepdim=True))
                    both = both + spread.scatter_add(-1, ids, p)
                hard = s.softmax(-1)
                hard.scatter_add_(-1, labels[:, None], torch.ones_like(s[:, :1]))
                sizes.append((alpha * t * both + (1 - alpha) * hard) / n)
        if not grads:
            return [Definition(total)]
        return [Definition(total, [torch.cat(grads)], [torch.cat(sizes)], [rows])]

    def probabilities(self, teacher):
        """(N, K) of the teacher's ids, 0 of those that pad."""
        if self.tail == "sampled":
            return teacher.counts / teacher.counts.sum(-1, keepdim=True)
        p = (teacher.logprobs / self.temperature).exp()
        return p / p.sum(-1, keepdim=True) if self.tail == "renormalize" else p


def counted(drawn):
    """(N, K) drawn ids -> the different ones of each row, padded with −1, and their counts."""
    rows = [torch.unique(row, return_counts=True) for row in drawn]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([ids for ids, _ in rows], batch_first=True, padding_value=-1)
    return ids, pad([counts for _, counts in rows], batch_first=True)


def part_of(teacher, rows):
    """Some rows of a teacher, in float64."""
    if isinstance(teacher, Sampled):
        return Sampled(teacher.ids[rows], teacher.counts[rows].double())
    return TopK(teacher.ids[rows], teacher.logprobs[rows].double(), teacher.tail)


def published(device, threads):
    """What a run without options measures -> (cases, {case: names of variants} where not all)."""
    if device == "cuda":
        return [Sparse(device, "bfloat16", 8192, 151936)], {}
    sizes = (256, 128256), (1024, 32000)
    dtypes = "float32", "bfloat16"
    cases = [Sparse(device, dtype, *size, threads=threads) for size in sizes for dtype in dtypes]
    first = cases[0]
    cases.append(replace(first, tail="renormalize"))
    cases.append(replace(first, tail="sampled", k=50))
    return cases, dense.without_eager(cases, {})
