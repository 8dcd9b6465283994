"""How fast is `kd_loss` where predictions come as hidden states or as top-k, and how lean?

Heads: student and teacher both as `LinearHead`, forward and backward to the student's hidden states
and weight, the teacher frozen, against four others: the formula on whole logits, TRL's chunked
divergence, and Liger's fused linear JSD, as it is and compiled. They have one formula in common,
which is what is compared: the generalised JSD at T = 1 without labels, β = 0.5; at β = 0 all of
them take it as the forward KL. The gradient takes four matrix products, the student's logits, the
teacher's, dX and dW: how long those take alone is the yardstick.

Top-k: a dense student against `TopK` with K = 64 and a tail bucket, and cross-entropy, forward and
backward, against log_softmax and gather in PyTorch. `README.md` says how to read it.
"""

import argparse
import functools
import importlib.metadata
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import dense_cuda
import harness
import torch
import torch.nn.functional as F
from dense import DTYPES, number, on
from harness import Missing, Problem, Step

from kdkernels import LinearHead, TopK, kd_loss
from kdkernels.backends import registry
from kdkernels.kept import keep

SHAPES, TOPK_SHAPES = ("1024x512x32000", "2048x1024x65536"), ("1024x32000", "256x128256")
QUICK_SHAPES, QUICK_TOPK_SHAPES = ("48x16x1000",), ("8x1000",)
THREADS, ROUNDS, QUICK_THREADS, QUICK_ROUNDS = 2, 5, 1, 3
TOPK_ROUNDS = 5  # as many rounds of what takes milliseconds, for each of what takes seconds
PATIENCE = 120
K, ALPHA = 64, 0.5  # of the top-k
BETAS = {"jsd": 0.5, "forward_kl": 0.0}
PARTS = ("heads", "topk", "memory")
CHECKED_AT_ONCE = 2**23  # logits that the definition has at a time

# The largest errors (loss, gradient) of what is timed, by the dtype and by what is computed in it.
# An entry of a gradient is taken relative to what it would be with the mean probability of student
# and teacher in place of a difference, with absolute weights, and with hidden states of 1.
TOLERANCES = {
    ("heads", "float32", "float32"): (1e-5, 1e-4),
    ("heads", "bfloat16", "float32"): (1e-5, 2.0**-6),
    ("heads", "bfloat16", "logits"): (2e-3, 2.0**-4),
    ("heads", "bfloat16", "all"): (0.1, 2.0**-3),
    ("topk", "float32", "float32"): (1e-5, 1e-4),
    ("topk", "bfloat16", "float32"): (1e-5, 1e-4 + 2.0**-8),
    ("topk", "bfloat16", "twice"): (1e-5, 1e-4 + 2.0**-7),  # two gradients, and their sum
}


# What is computed


@dataclass
class HeadProblem:
    hidden: torch.Tensor  # (N, H), a leaf that requires grad, as is
    weight: torch.Tensor  # (V, H)
    teacher_hidden: torch.Tensor  # (N, H)
    teacher_weight: torch.Tensor  # (V, H)


def make_heads(rows, width, vocab, dtype, device="cpu"):
    """Hidden states and weights whose logits are shaped like a language model's.

    A first coordinate that is 1 carries the Zipfian bulk, the others what differs between tokens.
    They are drawn on the device: a weight has up to half a billion numbers.
    """
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device=device)

    teacher_hidden, teacher_weight = normal(rows, width), normal(vocab, width) * 2 / width**0.5
    ranks = torch.randperm(vocab, generator=g, device=device) + 1.0
    teacher_weight[:, 0] = -ranks.log()
    hidden = 0.9 * teacher_hidden + 0.4 * normal(rows, width)
    weight = teacher_weight + normal(vocab, width) * 0.5 / width**0.5
    hidden[:, 0] = teacher_hidden[:, 0] = 1
    hidden, weight, *teacher = (
        x.to(dtype) for x in (hidden, weight, teacher_hidden, teacher_weight)
    )
    return HeadProblem(hidden.requires_grad_(), weight.requires_grad_(), *teacher)


