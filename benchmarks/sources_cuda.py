"""How fast and how lean is `kd_loss` on a GPU where predictions come as hidden states or top-k?

The two questions of `sources.py`, in bfloat16 and at the size of training. Heads: both sides as
`LinearHead`, to the gradients of the student's hidden states and weight, against the four matrix
products alone, the formula on whole logits, TRL's chunked divergence and Liger's fused linear JSD.
Top-k: a dense student against 64 classes with a tail bucket, and cross-entropy, against a copy of
as many bytes, log_softmax and gather in PyTorch. `README.md` says how to read it.
"""

import argparse
import functools
import math
import statistics
import sys
from dataclasses import asdict, dataclass

import dense_cuda
import harness
import sources
import torch
from dense import number
from dense_cuda import Variant, checked_rows, imported, kdkernels_loss, percent, take_turns, turn
from harness import Missing, Problem
from sources import BETAS, K, problem_of, shape_of

from kdkernels import LinearHead, TopK, kd_loss

DTYPE = "bfloat16"
SHAPES, TOPK_SHAPES, ROUNDS = ("8192x4096x128256",), ("8192x151936",), 5
QUICK_SHAPES, QUICK_TOPK_SHAPES, QUICK_ROUNDS = ("512x256x8192",), ("512x32000",), 3
PATIENCE = 0.5
PARTS = ("heads", "topk")
CHECKED_AT_ONCE = 2**25  # logits that the definition has at a time

# The largest errors (loss, gradient) of what is timed. What is relative to what: `sources.py`.
# Where a gradient is a small sum of large terms, logits rounded to bfloat16 put it off by up to
# half, PyTorch's too: a variant has to be right for the logits as they are or for rounded ones.
TOLERANCES = {
    ("heads", "float32"): (2e-4, 2.0**-3),  # and a gradient of logits in bfloat16
    ("heads", "bfloat16"): (0.05, 0.5),
    **{("topk", name): dense_cuda.TOLERANCES[name] for name in ("exact", "float32")},
}
ROUNDINGS = {"": lambda logits: logits, "rounded_": lambda logits: logits.bfloat16().double()}


# What is computed


class Copy(dense_cuda.Copy):
    """The yardstick of top-k, where the student's logits are read and their gradient is written."""

    title = "copy of as many bytes"

    def __init__(self, problem):
        super().__init__(problem, dense_cuda.CASES["kl-ce-loss"])  # of two matrices too


# Who computes it: (case, device) -> loss; raises Missing


def kdkernels_heads(case, device, backend):
    loss = kdkernels_loss(case, device, backend)

    def of_heads(x):
        student = LinearHead(x.hidden, x.weight)
        return loss(student, LinearHead(x.teacher_hidden, x.teacher_weight))

    return of_heads


def liger_heads(case, device):
    """The one with Triton kernels. As it is, it adds up the weight's gradient in bfloat16."""
    (loss_class,) = imported("liger_kernel.transformers", "LigerFusedLinearJSD")
    liger = loss_class(jsd_beta=BETAS[case.divergence])
    return lambda x: liger(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, None)


BACKENDS = {"native": "kdkernels", "triton": "kdkernels, backend='triton'"}
HEADS = {
    **{
        name: Variant(
            title,
            functools.partial(kdkernels_heads, backend=name),
            ours=True,
            accuracy="float32",
        )
        for name, title in BACKENDS.items()
    },
    "naive": Variant(
        "PyTorch, whole logits",
        lambda case, device: sources.naive_heads(case.divergence),
        accuracy="float32",
    ),
    "trl": Variant(
        "TRL, chunked divergence",
        lambda case, device: sources.trl_heads(case.divergence),
        accuracy="float32",
    ),
    "liger": Variant("Liger, fused linear JSD", liger_heads, accuracy="bfloat16"),
}
TOPK = {
    **{
        name: Variant(
            title, functools.partial(kdkernels_loss, backend=name), ours=True, accuracy="exact"
        )
        for name, title in BACKENDS.items()
    },
    "naive": Variant(
        "PyTorch, log_softmax and gather, cross_entropy",
        lambda case, device: sources.naive_topk(case.divergence),
        accuracy="float32",
    ),
    "shared": Variant(
        "PyTorch, one log_softmax for both",
        lambda case, device: sources.shared_topk(case.divergence),
        accuracy="float32",
    ),
}
NAMES = list(dict.fromkeys([*HEADS, *TOPK]))


