"""How fast is `kd_loss` on dense bfloat16 logits on a GPU, and how much memory does it take?

Four vocabularies, five cases, against a copy of as many bytes, the formula as people write it in
PyTorch, eager and compiled, Liger and TRL. A pass has to read both matrices and to write the
gradient, 3·N·V elements (2·N·V for the loss only), and that is what the copy moves: half of it
read, half of it written. `README.md` says how to read it.
"""

import argparse
import functools
import gc
import importlib
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import harness
import torch
import torch.nn.functional as F
from dense import number, speed
from harness import Missing, Step

from kdkernels import kd_loss
from kdkernels.backends import registry

DTYPE = torch.bfloat16
ROWS, VOCABS, ROUNDS = 8192, (32000, 128256, 151936, 262144), 7
QUICK_ROWS, QUICK_VOCABS, QUICK_ROUNDS = 1024, (32000,), 3
CHECKED_ROWS = 64  # whose gradients are checked; the loss is checked over all rows

# The largest errors (`harness.errors`: loss, gradient) of what is timed. A bfloat16 gradient is off
# by one rounding. At V = 262,144 PyTorch's float32 softmax makes a KL of 0.8 wrong by 4e-5, and
# log-probabilities in bfloat16 by 4e-2.
TOLERANCES = {
    "exact": (1e-5, 1e-4 + 2.0**-8),
    "float32": (2e-4, 2.0**-7),
    "bfloat16": (0.1, 0.25),
}


# What is computed


@dataclass(frozen=True)
class Case:
    title: str
    divergence: str
    temperature: float
    alpha: float
    backward: bool = True

    @property
    def matrices(self):
        """How many matrices of the logits' size have to be read or written."""
        return 3 if self.backward else 2


CASES = {
    "kl-ce": Case("forward KL and cross-entropy, T = 2, α = 0.5", "forward_kl", 2.0, 0.5),
    "kl-ce-t1": Case("forward KL and cross-entropy, T = 1, α = 0.5", "forward_kl", 1.0, 0.5),
    "kl": Case("forward KL alone, T = 2", "forward_kl", 2.0, 1.0),
    "jsd": Case("JSD and cross-entropy, T = 1, α = 0.5", "jsd", 1.0, 0.5),
    "kl-ce-loss": Case(
        "loss only, forward KL and cross-entropy, T = 2, α = 0.5", "forward_kl", 2.0, 0.5, False
    ),
}


def kdkernels_loss(case, device, backend, **options):
    try:
        registry.resolve(device, DTYPE, backend)
    except RuntimeError as error:
        raise Missing(str(error)) from error
    return functools.partial(
        kd_loss,
        divergence=case.divergence,
        temperature=case.temperature,
        alpha=case.alpha,
        backend=backend,
        **options,
    )


def tempered(logits, case):
    return logits if case.temperature == 1 else logits / case.temperature


def mixed(case, distill, hard):
    """alpha · T² · distill + (1 − alpha) · hard(), which is not called where it weighs nothing."""
    distill = distill * case.temperature**2
    return distill if case.alpha == 1 else case.alpha * distill + (1 - case.alpha) * hard()


def formula(case):
    """The loss as people write it."""

    def forward_kl(student, teacher):
        log_q = F.log_softmax(tempered(student, case), -1)
        p = F.softmax(tempered(teacher, case), -1)
        return F.kl_div(log_q, p, reduction="batchmean")

    def jsd(student, teacher):
        log_q = F.log_softmax(tempered(student, case), -1)
        log_p = F.log_softmax(tempered(teacher, case), -1)
        log_m = torch.logaddexp(log_q, log_p) - math.log(2)
        kl = functools.partial(F.kl_div, log_m, reduction="batchmean", log_target=True)
        return (kl(log_p) + kl(log_q)) / 2

    divergence = {"forward_kl": forward_kl, "jsd": jsd}[case.divergence]

    def loss(student, teacher, labels):
        distill = divergence(student, teacher)
        return mixed(case, distill, lambda: F.cross_entropy(student, labels))

    return loss