class HeadStep:
    """One call of a loss with its backward pass, as `harness.Step` for dense logits."""

    def __init__(self, loss, problem):
        self.loss, self.problem, self.value = loss, problem, None

    def prepare(self):
        self.value = self.problem.hidden.grad = self.problem.weight.grad = None

    def run(self):
        self.prepare()
        self.value = self.loss(self.problem)
        self.value.backward()

    def gradients(self):
        return [self.problem.hidden.grad, self.problem.weight.grad]


class TopkStep(Step):
    def gradients(self):
        return [self.gradient()]


class Products:
    """The yardstick of heads: the four products, of whole matrices, into memory that is there."""

    title = "the four matrix products alone"

    def __init__(self, problem):
        self.problem = problem
        n, v = len(problem.hidden), len(problem.weight)
        self.logits, self.teacher = (problem.hidden.new_empty((n, v)) for _ in range(2))
        self.grads = [torch.empty_like(x) for x in (problem.hidden, problem.weight)]

    def prepare(self):
        pass

    @torch.no_grad()
    def run(self):
        x, grads = self.problem, self.grads
        torch.mm(x.hidden, x.weight.T, out=self.logits)
        torch.mm(x.teacher_hidden, x.teacher_weight.T, out=self.teacher)
        torch.mm(self.logits, x.weight, out=grads[0])
        torch.mm(self.logits.T, x.hidden, out=grads[1])


class Order:
    """The part of kdkernels' time that brings the teacher's ids in order, and checks them."""

    title = "kdkernels, the ids' order alone"

    def __init__(self, problem):
        self.inputs = problem.teacher, problem.labels
        vocab = problem.student.shape[1]
        self.objective = SimpleNamespace(ignore_index=-100, temperature=1.0, vocab_size=vocab)

    def prepare(self):
        pass

    def run(self):
        keep(*self.inputs, self.objective)


# Who computes it


@dataclass(frozen=True)
class Variant:
    title: str
    make: Callable  # (divergence) -> loss; raises Missing
    ours: bool = False  # if it is wrong, so is the exit status
    accuracy: str = "float32"  # of TOLERANCES, for bfloat16
    compiled: bool = False  # the first call on a shape is not like the later ones


def native():
    try:
        registry.resolve("cpu", torch.float32, "native")
    except RuntimeError as error:
        raise Missing(str(error)) from error


def kdkernels_heads(divergence):
    native()

    def loss(x):
        student = LinearHead(x.hidden, x.weight)
        teacher = LinearHead(x.teacher_hidden, x.teacher_weight)
        return kd_loss(student, teacher, divergence=divergence, backend="native")

    return loss


def naive_heads(divergence):
    """The loss as people write it: logits in the dtype of the model, the rest in float32."""
    formula = dense_cuda.formula(dense_cuda.Case("", divergence, temperature=1.0, alpha=1.0))

    def loss(x):
        with torch.no_grad():
            teacher = F.linear(x.teacher_hidden, x.teacher_weight).float()
        return formula(F.linear(x.hidden, x.weight).float(), teacher, None)

    return loss


def trl_heads(divergence):
    """What TRL's distillation trainer calls, whose mean over tokens it takes itself.

    On a CPU it projects in float32, whatever the dtype. It returns the student's entropy as well.
    """
    (function,) = dense_cuda.imported("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")

    def loss(x):
        heads = x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None
        return function.apply(*heads, BETAS[divergence])[0].mean()

    return loss