# One problem. A definition of it is (loss, gradients, the sizes that their errors are relative to)
# in float64: the loss of all rows, the gradients where they are checked. There is one for each of
# ROUNDINGS, if it has to do with logits that are no input.


@dataclass(frozen=True)
class Heads(sources.Heads):
    dtype: str = DTYPE
    divergence: str = "jsd"

    temperature, alpha = 1.0, 1.0
    variants, yardsticks = HEADS, {"products": sources.Products}

    @property
    def flops(self):
        return 4 * 2 * math.prod(self.shape)

    def problem(self, device):
        return sources.make_heads(*self.shape, torch.bfloat16, device)

    def checked(self):
        """Of which tokens and of which classes the gradients are checked."""
        n, _, v = self.shape
        return checked_rows(n), checked_rows(v)

    def definitions(self, x):
        n, _, v = self.shape
        tokens, classes = self.checked()
        hidden, weight, *teacher = (
            x.detach().double() for x in (x.hidden, x.weight, x.teacher_hidden, x.teacher_weight)
        )
        options = dict(divergence=self.divergence, num_items=n, backend="eager")
        total, of_weight = dict.fromkeys(ROUNDINGS, 0.0), dict.fromkeys(ROUNDINGS, 0.0)
        of_hidden = {name: [] for name in ROUNDINGS}
        chunk = max(CHECKED_AT_ONCE // v, 1)
        for start in range(0, n, chunk):
            here = slice(start, start + chunk)
            inside = tokens[(tokens >= start) & (tokens < start + chunk)] - start
            logits = hidden[here] @ weight.T, teacher[0][here] @ teacher[1].T
            for name, rounding in ROUNDINGS.items():
                student, of_teacher = map(rounding, logits)
                student = student.detach().requires_grad_()
                loss = kd_loss(student, of_teacher, **options)
                loss.backward()
                total[name] += loss.detach()
                of_hidden[name].append(student.grad[inside] @ weight)
                of_weight[name] += student.grad[:, classes].T @ hidden[here]
        grads = {name: [torch.cat(of_hidden[name]), of_weight[name]] for name in ROUNDINGS}
        return {
            name: (total[name], both, [x.abs().amax(-1, keepdim=True) for x in both])
            for name, both in grads.items()
        }


@dataclass(frozen=True)
class Topk(sources.Topk):
    dtype: str = DTYPE

    temperature, alpha = 1.0, sources.ALPHA
    variants, yardsticks = TOPK, {"copy": Copy, "order": sources.Order}

    @property
    def bytes(self):
        return 2 * math.prod(self.shape) * torch.bfloat16.itemsize

    def problem(self, device):
        x = harness.make_problem(*self.shape, torch.bfloat16, device=device)
        logprobs, ids = x.teacher.float().log_softmax(-1).topk(K)
        shuffled = torch.randperm(K, generator=torch.Generator().manual_seed(0)).to(device)
        return Problem(x.student, TopK(ids[:, shuffled], logprobs[:, shuffled]), x.labels)

    def checked(self):
        return (checked_rows(self.shape[0]),)

    def definitions(self, x):
        n, v = self.shape

        def part(rows):
            teacher = TopK(x.teacher.ids[rows], x.teacher.logprobs[rows].double())
            return Problem(x.student.detach()[rows], teacher, x.labels[rows])

        options = dict(alpha=self.alpha, num_items=n, backend="eager")
        total, chunk = 0.0, max(CHECKED_AT_ONCE // v, 1)
        for start in range(0, n, chunk):
            here = part(slice(start, start + chunk))
            total += kd_loss(here.student.double(), here.teacher, here.labels, **options)
        (rows,) = self.checked()
        # The definition of a mean over these rows, which are a share of all.
        _, *parts = sources.Topk((len(rows), v), self.dtype).definition(part(rows))
        grads, sizes = ([tensor * len(rows) / n for tensor in tensors] for tensors in parts)
        return {"": (total, grads, sizes)}


def cases(settings):
    """All problems of a run."""
    found = []
    if "heads" in settings.parts:
        shapes = map(shape_of, settings.shapes)
        found += [
            Heads(shape, divergence=divergence)
            for shape in shapes
            for divergence in settings.divergences
        ]
    if "topk" in settings.parts:
        found += [Topk(shape) for shape in map(shape_of, settings.topk_shapes)]
    return found


# What is measured


def record(case, variant, **measured):
    """One line of the result files; every line has the same fields."""
    fields = dict.fromkeys(
        "status loss_error gradient_error rounded_loss_error rounded_gradient_error calls "
        "ms ms_min ms_max times_native times_native_min times_native_max "
        "times_products times_products_min times_products_max tflop_per_s gb_per_s "
        "share_of_copy share_of_copy_min share_of_copy_max peak_mb gradient_mb".split()
    )
    first = dict(part=case.part, dtype=case.dtype, divergence=case.divergence, variant=variant)
    first.update(rows=case.shape[0], hidden=None, vocab=case.shape[-1])
    if case.part == "heads":
        first["hidden"] = case.shape[1]
    return {**first, **fields, **measured}


def first_calls(step, checked, gpu):
    """Compile and warm up in one call, look at the next.

    Returns:
        ((loss, the checked rows of each gradient), memory, seconds of the second call).
    """
    step.prepare()
    step.run()
    for gradient in step.gradients():
        # The next one is likely to get this memory, and what is not written there stays NaN.
        gradient.fill_(math.nan)
    del gradient
    step.prepare()
    seconds = []
    peak = gpu.peak(lambda: seconds.append(gpu.seconds(step.run)))
    gradients = step.gradients()
    size = sum(x.nbytes for x in gradients)
    # A NaN anywhere makes the sum NaN, and with it what is compared.
    output = [x[rows] + 0 * x.sum() for x, rows in zip(gradients, checked, strict=True)]
    memory = {"peak_mb": (peak - size) / 1e6, "gradient_mb": size / 1e6}
    return (step.value.detach(), output), memory, seconds[0]


def errors(output, definition):
    """(relative error of the loss, largest error of a gradient entry); NaN where one is."""
    (value, found), (loss, *expected) = output, definition
    worst = [
        ((x.double() - grad).abs() / torch.maximum(size, grad.abs())).max()
        for x, grad, size in zip(found, *expected, strict=True)
    ]
    return float((value.double() - loss).abs() / loss.abs()), float(torch.stack(worst).max())


def measure(case, settings, gpu):
    """One problem: every variant is checked, then timed in turns -> records.

    What takes longer than `settings.patience` in its second call, which is timed, is not called
    again: that was its time.
    """
    harness.say(f"{case.title}: compiling and checking")
    names = [name for name in settings.variants if name in case.variants]
    try:
        problem = case.problem(gpu.device)
        definitions = case.definitions(problem)
    except torch.OutOfMemoryError:
        status = "out of memory: the inputs and what their definition takes do not fit"
        return [record(case, name, status=status) for name in names]
    lines, makers, seconds = {}, {}, {}
    for name in names:
        gpu.release()
        variant, line = case.variants[name], record(case, name)
        lines[name] = line
        with harness.noting(line):
            make_step = functools.partial(case.step, variant.make(case, gpu.device), problem)
            output, memory, took = first_calls(make_step(), case.checked(), gpu)
            line.update(memory)
            found = {name: errors(output, x) for name, x in definitions.items()}
            for rounded, (of_loss, of_gradient) in found.items():
                line[f"{rounded}loss_error"] = of_loss
                line[f"{rounded}gradient_error"] = of_gradient
            nearest = min(found.values(), key=lambda of: of[1])
            line["status"] = harness.verdict(nearest, TOLERANCES[case.part, variant.accuracy])
            if line["status"] == "ok":
                makers[name], seconds[name] = make_step, [took]
        case.step(None, problem).prepare()  # leaves no gradient
    for name, yardstick in case.yardsticks.items():
        gpu.release()
        line = lines[name] = record(case, name)
        with harness.noting(line):
            maker = functools.partial(yardstick, problem)
            seconds[name] = [turn(maker, gpu)]
            makers[name], line["status"] = maker, "ok"

    harness.say(f"{case.title}: {settings.rounds} rounds")
    again = {name: x for name, x in makers.items() if seconds[name][0] <= settings.patience}
    timed = take_turns(again, settings.rounds, gpu)
    for name in again:
        if name not in timed:
            lines[name]["status"] = "out of memory"
            del seconds[name]
    seconds.update(timed)
    for name in seconds:
        lines[name].update(rates(case, name, seconds))
    return list(lines.values())


def rates(case, name, seconds):
    """What a variant's seconds come to; ratios are taken within each round."""
    fields, own = sources.speed(name, seconds), seconds[name]
    if case.part == "heads":
        fields["tflop_per_s"] = case.flops / statistics.median(own) / 1e12
    elif name != "order":
        fields["gb_per_s"] = case.bytes / statistics.median(own) / 1e9
        if copy := seconds.get("copy"):
            if len(copy) != len(own):
                copy = [statistics.median(copy)] * len(own)
            shares = [a / b for a, b in zip(copy, own, strict=True)]
            fields.update(harness.spread("share_of_copy", shares))
    return fields


# What is wanted


@dataclass(frozen=True)
class Target:
    case: Heads | Topk
    what: str  # of WANTED
    limit: float
    gpu: str = ""  # of devices with this in their name; of all of them by default


# What a target is about: (field of the record, whether the limit is a lower one).
WANTED = {
    "ms": ("ms", False),
    "× products": ("times_products", False),
    "extra MB": ("peak_mb", False),
    "% of copy": ("share_of_copy", True),
}
OVERHEAD = 1.15  # of the four products, which take 49 ms at 700 TFLOP/s
TARGETS = (
    *(
        target
        for case in (Heads(shape_of(SHAPES[0]), divergence=name) for name in BETAS)
        for target in (
            Target(case, "× products", OVERHEAD),
            Target(case, "ms", OVERHEAD * 49, gpu="H200"),
            Target(case, "extra MB", 2000.0),
        )
    ),
    Target(Topk(shape_of(TOPK_SHAPES[0])), "ms", 1.4, gpu="H200"),
    Target(Topk(shape_of(TOPK_SHAPES[0])), "% of copy", 0.8),
)


def judge(records, gpu):
    """Every target with what was measured and whether it is met, as dicts."""
    lines = {problem_of(line): line for line in records if line["variant"] == "native"}
    judged = []
    for target in TARGETS:
        problem = record(target.case, "native")
        field, at_least = WANTED[target.what]
        line = lines.get(problem_of(problem))
        measured = line[field] if line and line["status"] == "ok" else None
        verdict = "not measured"
        if measured is not None:
            met = measured >= target.limit if at_least else measured <= target.limit
            verdict = "met" if met else "not met"
        if target.gpu not in gpu:
            verdict = f"for {target.gpu} only"
        where = {key: problem[key] for key in sources.PROBLEM}
        found = {name: x for name, x in asdict(target).items() if name != "case"}
        judged.append({**where, **found, "measured": measured, "verdict": verdict})
    return judged


# What is shown


HEADER = ["", "calls", "ms", "min", "max", "× kdkernels", "min", "max", "× products", "min", "max"]
HEADER += ["TFLOP/s", "GB/s", "% of copy", "min", "max", "extra MB", "gradient MB"]
ERRORS = [f"{rounded}{of}_error" for rounded in ROUNDINGS for of in ("loss", "gradient")]
HEADER += [name.replace("_", " ") for name in ERRORS]


def case_of(line):
    if line["part"] == "topk":
        return Topk((line["rows"], line["vocab"]))
    return Heads((line["rows"], line["hidden"], line["vocab"]), divergence=line["divergence"])


def cells(case, line):
    """A record under HEADER."""
    row = [sources.title(case, line["variant"]), str(line["calls"])]
    row += [number(line[key], 3) for key in ("ms", "ms_min", "ms_max")]
    for ratio in ("times_native", "times_products"):
        row += [number(line[f"{ratio}{which}"]) for which in ("", "_min", "_max")]
    row += [number(line["tflop_per_s"]), number(line["gb_per_s"])]
    row += [percent(line[f"share_of_copy{which}"]) for which in ("", "_min", "_max")]
    row += [number(line[key], 1) for key in ("peak_mb", "gradient_mb")]
    row += ["" if line[key] is None else f"{line[key]:.1e}" for key in ERRORS]
    return row


def tables(records):
    """(heading, header, rows under it, what was not timed and why) of every problem."""
    for heading, timed, others in sources.tables(records, case_of, cells):
        used = [i for i in range(len(HEADER)) if i == 0 or any(row[i] for row in timed)]
        header, *timed = [[row[i] for i in used] for row in (HEADER, *timed)]
        yield heading, header, timed, others


TARGET_HEADER = ["target", "", "limit", "measured", ""]


def target_rows(judged):
    """The targets under TARGET_HEADER."""
    rows = []
    for target in judged:
        numbers = target["limit"], target["measured"]
        share = target["what"] == "% of copy"
        limit, measured = (percent(x) if share else number(x, 2) for x in numbers)
        sign = "≥" if WANTED[target["what"]][1] else "≤"
        row = [case_of(target).title, target["what"], f"{sign} {limit}", measured]
        rows.append([*row, target["verdict"]])
    return rows


def report(records, judged):
    """Everything, for a terminal."""
    blocks = [
        "\n".join([heading, harness.text_table(header, timed), *others])
        for heading, header, timed, others in tables(records)
    ]
    return "\n\n".join([*blocks, harness.text_table(TARGET_HEADER, target_rows(judged))])


def markdown(records, judged, settings, machine):
    """The same for a page, with what has to be known to read it."""
    peers = ", ".join(f"{name} {machine[name]}" for name in sources.PEERS)
    blocks = [
        f"bfloat16 on {machine['gpu']} (driver {machine['driver']}, {machine['clocks']} after the "
        f"last round), torch {machine['torch']} for {machine['torch built for']}, triton "
        f"{machine['triton']}, {peers}, kdkernels {machine['kdkernels']} ({machine['commit']}), "
        f"{machine['date']}. Forward and backward; medians and extremes of {settings.rounds} "
        "rounds in turns; ratios are taken within each round. TFLOP/s counts the four products, "
        "GB/s 2·N·V elements; extra MB is the peak beyond inputs and gradients.",
        harness.markdown_table(TARGET_HEADER, target_rows(judged)),
    ]
    for heading, header, timed, others in tables(records):
        blocks += [f"### {heading}", harness.markdown_table(header, timed)]
        blocks += [f"- {other}" for other in others]
    return "\n\n".join(blocks)


# The command


def parse(argv):
    parser = argparse.ArgumentParser(
        description="kd_loss on hidden states and on top-k teachers on a GPU: correctness, time "
        "and memory.",
        epilog="Without options the run is the published one, and goes to benchmarks/results; "
        "what another run measures is written only where --out says. The exit status is 1 if "
        "kdkernels is wrong, 2 without a GPU.",
    )
    parser.add_argument("--shapes", nargs="+", metavar="NxHxV", help=f"{SHAPES} by default")
    parser.add_argument("--topk-shapes", nargs="+", metavar="NxV", help=f"{TOPK_SHAPES} by default")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS} by default")
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE,
        metavar="SECONDS",
        help=f"what takes longer is timed only once; {PATIENCE} by default",
    )
    parser.add_argument("--divergences", nargs="+", choices=BETAS, default=list(BETAS))
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", metavar="DIR", help="write CSV, JSON and Markdown to this folder")
    parser.add_argument("--quick", action="store_true", help="seconds: small problems")
    args = parser.parse_args(argv)
    quick = args.quick
    args.shapes = args.shapes or list(QUICK_SHAPES if quick else SHAPES)
    args.topk_shapes = args.topk_shapes or list(QUICK_TOPK_SHAPES if quick else TOPK_SHAPES)
    args.rounds = args.rounds or (QUICK_ROUNDS if quick else ROUNDS)
    published = dict(shapes=SHAPES, topk_shapes=TOPK_SHAPES, divergences=BETAS)
    published.update(variants=NAMES, parts=PARTS)
    as_published = all(getattr(args, name) == list(value) for name, value in published.items())
    as_published &= args.patience == PATIENCE and args.rounds >= ROUNDS
    if args.out is None and as_published:
        args.out = harness.RESULTS
    return args