def in_float32(loss):
    return lambda student, teacher, labels: loss(student.float(), teacher.float(), labels)


def compiled(loss):
    # Each shape for itself: what was compiled before would make it dynamic, or be the limit.
    torch.compiler.reset()
    return torch.compile(loss, dynamic=False, fullgraph=True)


def imported(module, *names):
    try:
        found = importlib.import_module(module)
        return [getattr(found, name) for name in names]
    except Exception as error:  # a package that is there fails to import in ways of its own
        lines = str(error).splitlines()
        raise Missing(f"{module}: {type(error).__name__}: {lines[0] if lines else ''}") from error


def liger_loss(case, dtype):
    """Liger's losses take log-probabilities: PyTorch makes them, in `dtype`.

    Its cross-entropy writes the gradient over the logits in the forward pass, without a gradient to
    write too if they are a leaf that requires grad: it comes last, and gets what it may destroy.
    """
    cross_entropy, jsd, kl_div = imported(
        "liger_kernel.transformers", "LigerCrossEntropyLoss", "LigerJSD", "LigerKLDIVLoss"
    )
    hard = cross_entropy()
    if case.divergence == "jsd":
        divergence = jsd(beta=0.5)
    else:
        divergence = kl_div(reduction="batchmean", log_target=True)

    def loss(student, teacher, labels):
        log_q = F.log_softmax(tempered(student, case), -1, dtype=dtype)
        log_p = F.log_softmax(tempered(teacher, case), -1, dtype=dtype)
        logits = student if torch.is_grad_enabled() else student.detach()
        return mixed(case, divergence(log_q, log_p), lambda: hard(logits, labels))

    return loss


def trl_loss(case):
    """The divergence of TRL's GKD trainer, which has neither T² nor a cross-entropy.

    Its labels only mask rows, at the price of a copy: it gets none.
    """
    (trainer,) = imported("trl.experimental.gkd", "GKDTrainer")
    divergence = functools.partial(
        trainer.generalized_jsd_loss,
        beta={"forward_kl": 0.0, "jsd": 0.5}[case.divergence],
        temperature=case.temperature,
        reduction="batchmean",
    )

    def loss(student, teacher, labels):
        distill = divergence(student, teacher)
        return mixed(case, distill, lambda: F.cross_entropy(student, labels))

    return loss


@dataclass(frozen=True)
class Variant:
    title: str
    make: Callable  # (case, device) -> loss(student, teacher, labels); raises Missing
    ours: bool = False  # if it is wrong, so is the exit status
    accuracy: str = "bfloat16"  # of TOLERANCES
    overwrites: bool = False  # the logits it is given
    cases: tuple[str, ...] = tuple(CASES)


VARIANTS = {
    "native": Variant(
        "kdkernels",
        lambda case, device: kdkernels_loss(case, device, "native"),
        ours=True,
        accuracy="exact",
    ),
    "triton": Variant(
        "kdkernels, backend='triton'",
        lambda case, device: kdkernels_loss(case, device, "triton"),
        ours=True,
        accuracy="exact",
    ),
    "inplace": Variant(
        "kdkernels, inplace=True",
        lambda case, device: kdkernels_loss(case, device, "native", inplace=True),
        ours=True,
        accuracy="exact",
        overwrites=True,
        cases=("kl-ce",),
    ),
    "eager": Variant(
        "kdkernels, backend='eager'",
        lambda case, device: kdkernels_loss(case, device, "eager"),
        ours=True,
        accuracy="float32",
    ),
    "pytorch": Variant("PyTorch", lambda case, device: formula(case)),
    "pytorch-float32": Variant(
        "PyTorch, cast to float32",
        lambda case, device: in_float32(formula(case)),
        accuracy="float32",
    ),
    "compiled": Variant("PyTorch, torch.compile", lambda case, device: compiled(formula(case))),
    "liger": Variant(
        "Liger, log_softmax by PyTorch",
        lambda case, device: liger_loss(case, None),
        overwrites=True,
    ),
    "liger-float32": Variant(  # whose cross-entropy is still rounded to the dtype of the logits
        "Liger, log_softmax by PyTorch in float32",
        lambda case, device: liger_loss(case, torch.float32),
        overwrites=True,
    ),
    "trl": Variant(
        "TRL's GKD divergence, T² and cross-entropy by PyTorch",
        lambda case, device: trl_loss(case),
    ),
}
QUICK_VARIANTS = [name for name in VARIANTS if name != "compiled"]