def liger_heads(divergence, compiled):
    """Liger's chunked loss in PyTorch; its Triton kernels don't run on a CPU.

    The labels it asks for only mask rows where the cross-entropy weighs nothing.
    """
    (loss_class,) = dense_cuda.imported("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    options = dict(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[divergence])
    liger = loss_class(**options, compiled=compiled)

    def loss(x):
        labels = torch.zeros(len(x.hidden), dtype=torch.int64)
        return liger(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, labels)

    if compiled:
        torch.compiler.reset()  # each shape for itself
    return loss


def kdkernels_topk(_):
    native()
    return functools.partial(kd_loss, alpha=ALPHA, backend="native")


def gathered(student, teacher, labels, hard):
    """Forward KL over the kept classes and the rest, and a cross-entropy: as people write it."""
    log_q = F.log_softmax(student.float(), -1)
    kept = log_q.gather(-1, teacher.ids)
    log_p = torch.cat([teacher.logprobs, log_rest(teacher.logprobs)], -1)
    log_q_kept = torch.cat([kept, log_rest(kept)], -1)
    distill = F.kl_div(log_q_kept, log_p, reduction="batchmean", log_target=True)
    return ALPHA * distill + (1 - ALPHA) * hard(log_q, labels)


def log_rest(log_p):
    """log(1 − Σ exp log_p) (N, 1), without cancellation: log1mexp of the log of the sum."""
    total = log_p.logsumexp(-1, keepdim=True)
    near_one = total > -math.log(2)
    # Each branch sees only what it is for, so that the other's gradient is no NaN.
    near = torch.log(-torch.expm1(torch.where(near_one, total, -1.0)))
    return torch.where(near_one, near, torch.log1p(-torch.exp(torch.where(near_one, -1.0, total))))


def naive_topk(_):
    def loss(student, teacher, labels):
        return gathered(
            student, teacher, labels, lambda *_: F.cross_entropy(student.float(), labels)
        )

    return loss


def shared_topk(_):
    return lambda *inputs: gathered(*inputs, F.nll_loss)


HEADS = {
    "native": Variant("kdkernels", kdkernels_heads, ours=True, accuracy="logits"),
    "naive": Variant("PyTorch, whole logits", naive_heads, accuracy="logits"),
    "trl": Variant("TRL, chunked divergence", trl_heads),
    "liger": Variant(
        "Liger, fused linear JSD",
        functools.partial(liger_heads, compiled=False),
        accuracy="all",
    ),
    "liger-compiled": Variant(
        "Liger, fused linear JSD, torch.compile",
        functools.partial(liger_heads, compiled=True),
        accuracy="all",
        compiled=True,
    ),
}
TOPK = {
    "native": Variant("kdkernels", kdkernels_topk, ours=True),
    "naive": Variant(
        "PyTorch, log_softmax and gather, cross_entropy", naive_topk, accuracy="twice"
    ),
    "shared": Variant("PyTorch, one log_softmax for both", shared_topk),
}
NAMES = list(dict.fromkeys([*HEADS, *TOPK]))
QUICK_NAMES = [name for name in NAMES if name != "liger-compiled"]


# One problem


@dataclass(frozen=True)
class Heads:
    shape: tuple[int, int, int]  # N, H, V
    dtype: str
    divergence: str

    part, variants, step, yardsticks = "heads", HEADS, HeadStep, {"products": Products}

    @property
    def title(self):
        n, h, v = self.shape
        return f"Heads, {self.divergence}, N = {n:,}, H = {h:,}, V = {v:,}, {self.dtype}"

    def small(self):
        """Of the same kind, in no time and next to no memory."""
        return replace(self, shape=(4, 64, 4096))

    def problem(self):
        return make_heads(*self.shape, DTYPES[self.dtype])

    def definition(self, x):
        """loss, gradients, and the sizes that their errors are relative to, in float64."""
        n, _, v = self.shape
        hidden, weight, *teacher = (
            x.detach().double() for x in (x.hidden, x.weight, x.teacher_hidden, x.teacher_weight)
        )
        total, leaves = 0.0, [hidden.requires_grad_(), weight.requires_grad_()]
        sizes = [torch.zeros_like(x, requires_grad=False) for x in (hidden, weight[:, :1])]
        options = dict(divergence=self.divergence, num_items=n, backend="eager")
        chunk = max(CHECKED_AT_ONCE // v, 1)
        for start in range(0, n, chunk):
            here = slice(start, start + chunk)
            logits = hidden[here] @ weight.T, teacher[0][here] @ teacher[1].T
            loss = kd_loss(*logits, **options)
            loss.backward()
            total += loss.detach()
            with torch.no_grad():
                p = sum(x.softmax(-1) for x in logits) / (2 * n)
                sizes[0][here] = p @ weight.abs()
                sizes[1] += p.sum(0)[:, None]
        return total, [x.grad for x in leaves], sizes


@dataclass(frozen=True)
class Topk:
    shape: tuple[int, int]  # N, V
    dtype: str
    divergence: str = "forward_kl"

    part, variants, step, yardsticks = "topk", TOPK, TopkStep, {"order": Order}

    @property
    def title(self):
        n, v = self.shape
        return f"Top-k, K = {K}, N = {n:,}, V = {v:,}, {self.dtype}"

    def small(self):
        return replace(self, shape=(4, 4096))

    def problem(self):
        x = harness.make_problem(*self.shape, DTYPES[self.dtype])
        logprobs, ids = x.teacher.float().log_softmax(-1).topk(K)
        shuffled = torch.randperm(K, generator=torch.Generator().manual_seed(0))
        return Problem(x.student, TopK(ids[:, shuffled], logprobs[:, shuffled]), x.labels)

    def definition(self, x):
        n, v = self.shape
        total, grads, sizes, chunk = 0.0, [], [], max(CHECKED_AT_ONCE // v, 1)
        for start in range(0, n, chunk):
            here = slice(start, start + chunk)
            s, labels = x.student.detach()[here].double().requires_grad_(), x.labels[here]
            teacher = TopK(x.teacher.ids[here], x.teacher.logprobs[here].double())
            loss = kd_loss(s, teacher, labels, alpha=ALPHA, num_items=n, backend="eager")
            loss.backward()
            total += loss.detach()
            grads.append(s.grad)
            with torch.no_grad():
                q, p = s.softmax(-1), teacher.logprobs.exp()
                others = q.scatter(-1, teacher.ids, 0.0)
                rest = (1 - p.sum(-1, keepdim=True)).clamp(min=0)
                both = q + (others * rest / others.sum(-1, keepdim=True)).scatter(
                    -1, teacher.ids, p
                )
                hard = q.scatter_add(-1, labels[:, None], torch.ones_like(q[:, :1]))
                sizes.append((ALPHA * both + (1 - ALPHA) * hard) / n)
        return total, [torch.cat(grads)], [torch.cat(sizes)]


def cases(settings):
    """All problems of a run."""
    found = []
    if "heads" in settings.parts:
        shapes = map(shape_of, settings.shapes)
        found += [
            Heads(shape, dtype, divergence)
            for shape in shapes
            for dtype in settings.dtypes
            for divergence in settings.divergences
        ]
    if "topk" in settings.parts:
        shapes = map(shape_of, settings.topk_shapes)
        found += [Topk(shape, dtype) for shape in shapes for dtype in settings.dtypes]
    return found


def shape_of(text):
    return tuple(int(size) for size in text.split("x"))


# What is measured


def record(case, variant, **measured):
    """One line of the result files; every line has the same fields."""
    fields = dict.fromkeys(
        "status loss_error gradient_error calls ms ms_min ms_max times_native times_native_min "
        "times_native_max times_products times_products_min times_products_max peak_mb "
        "peak_percent gradient_mb".split()
    )
    first = dict(part=case.part, dtype=case.dtype, divergence=case.divergence, variant=variant)
    first.update(rows=case.shape[0], hidden=None, vocab=case.shape[-1])
    if case.part == "heads":
        first["hidden"] = case.shape[1]
    first["threads"] = torch.get_num_threads()
    return {**first, **fields, **measured}


def errors(step, definition):
    """(relative error of the loss, largest error of a gradient entry)."""
    loss, grads, sizes = definition
    worst = torch.zeros((), dtype=torch.float64)
    for found, grad, size in zip(step.gradients(), grads, sizes, strict=True):
        error = ((found.double() - grad).abs_() / torch.maximum(size, grad.abs())).max()
        worst = torch.maximum(worst, error)  # NaN where one is
    value = step.value.detach().double()
    return float((value - loss).abs() / loss.abs()), float(worst)


def measure(case, settings):
    """One problem: every variant is checked, then timed in turns -> records.

    What takes longer than `settings.patience` in its first call is not called again: that was its
    time. (Of what is compiled there, it is the second call.)
    """
    harness.say(f"{case.title}: compiling and checking")
    problem = case.problem()
    definition = case.definition(problem)
    lines, steps, seconds = {}, {}, {}
    for name in settings.variants:
        if name not in case.variants:
            continue
        variant, line = case.variants[name], record(case, name)
        lines[name] = line
        try:
            step = case.step(variant.make(case.divergence), problem)
            took = seconds_of(step)
            found = errors(step, definition)
            if variant.compiled and took > settings.patience:
                took = seconds_of(step)
        except Missing as why:
            line["status"] = f"missing: {why}"
            continue
        except Exception as error:  # another library's, or its compiler's
            if variant.ours:
                raise
            text = str(error).strip().partition("\n")[0]
            line["status"] = f"failed: {type(error).__name__}: {text}"
            continue
        accuracy = variant.accuracy if case.dtype == "bfloat16" else "float32"
        allowed = TOLERANCES[case.part, case.dtype, accuracy]
        line["status"] = harness.verdict(found, allowed)
        line["loss_error"], line["gradient_error"] = found
        if line["status"] == "ok":
            steps[name], seconds[name] = step, [took]
        step.prepare()
    del definition
    for name, yardstick in case.yardsticks.items():
        steps[name], lines[name] = yardstick(problem), record(case, name, status="ok")
        seconds[name] = [seconds_of(steps[name])]

    rounds = settings.rounds * (TOPK_ROUNDS if case.part == "topk" else 1)
    harness.say(f"{case.title}: {rounds} rounds")
    again = {name: step for name, step in steps.items() if seconds[name][0] <= settings.patience}
    seconds.update(harness.interleave(again, rounds))
    for name in steps:
        lines[name].update(speed(name, seconds))
    steps.clear()
    again.clear()
    for name in lines:
        if "memory" in settings.parts and name in case.variants and name in seconds:
            lines[name].update(memory(case, name, settings))
    return list(lines.values())


def seconds_of(step):
    step.prepare()
    start = time.perf_counter()
    step.run()
    return time.perf_counter() - start


def speed(name, seconds):
    """Milliseconds, and ratios within each round; to the median, of what had but one call."""
    own = seconds[name]
    fields = {"calls": len(own), **harness.spread("ms", [1e3 * s for s in own])}
    for other in "native", "products":
        if base := seconds.get(other):
            if len(base) != len(own):
                base = [statistics.median(base)] * len(own)
            ratios = [a / b for a, b in zip(own, base, strict=True)]
            fields.update(harness.spread(f"times_{other}", ratios))
    return fields


def memory(case, name, settings):
    harness.say(f"{case.title}: memory of {case.variants[name].title}")
    matrix = 4 * case.shape[0] * case.shape[-1]
    return harness.memory(matrix, peak_of, case, name, settings.threads)


def peak_of(case, name, threads):
    """(bytes at the peak above the inputs, those that are the gradients'), of one variant."""
    torch.set_num_threads(threads)
    variant = case.variants[name]
    loss, problem = variant.make(case.divergence), case.problem()
    # Libraries load what they need in the first call; what is compiled has to see its shape.
    warm_up = case.step(loss, problem if variant.compiled else case.small().problem())
    warm_up.prepare()
    warm_up.run()
    warm_up.prepare()

    step = case.step(loss, problem)
    above = harness.peak_above(step)
    return above, sum(x.nbytes for x in step.gradients())


# What is wanted

PROBLEM = ("part", "divergence", "dtype", "rows", "hidden", "vocab")


def judge(records):
    """What was promised of every problem, with what was measured, as dicts."""
    groups = {}
    for line in records:
        if line["status"] == "ok":
            groups.setdefault(problem_of(line), {})[line["variant"]] = line
    judged = []
    for problem, lines in groups.items():
        ours = lines.pop("native", None)
        if ours is None:
            continue
        promised = promised_of_topk if problem[0] == "topk" else promised_of_heads
        for what, sign, limit, measured, by in promised(ours, lines):
            met = measured >= limit if sign == "≥" else measured <= limit
            target = dict(what=what, sign=sign, limit=limit, measured=measured, by=by)
            target["verdict"] = "met" if met else "not met"
            judged.append({**dict(zip(PROBLEM, problem, strict=True)), **target})
    return judged


def promised_of_heads(ours, others):
    """(what, sign, limit, what was measured, by which other) of each target."""
    peers = {name: line for name, line in others.items() if name in HEADS}
    if peers:
        name, fastest = min(peers.items(), key=lambda item: item[1]["times_native"])
        yield "time of the fastest other ÷ kdkernels'", "≥", 1.0, fastest["times_native"], name
    if ours["times_products"] is not None:
        yield "time ÷ the four products'", "≤", 1.35, ours["times_products"], ""
    peers = {name: line["peak_mb"] for name, line in peers.items() if line["peak_mb"] is not None}
    if peers and ours["peak_mb"] is not None:
        name = min(peers, key=peers.get)
        ratio = peers[name] / ours["peak_mb"]
        yield "extra memory of the leanest other ÷ kdkernels'", "≥", 1.0, ratio, name


def promised_of_topk(ours, others):
    if "naive" in others:
        yield "PyTorch's time ÷ kdkernels'", "≥", 10.0, others["naive"]["times_native"], "naive"


def problem_of(line):
    return tuple(line[key] for key in PROBLEM)


def case_of(line):
    if line["part"] == "topk":
        return Topk((line["rows"], line["vocab"]), line["dtype"])
    return Heads((line["rows"], line["hidden"], line["vocab"]), line["dtype"], line["divergence"])


# What is shown


HEADER = ["", "calls", "ms", "min", "max", "× kdkernels", "min", "max", "× products", "min", "max"]
HEADER += ["extra MB", "% of matrix", "gradient MB", "loss error", "gradient error"]


def title(case, name):
    return (case.variants.get(name) or case.yardsticks[name]).title


def cells(case, line):
    """A record under HEADER."""
    row = [title(case, line["variant"]), str(line["calls"])]
    row += [number(line[key]) for key in ("ms", "ms_min", "ms_max")]
    for ratio in ("times_native", "times_products"):
        row += [number(line[f"{ratio}{which}"]) for which in ("", "_min", "_max")]
    row += [number(line[key], 1) for key in ("peak_mb", "peak_percent", "gradient_mb")]
    for key in ("loss_error", "gradient_error"):
        row.append("" if line[key] is None else f"{line[key]:.1e}")
    return row


def tables(records, case_of=case_of, cells=cells):
    """(heading, rows of cells, what was not timed and why) of every problem."""
    groups = {}
    for line in records:
        groups.setdefault(problem_of(line), []).append(line)
    for lines in groups.values():
        case = case_of(lines[0])
        timed = [cells(case, line) for line in lines if line["status"] == "ok"]
        others = [
            f"{title(case, line['variant'])}: {line['status']}"
            for line in lines
            if line["status"] != "ok"
        ]
        yield case.title, timed, others


TARGET_HEADER = ["target", "", "limit", "measured", "", ""]


def target_rows(judged):
    """The targets under TARGET_HEADER."""
    rows = []
    for target in judged:
        case = case_of(target)
        by = target["by"] and title(case, target["by"])
        limit = f"{target['sign']} {number(target['limit'], 2)}"
        numbers = limit, number(target["measured"], 2)
        rows.append([case.title, target["what"], *numbers, target["verdict"], by])
    return rows


def report(records, judged):
    """Everything, for a terminal."""
    blocks = [
        "\n".join([heading, harness.text_table(HEADER, timed), *others])
        for heading, timed, others in tables(records)
    ]
    return "\n\n".join([*blocks, harness.text_table(TARGET_HEADER, target_rows(judged))])


def markdown(records, judged, settings, machine):
    """The same for a page, with what has to be known to read it."""
    peers = ", ".join(f"{name} {machine[name]}" for name in PEERS)
    blocks = [
        f"{on(settings.threads)} of {machine['cpu']} ({machine['instruction set']}), torch "
        f"{machine['torch']}, {peers}, kdkernels {machine['kdkernels']} ({machine['commit']}), "
        f"{machine['date']}. Forward and backward; medians and extremes of {settings.rounds} "
        f"rounds in turns, of top-k {settings.rounds * TOPK_ROUNDS}; ratios are taken within each "
        "round. Extra MB is the peak beyond inputs and gradients, also in % of one float32 logit "
        "matrix.",
        harness.markdown_table(TARGET_HEADER, target_rows(judged)),
    ]
    for heading, timed, others in tables(records):
        used = [i for i in range(len(HEADER)) if i == 0 or any(row[i] for row in timed)]
        table = [[row[i] for i in used] for row in timed]
        blocks += [f"### {heading}", harness.markdown_table([HEADER[i] for i in used], table)]
        blocks += [f"- {other}" for other in others]
    return "\n\n".join(blocks)


# The command

PEERS = ("trl", "liger-kernel")


def versions():
    """Of the peers, by the names of their packages."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not there"
    return found


def kinds(settings):
    """Of problems, where it is not all of them: a run of its own has files of its own."""
    found = [part for part in settings.parts if part != "memory"]
    return found if len(found) == 1 else []


def parse(argv):
    parser = argparse.ArgumentParser(
        description="kd_loss on hidden states and on top-k teachers: correctness, time and memory.",
        epilog="Without options the run is the published one, and goes to benchmarks/results; "
        "what another run measures is written only where --out says. The exit status is 1 if "
        "kdkernels is wrong.",
    )
    parser.add_argument("--shapes", nargs="+", metavar="NxHxV", help=f"{SHAPES} by default")
    parser.add_argument("--topk-shapes", nargs="+", metavar="NxV", help=f"{TOPK_SHAPES} by default")
    parser.add_argument("--threads", type=int, help=f"{THREADS} by default")
    parser.add_argument(
        "--rounds", type=int, help=f"{ROUNDS} by default; of top-k {TOPK_ROUNDS} times as many"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE,
        metavar="SECONDS",
        help=f"what takes longer is called only once; {PATIENCE} by default",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--divergences", nargs="+", choices=BETAS, default=["jsd"])
    parser.add_argument("--variants", nargs="+", choices=NAMES, help="all by default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="all by default")
    parser.add_argument("--out", metavar="DIR", help="write CSV, JSON and Markdown to this folder")
    parser.add_argument(
        "--quick", action="store_true", help="seconds: tiny problems, no compiler, no memory"
    )
    args = parser.parse_args(argv)
    quick = args.quick
    args.shapes = args.shapes or list(QUICK_SHAPES if quick else SHAPES)
    args.topk_shapes = args.topk_shapes or list(QUICK_TOPK_SHAPES if quick else TOPK_SHAPES)
    args.threads = args.threads or (QUICK_THREADS if quick else THREADS)
    args.rounds = args.rounds or (QUICK_ROUNDS if quick else ROUNDS)
    args.variants = args.variants or (QUICK_NAMES if quick else NAMES)
    args.parts = args.parts or [part for part in PARTS if not (quick and part == "memory")]
    published = dict(
        shapes=SHAPES, topk_shapes=TOPK_SHAPES, dtypes=DTYPES, divergences=["jsd"], variants=NAMES
    )
    published = {name: list(values) for name, values in published.items()}
    published.update(parts=list(PARTS), threads=THREADS, patience=PATIENCE)
    as_published = all(getattr(args, name) == value for name, value in published.items())
    if args.out is None and as_published and args.rounds >= ROUNDS:
        args.out = harness.RESULTS
    return args


def main(argv=None):
    settings = parse(argv)
    torch.set_num_threads(settings.threads)
    machine = {**harness.machine(), **versions()}
    records = []
    for case in cases(settings):
        records += measure(case, settings)
    judged = judge(records)
    harness.say("done")
    print(", ".join(f"{name}: {value}" for name, value in machine.items()))
    print(f"\n{report(records, judged)}")

    if settings.out is not None:
        chosen = {name: value for name, value in vars(settings).items() if name != "out"}
        document = {
            "question": "sources",
            "machine": machine,
            "settings": {**chosen, "k": K, "alpha": ALPHA},
            "targets": judged,
            "rows": records,
        }
        name = "-".join(["sources", *kinds(settings), harness.slug(machine["cpu"])])
        page = markdown(records, judged, settings, machine)
        harness.write(settings.out, name, document, page)
        print(f"\nwritten: {name}.csv, .json and .md")
    ours = [line for line in records if line["variant"] == "native"]
    return int(any(line["status"].startswith("wrong") for line in ours))


if __name__ == "__main__":
    sys.exit(main())