def main(argv=None):
    settings = parse(argv)
    try:
        gpu = harness.gpu()
    except Missing as why:
        print(f"sources_cuda.py measures on a GPU, and there is none: {why}", file=sys.stderr)
        return 2
    records = []
    for case in cases(settings):
        records += measure(case, settings, gpu)
        gpu.release()
    facts = gpu.facts()  # at once, while the clocks are those of the last round
    machine = {**harness.machine(), **facts, **sources.versions()}
    judged = judge(records, machine["gpu"])
    harness.say("done")
    print(", ".join(f"{name}: {value}" for name, value in machine.items()))
    print(f"\n{report(records, judged)}")

    if settings.out is not None:
        chosen = {name: value for name, value in vars(settings).items() if name != "out"}
        document = {
            "question": "sources_cuda",
            "machine": machine,
            "settings": {**chosen, "dtype": DTYPE, "k": K, "alpha": sources.ALPHA},
            "targets": judged,
            "rows": records,
        }
        name = f"sources-cuda-{harness.slug(machine['gpu'])}"
        page = markdown(records, judged, settings, machine)
        harness.write(settings.out, name, document, page)
        print(f"\nwritten: {name}.csv, .json and .md")
    ours = [line for line in records if line["variant"] in BACKENDS]
    return int(any(line["status"].startswith(("wrong", "failed")) for line in ours))


if __name__ == "__main__":
    sys.exit(main())