class Copy:
    """The yardstick: what a pass has to read and write, half of it read and half of it written."""

    def __init__(self, problem, case):
        sources = [problem.student.detach().flatten()]
        if case.matrices == 3:
            sources.append(problem.teacher.flatten()[: problem.teacher.numel() // 2])
        self.pairs = [(torch.empty_like(source), source) for source in sources]

    def prepare(self):
        pass

    def run(self):
        for target, source in self.pairs:
            target.copy_(source)


# What is measured


def record(case, vocab, rows, variant, **measured):
    """One line of the result files; every line has the same fields."""
    fields = dict.fromkeys(
        "status ms ms_min ms_max bytes gb_per_s share_of_copy share_of_copy_min share_of_copy_max "
        "times_native times_native_min times_native_max peak_mb gradient_mb loss_error "
        "gradient_error".split()
    )
    return {**dict(case=case, vocab=vocab, rows=rows, variant=variant), **fields, **measured}


def checked_rows(count):
    """Where gradients are checked: the first row, the last one, and others at random."""
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:CHECKED_ROWS]
    return torch.cat([chosen, torch.tensor([0, count - 1])]).unique()


def first_calls(step, rows, gpu):
    """Compile and warm up in one call, look at the next -> ((loss, gradient of `rows`), memory)."""
    step.prepare()
    step.run()
    step.prepare()
    # The gradient is likely to get this memory next, and what is not written there stays NaN.
    torch.full_like(step.problem.teacher, math.nan)
    peak = gpu.peak(step.run)
    loss, gradient = step.value.detach(), step.gradient()
    if gradient is None:
        return (loss, None), {"peak_mb": peak / 1e6}
    in_place = gradient.data_ptr() == step.logits.data_ptr()
    size = 0 if in_place else gradient.nbytes
    # A NaN anywhere makes the sum NaN, and with it what is compared.
    output = loss, gradient[rows] + 0 * gradient.sum()
    return output, {"peak_mb": (peak - size) / 1e6, "gradient_mb": size / 1e6}


def turn(make_step, gpu):
    """Seconds of one call. The call before it leaves the allocator as a step of training does."""
    step = make_step()
    step.prepare()
    step.run()
    step.prepare()
    return gpu.seconds(step.run)


def take_turns(makers, rounds, gpu):
    """Time the variants in turns; between them nothing is kept that would take their memory.

    Returns:
        {name: [seconds of a call, one for each round]}, without what ran out of memory.
    """
    seconds = {name: [] for name in makers}
    gc.collect()
    gc.freeze()  # so that the collections below have little to look at
    gc.disable()
    try:
        for _ in range(rounds):
            for name in list(seconds):
                try:
                    seconds[name].append(turn(makers[name], gpu))
                except torch.OutOfMemoryError:
                    del seconds[name]
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return seconds


def measure(case_name, problem, settings, gpu, wrong=()):
    """One case on one problem: every variant is checked, then timed in turns -> records.

    `wrong` are the variants whose gradients were: the loss alone can look right.
    """
    case, shape = CASES[case_name], problem.student.shape
    harness.say(f"V = {shape[1]:,}, {case.title}: compiling and checking")
    rows = checked_rows(shape[0])
    lines, makers, outputs = {}, {}, {}
    for name in settings.variants:
        variant = VARIANTS[name]
        if case_name not in variant.cases:
            continue
        line = lines[name] = record(case_name, shape[1], shape[0], name)
        if name in wrong and not case.backward:
            line["status"] = "wrong: its gradient is"
            continue
        with harness.noting(line):
            make_step = functools.partial(
                Step,
                variant.make(case, gpu.device),
                problem,
                backward=case.backward,
                inplace=variant.overwrites and case.backward,
            )
            outputs[name], memory = first_calls(make_step(), rows, gpu)
            line.update(memory)
            makers[name] = make_step
        problem.student.grad = None
        gpu.release()

    found = harness.errors(
        outputs,
        problem,
        divergence=case.divergence,
        temperature=case.temperature,
        alpha=case.alpha,
        rows=rows,
        chunk=64,
    )
    for name, (loss_error, gradient_error) in found.items():
        allowed = TOLERANCES[VARIANTS[name].accuracy]
        lines[name]["status"] = harness.verdict(found[name], allowed)
        lines[name]["loss_error"] = loss_error
        if case.backward:
            lines[name]["gradient_error"] = gradient_error
        if lines[name]["status"] != "ok":
            del makers[name]

    harness.say(f"V = {shape[1]:,}, {case.title}: {settings.rounds} rounds")
    makers["copy"] = functools.partial(Copy, problem, case)
    lines["copy"] = record(case_name, shape[1], shape[0], "copy", status="ok")
    seconds = take_turns(makers, settings.rounds, gpu)
    for name in makers:
        if name in seconds:
            lines[name].update(rates(seconds, name, case.matrices * problem.teacher.nbytes))
        else:
            lines[name]["status"] = "out of memory"
    return list(lines.values())


def rates(seconds, name, size):
    """What a variant's seconds come to; ratios are taken within each round."""
    fields = speed(seconds[name], seconds.get("native") if name != "copy" else None)
    fields["bytes"] = size
    fields["gb_per_s"] = size / statistics.median(seconds[name]) / 1e9
    if "copy" in seconds:
        shares = [a / b for a, b in zip(seconds["copy"], seconds[name], strict=True)]
        fields.update(harness.spread("share_of_copy", shares))
    return fields


def measure_vocab(vocab, settings, gpu):
    """All cases at one V -> records."""
    try:
        problem = harness.make_problem(settings.rows, vocab, DTYPE, device=gpu.device)
    except torch.OutOfMemoryError:
        status = "out of memory: the logits alone do not fit"
        return [
            record(case, vocab, settings.rows, name, status=status)
            for case in settings.cases
            for name in settings.variants
            if case in VARIANTS[name].cases
        ]
    records = []
    for case in settings.cases:
        wrong = {line["variant"] for line in records if line["status"].startswith("wrong")}
        records += measure(case, problem, settings, gpu, wrong)
    return records


# What is wanted


@dataclass(frozen=True)
class Target:
    case: str
    vocab: int
    variant: str
    what: str  # of WANTED
    limit: float
    gpu: str = ""  # of devices with this in their name; of all of them by default


# What a target is about: (fields of the record, to be added up; whether the limit is a lower one).
WANTED = {
    "ms": (["ms"], False),
    "% of copy": (["share_of_copy"], True),
    "MB beyond gradient": (["peak_mb"], False),
    "MB in all": (["peak_mb", "gradient_mb"], False),
}
SMALL_MB = 1.0  # a few numbers for each row; the smallest gradient has 524 MB
TARGETS = (
    *(
        Target("kl-ce", vocab, "native", "ms", limit, gpu="H200")
        for vocab, limit in ((32000, 0.45), (128256, 1.75), (262144, 3.6))
    ),
    Target("jsd", 128256, "native", "ms", 2.2, gpu="H200"),
    Target("kl-ce", 32000, "triton", "ms", 0.45, gpu="H200"),
    Target("kl-ce", 128256, "triton", "ms", 2.7, gpu="H200"),
    *(
        Target(case, vocab, "native", "% of copy", 0.85)
        for case in ("kl-ce", "kl-ce-t1", "kl")
        for vocab in VOCABS
    ),
    *(Target("kl-ce", vocab, "native", "MB beyond gradient", SMALL_MB) for vocab in VOCABS),
    *(Target("kl-ce", vocab, "inplace", "MB in all", SMALL_MB) for vocab in VOCABS),
)


def judge(records, gpu):
    """Every target with what was measured and whether it is met, as dicts."""
    lines = {(line["case"], line["vocab"], line["variant"]): line for line in records}
    judged = []
    for target in TARGETS:
        fields, at_least = WANTED[target.what]
        line = lines.get((target.case, target.vocab, target.variant))
        values = [line[field] for field in fields] if line and line["status"] == "ok" else [None]
        measured, verdict = None, "not measured"
        if None not in values:
            measured = sum(values)
            met = measured >= target.limit if at_least else measured <= target.limit
            verdict = "met" if met else "not met"
        if target.gpu not in gpu:
            verdict = f"for {target.gpu} only"
        judged.append({**asdict(target), "measured": measured, "verdict": verdict})
    return judged


# What is shown


def title(name):
    return VARIANTS[name].title if name != "copy" else "copy of as many bytes"


def percent(share):
    return "" if share is None else f"{share:.0%}"


HEADER = ["", "ms", "min", "max", "GB/s", "% of copy", "min", "max", "× kdkernels", "min", "max"]
HEADER += ["extra MB", "gradient MB", "loss error", "gradient error"]


def cells(line):
    """A record under HEADER."""
    row = [title(line["variant"])]
    row += [number(line[key], 3) for key in ("ms", "ms_min", "ms_max")]
    row.append(number(line["gb_per_s"]))
    row += [percent(line[f"share_of_copy{which}"]) for which in ("", "_min", "_max")]
    row += [number(line[f"times_native{which}"]) for which in ("", "_min", "_max")]
    row += [number(line[key], 1) for key in ("peak_mb", "gradient_mb")]
    for key in ("loss_error", "gradient_error"):
        row.append("" if line[key] is None else f"{line[key]:.1e}")
    return row


def tables(records):
    """(heading, rows under HEADER, what was not timed and why) of every case at every V."""
    groups = {}
    for line in records:
        groups.setdefault((line["vocab"], line["case"], line["rows"]), []).append(line)
    for (vocab, case, rows), lines in groups.items():
        timed = [cells(line) for line in lines if line["status"] == "ok"]
        others = [
            f"{title(line['variant'])}: {line['status']}"
            for line in lines
            if line["status"] != "ok" and not line["status"].startswith("missing")
        ]
        yield f"{rows:,} × {vocab:,}, {CASES[case].title}", timed, others


def missing(records):
    """Why variants cannot run here, once for each reason."""
    lines = (line for line in records if line["status"].startswith("missing"))
    return list(dict.fromkeys(f"{title(line['variant'])}: {line['status']}" for line in lines))


TARGET_HEADER = ["target", "V", "", "", "limit", "measured", ""]


def target_rows(judged):
    """The targets under TARGET_HEADER."""
    rows = []
    for target in judged:
        numbers = target["limit"], target["measured"]
        share = target["what"] == "% of copy"
        limit, measured = (percent(x) if share else number(x, 2) for x in numbers)
        sign = "≥" if WANTED[target["what"]][1] else "≤"
        row = [CASES[target["case"]].title, f"{target['vocab']:,}", title(target["variant"])]
        rows.append([*row, target["what"], f"{sign} {limit}", measured, target["verdict"]])
    return rows


def report(records, judged):
    """Everything, for a terminal."""
    blocks = [
        "\n".join([heading, harness.text_table(HEADER, timed), *others])
        for heading, timed, others in tables(records)
    ]
    blocks.append("\n".join(missing(records)))
    blocks.append(harness.text_table(TARGET_HEADER, target_rows(judged)))
    return "\n\n".join(block for block in blocks if block)


def markdown(records, judged, settings, machine):
    """The same for a page, with what has to be known to read it."""
    blocks = [
        f"bfloat16 logits on {machine['gpu']} (driver {machine['driver']}, {machine['clocks']} "
        f"after the last round), torch {machine['torch']} for {machine['torch built for']}, "
        f"triton {machine['triton']}, kdkernels {machine['kdkernels']} ({machine['commit']}), "
        f"{machine['date']}. Medians and extremes of {settings.rounds} rounds in turns; ratios are "
        "taken within each round. GB/s counts 3·N·V elements, 2·N·V for the loss only; extra MB "
        "is the peak beyond inputs and gradient.",
        harness.markdown_table(TARGET_HEADER, target_rows(judged)),
    ]
    for heading, timed, others in tables(records):
        blocks += [f"### {heading}", harness.markdown_table(HEADER, timed)]
        blocks += [f"- {other}" for other in others]
    return "\n\n".join([*blocks, *(f"- {reason}" for reason in missing(records))])


# The command


def parse(argv):
    parser = argparse.ArgumentParser(
        description="kd_loss on dense logits on a GPU: correctness, time and memory.",
        epilog="Without options the run is the published one, and goes to benchmarks/results; "
        "what another run measures is written only where --out says. The exit status is 1 if "
        "kdkernels is wrong, 2 without a GPU.",
    )
    parser.add_argument("--rows", type=int, help=f"N, {ROWS} by default")
    parser.add_argument("--vocabs", type=int, nargs="+", metavar="V", help=f"{VOCABS} by default")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS} by default")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="all by default")
    parser.add_argument("--out", metavar="DIR", help="write CSV, JSON and Markdown to this folder")
    parser.add_argument(
        "--quick", action="store_true", help="seconds: one small problem, no compiler"
    )
    args = parser.parse_args(argv)
    quick = args.quick
    args.rows = args.rows or (QUICK_ROWS if quick else ROWS)
    args.vocabs = args.vocabs or list(QUICK_VOCABS if quick else VOCABS)
    args.rounds = args.rounds or (QUICK_ROUNDS if quick else ROUNDS)
    args.variants = args.variants or (QUICK_VARIANTS if quick else list(VARIANTS))
    published = [ROWS, list(VOCABS), list(CASES), list(VARIANTS)]
    chosen = [args.rows, args.vocabs, args.cases, args.variants]
    if args.out is None and chosen == published and args.rounds >= ROUNDS:
        args.out = harness.RESULTS
    return args


def main(argv=None):
    settings = parse(argv)
    try:
        gpu = harness.gpu()
    except Missing as why:
        print(f"dense_cuda.py measures on a GPU, and there is none: {why}", file=sys.stderr)
        return 2
    records = []
    for vocab in settings.vocabs:
        records += measure_vocab(vocab, settings, gpu)
    facts = gpu.facts()  # at once, while the clocks are those of the last round
    machine = {**harness.machine(), **facts}
    judged = judge(records, machine["gpu"])
    harness.say("done")
    print(", ".join(f"{name}: {value}" for name, value in machine.items()))
    print(f"\n{report(records, judged)}")

    if settings.out is not None:
        chosen = {name: value for name, value in vars(settings).items() if name != "out"}
        cases = {name: asdict(case) for name, case in CASES.items()}
        document = {
            "question": "dense_cuda",
            "machine": machine,
            "settings": {**chosen, "dtype": "bfloat16", "definitions": cases},
            "targets": judged,
            "rows": records,
        }
        name = f"dense-cuda-{harness.slug(machine['gpu'])}"
        page = markdown(records, judged, settings, machine)
        harness.write(settings.out, name, document, page)
        print(f"\nwritten: {name}.csv, .json and .md")
    wrong = ("wrong", "failed")
    return int(
        any(
            line["status"].startswith(wrong)
            for line in records
            if line["variant"] != "copy" and VARIANTS[line["variant"]].ours
        )
    )


if __name__ == "__main__":
    sys.exit(main())
