"""How fast is `kd_loss` on dense logits, and how much memory does it take?

Forward KL and cross-entropy at T = 2, α = 0.5, forward and backward and loss only, float32 and
bfloat16, against the formula as people write it in PyTorch, eager and compiled. A pass has to read
both matrices and to write the gradient, 3·N·V elements (2·N·V for the loss only); GB/s counts just
those, and is compared with a copy measured in the same run. `README.md` says how to read it.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import harness
import torch
import torch.nn.functional as F
from harness import Missing, Step

from kdkernels import kd_loss
from kdkernels.backends import registry
from kdkernels.objective import DIVERGENCES

TEMPERATURE, ALPHA = 2.0, 0.5
ROWS, VOCAB, THREADS, ROUNDS = 256, 128256, 2, 9
QUICK_ROWS, QUICK_VOCAB, QUICK_THREADS, QUICK_ROUNDS = 8, 1000, 1, 5
TINY_ROWS, TINY_VOCAB, TINY_CALLS, TINY_ROUNDS = 4, 16, 100, 21
DIVERGENCE_CHECK_ROWS = 16  # the other divergences are checked on these, `forward_kl` on all rows

PARTS = ("backward", "forward", "divergences", "memory", "tiny")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# The largest errors (`harness.errors`: loss, gradient) of what is timed, by the dtype of the logits
# and that of the arithmetic. A bfloat16 gradient computed in float32 is off by one rounding.
TOLERANCES = {
    ("float32", "float32"): (1e-5, 1e-4),
    ("bfloat16", "float32"): (1e-5, 1e-4 + 2.0**-8),
    ("bfloat16", "bfloat16"): (0.05, 0.25),
}


@dataclass(frozen=True)
class Variant:
    title: str
    make: Callable  # () -> loss(student, teacher, labels); raises Missing
    in_own_dtype: bool = False  # computes in the dtype of the logits, else in float32
    inplace: bool = False
    compiled: bool = False  # the first call on a shape is not like the later ones
    dtypes: tuple[str, ...] = tuple(DTYPES)

    def tolerances(self, dtype):
        return TOLERANCES[dtype, dtype if self.in_own_dtype else "float32"]


def kdkernels_loss(backend, divergence="forward_kl", **options):
    try:
        registry.resolve("cpu", torch.float32, backend)
    except RuntimeError as error:
        raise Missing(str(error)) from error
    return functools.partial(
        kd_loss,
        divergence=divergence,
        temperature=TEMPERATURE,
        alpha=ALPHA,
        backend=backend,
        **options,
    )


def formula(student, teacher, labels):
    """The loss as people write it."""
    log_q = F.log_softmax(student / TEMPERATURE, -1)
    p = F.softmax(teacher / TEMPERATURE, -1)
    distill = F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE * TEMPERATURE
    return ALPHA * distill + (1 - ALPHA) * F.cross_entropy(student, labels)


def formula_in_float32(student, teacher, labels):
    return formula(student.float(), teacher.float(), labels)


def compiled_formula():
    compiled = torch.compile(formula)

    def loss(student, teacher, labels):
        try:
            return compiled(student, teacher, labels)
        except Exception as error:  # the compiler's own errors have no common type
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise Missing(f"{type(error).__name__}: {lines[0] if lines else ''}") from error

    return loss


VARIANTS = {
    "native": Variant("kdkernels", lambda: kdkernels_loss("native")),
    "inplace": Variant(
        "kdkernels, inplace=True", lambda: kdkernels_loss("native", inplace=True), inplace=True
    ),
    "eager": Variant("kdkernels, backend='eager'", lambda: kdkernels_loss("eager")),
    "pytorch": Variant("PyTorch", lambda: formula, in_own_dtype=True),
    "pytorch-float32": Variant(
        "PyTorch, cast to float32", lambda: formula_in_float32, dtypes=("bfloat16",)
    ),
    "compiled": Variant(
        "PyTorch, torch.compile", compiled_formula, in_own_dtype=True, compiled=True
    ),
}
QUICK_VARIANTS = [name for name in VARIANTS if not VARIANTS[name].compiled]

OTHER_DIVERGENCES = {
    name: Variant(f"kdkernels, {name}", functools.partial(kdkernels_loss, "native", name))
    for name in DIVERGENCES
    if name != "forward_kl"
}


def record(dtype, step, variant, rows, vocab, **measured):
    """One line of the result files; every line has the same fields."""
    fields = dict.fromkeys(
        "status loss_error gradient_error ms ms_min ms_max times_native times_native_min "
        "times_native_max bytes gb_per_s share_of_copy peak_mb peak_percent gradient_mb".split()
    )
    first = dict(dtype=dtype, step=step, variant=variant, rows=rows, vocab=vocab)
    first["threads"] = torch.get_num_threads()
    return {**first, **fields, **measured}


def make_steps(variants, problem, *, forward):
    """({(variant, "backward" or "forward"): Step}, {variant: why it is missing})."""
    steps, missing = {}, {}
    for name, variant in variants.items():
        try:
            loss = variant.make()
        except Missing as why:
            missing[name] = str(why)
            continue
        steps[name, "backward"] = Step(loss, problem, inplace=variant.inplace)
        if forward and not variant.inplace:  # without a gradient it is the same
            steps[name, "forward"] = Step(loss, problem, backward=False)
    return steps, missing


def check(steps, variants, problem, dtype, divergence="forward_kl"):
    """Run every step once, and compare loss and gradient with the float64 definition.

    A variant that is wrong with its gradient is wrong without: the loss alone can look right.

    Returns:
        {key of steps: dict of status, loss_error, gradient_error}.
    """
    outputs, checked = {}, {}
    for key, step in steps.items():
        try:
            step.prepare()
            step.run()
            outputs[key] = step.value.detach(), step.gradient()
        except Missing as missing:
            checked[key] = {"status": f"missing: {missing}"}
    found = harness.errors(
        outputs, problem, divergence=divergence, temperature=TEMPERATURE, alpha=ALPHA
    )
    for key, (loss_error, gradient_error) in found.items():
        status = harness.verdict(found[key], variants[key[0]].tolerances(dtype))
        checked[key] = {"status": status, "loss_error": loss_error}
        if steps[key].backward:
            checked[key]["gradient_error"] = gradient_error
    for name, step in found:
        if checked[name, step]["status"] == "ok":
            checked[name, step]["status"] = checked[name, "backward"]["status"]
    return checked


def measure(dtype, settings):
    """Everything but the tiny call in one dtype: checked, then timed in turns -> records."""
    parts, shape = settings.parts, (settings.rows, settings.vocab)
    problem = harness.make_problem(*shape, DTYPES[dtype])
    variants = {name: VARIANTS[name] for name in settings.variants}
    variants = {name: variant for name, variant in variants.items() if dtype in variant.dtypes}
    harness.say(f"{dtype}: compiling and checking")
    steps, missing = make_steps(variants, problem, forward="forward" in parts)
    checked = check(steps, variants, problem, dtype)
    if "divergences" in parts:
        part = problem.head(DIVERGENCE_CHECK_ROWS)
        for name, variant in OTHER_DIVERGENCES.items():
            on_part, why = make_steps({name: variant}, part, forward=False)
            missing.update(why)
            checked.update(check(on_part, {name: variant}, part, dtype, divergence=name))
            steps.update(make_steps({name: variant}, problem, forward=False)[0])

    harness.say(f"{dtype}: {settings.rounds} rounds")
    timed = {
        (name, step): steps[name, step]
        for name, step in steps
        if checked[name, step]["status"] == "ok" and (step in parts or name in OTHER_DIVERGENCES)
    }
    copy = harness.Copy(problem.student.numel())
    seconds = harness.interleave({**timed, "copy": copy}, settings.rounds)
    copy_speed = copy.bytes / statistics.median(seconds["copy"])

    records = [
        record(dtype, "backward", name, *shape, status=f"missing: {why}")
        for name, why in missing.items()
    ]
    for name, step in steps:
        line = record(dtype, step, name, *shape, **checked[name, step])
        records.append(line)
        if (name, step) in timed:
            native = seconds.get(("native", step)) if name in VARIANTS else None
            line.update(speed(seconds[name, step], native))
            line["bytes"] = (3 if step == "backward" else 2) * problem.student.nbytes
            line["gb_per_s"] = line["bytes"] / line["ms"] / 1e6
            line["share_of_copy"] = line["gb_per_s"] * 1e9 / copy_speed
        if "memory" in parts and step == "backward" and name in VARIANTS:
            if line["status"] == "ok":
                line.update(memory(name, dtype, settings))
    line = record(dtype, "copy", "copy", *shape, status="ok", **speed(seconds["copy"]))
    return [*records, {**line, "bytes": copy.bytes, "gb_per_s": copy_speed / 1e9}]


def speed(seconds, native=None):
    """Milliseconds, and the ratio to kdkernels within each round."""
    fields = harness.spread("ms", [1e3 * s for s in seconds])
    if native:
        ratios = [a / b for a, b in zip(seconds, native, strict=True)]
        fields.update(harness.spread("times_native", ratios))
    return fields


def memory(name, dtype, settings):
    harness.say(f"{dtype}: memory of {VARIANTS[name].title}")
    rows, vocab = settings.rows, settings.vocab
    arguments = name, dtype, rows, vocab, settings.threads
    return harness.memory(4 * rows * vocab, peak_of, *arguments)


def peak_of(name, dtype, rows, vocab, threads):
    """(bytes at the peak above the inputs, those that are the gradient's own), of one variant."""
    torch.set_num_threads(threads)
    variant = VARIANTS[name]
    loss = variant.make()
    problem = harness.make_problem(rows, vocab, DTYPES[dtype])
    # Libraries load what they need in the first call. A small one does not fill buffers that the
    # measured one would then find; a compiled formula has to see its shape.
    first = problem if variant.compiled else harness.make_problem(4, 4096, DTYPES[dtype])
    warm_up = Step(loss, first, inplace=variant.inplace)
    warm_up.prepare()
    warm_up.run()
    warm_up.prepare()

    step = Step(loss, problem, inplace=variant.inplace)
    above = harness.peak_above(step)
    gradient = step.gradient()
    return above, 0 if gradient.data_ptr() == step.logits.data_ptr() else gradient.nbytes


def measure_tiny(threads, rounds):
    """The overhead of a call on next to nothing -> (records, microseconds more than PyTorch)."""
    harness.say(f"tiny call, {on(threads)}")
    torch.set_num_threads(threads)
    problem = harness.make_problem(TINY_ROWS, TINY_VOCAB, torch.float32)
    variants = {name: VARIANTS[name] for name in ("native", "pytorch")}
    steps, missing = make_steps(variants, problem, forward=False)
    checked = check(steps, variants, problem, "float32")
    timed = {key: step for key, step in steps.items() if checked[key]["status"] == "ok"}
    seconds = harness.interleave(timed, rounds, repeat=TINY_CALLS)
    native, pytorch = (seconds.get((name, "backward")) for name in variants)
    records = []
    for name in variants:
        fields = checked.get((name, "backward")) or {"status": f"missing: {missing[name]}"}
        line = record("float32", "tiny", name, TINY_ROWS, TINY_VOCAB, **fields)
        if (name, "backward") in timed:
            line.update(speed(seconds[name, "backward"], native))
        records.append(line)
    if not (native and pytorch):
        return records, None
    more = [1e6 * (a - b) for a, b in zip(native, pytorch, strict=True)]
    return records, harness.spread("us", more)


# What is shown


def number(x, decimals=None):
    """Three digits or so; nothing for what was not measured."""
    if x is None:
        return ""
    if decimals is None:
        decimals = 0 if abs(x) >= 100 else 1 if abs(x) >= 10 else 2
    return f"{x:,.{decimals}f}"


def title(name):
    return {**VARIANTS, **OTHER_DIVERGENCES}[name].title if name != "copy" else "copy"


def on(threads):
    return f"{threads} thread{'s' if threads > 1 else ''}"


def report(records, tiny):
    """Everything, for a terminal."""
    header = ["", "ms", "min", "max", "x kdkernels", "min", "max", "GB/s", "% of copy"]
    header += ["loss error", "gradient error", "extra MB", "% of matrix", "gradient MB"]
    groups = {}
    for line in records:
        groups.setdefault((line["dtype"], line["step"], line["threads"]), []).append(line)
    blocks = []
    for (dtype, step, threads), lines in groups.items():
        table, failed = [], []
        for line in lines:
            if line["status"] != "ok":
                failed.append(f"{title(line['variant'])}: {line['status']}")
                continue
            decimals = 3 if step == "tiny" else None
            row = [number(line[key], decimals) for key in ("ms", "ms_min", "ms_max")]
            names = "times_native", "times_native_min", "times_native_max", "gb_per_s"
            row += [number(line[key]) for key in names]
            row.append("" if line["share_of_copy"] is None else f"{line['share_of_copy']:.0%}")
            for key in ("loss_error", "gradient_error"):
                row.append("" if line[key] is None else f"{line[key]:.1e}")
            row += [number(line[key], 1) for key in ("peak_mb", "peak_percent", "gradient_mb")]
            table.append([title(line["variant"]), *row])
        heading = f"{dtype}, {STEPS[step]}, {on(threads)}"
        blocks.append("\n".join([heading, harness.text_table(header, table), *failed]))
    for threads, more in tiny.items():
        blocks.append(
            f"tiny call, {on(threads)}: kdkernels takes {more['us']:.1f} us "
            f"({more['us_min']:.1f} to {more['us_max']:.1f}) more than PyTorch"
        )
    return "\n\n".join(blocks)


STEPS = {
    "backward": "forward and backward",
    "forward": "loss only",
    "copy": "copy of one matrix's size",
    "tiny": f"forward and backward, {TINY_ROWS} x {TINY_VOCAB}",
}


def readme(records, tiny, settings, machine):
    """The table that README.md includes, and what has to be known to read it."""
    lines = {(line["dtype"], line["step"], line["variant"]): line for line in records}
    header, table = [f"{settings.rows} × {settings.vocab:,}"], []
    for dtype in settings.dtypes:
        header += [f"{dtype}, ms", "× kdkernels", "extra memory"]
    for name in settings.variants:
        row = [title(name)]
        for dtype in settings.dtypes:
            line = lines.get((dtype, "backward", name))
            if line is None or line["status"] != "ok":
                row += [line["status"].partition(":")[0] if line else "–", "", ""]
                continue
            percent = line["peak_percent"]
            row += [number(line["ms"]), number(line["times_native"])]
            row.append("" if percent is None else f"{percent:.1f} %")
        table.append(row)

    notes = [
        "Forward and backward of forward KL and cross-entropy, T = 2, α = 0.5, "
        f"{on(settings.threads)} of {machine['cpu']} ({machine['instruction set']}), "
        f"torch {machine['torch']}, "
        f"kdkernels {machine['kdkernels']} ({machine['commit']}), {machine['date']}. Medians of "
        f"{settings.rounds} rounds in turns; extra memory is the peak beyond inputs and gradient, "
        "in % of one float32 logit matrix."
    ]
    inplace = [lines.get((dtype, "backward", "inplace")) for dtype in settings.dtypes]
    if all(line and line["gradient_mb"] == 0 for line in inplace):
        notes[0] += " With `inplace=True` there is no gradient buffer either."
    for dtype in settings.dtypes:
        native, copy = lines.get((dtype, "backward", "native")), lines[dtype, "copy", "copy"]
        if native and native["gb_per_s"]:
            notes.append(
                f"{dtype}: {number(native['gb_per_s'])} GB/s of the 3·N·V elements that have to "
                f"move, {native['share_of_copy']:.0%} of a copy ({number(copy['gb_per_s'])} GB/s)."
            )
        others = [lines.get((dtype, "backward", name)) for name in OTHER_DIVERGENCES]
        times = [line["ms"] for line in others if line and line["ms"]]
        if times:
            notes[-1] += f" The other divergences: {number(min(times))} to {number(max(times))} ms."
    for threads, more in tiny.items():
        notes.append(
            f"A call on {TINY_ROWS} × {TINY_VOCAB} logits, {on(threads)}: {abs(more['us']):.0f} µs "
            f"{'more' if more['us'] > 0 else 'less'} than PyTorch."
        )
    return harness.markdown_table(header, table) + "\n\n" + "\n".join(notes)


# The command


def parse(argv):
    parser = argparse.ArgumentParser(
        description="kd_loss on dense logits: correctness, time and memory against PyTorch.",
        epilog="Without options the run is the published one, and goes to benchmarks/results; "
        "what another run measures is written only where --out says.",
    )
    parser.add_argument("--rows", type=int, help=f"N, {ROWS} by default")
    parser.add_argument("--vocab", type=int, help=f"V, {VOCAB} by default")
    parser.add_argument("--threads", type=int, help=f"{THREADS} by default")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS} by default")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="all by default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="all by default")
    parser.add_argument("--out", metavar="DIR", help="write CSV, JSON and Markdown to this folder")
    parser.add_argument(
        "--quick", action="store_true", help="seconds: a tiny problem, no compiler, no memory"
    )
    args = parser.parse_args(argv)
    quick = args.quick
    args.rows = args.rows or (QUICK_ROWS if quick else ROWS)
    args.vocab = args.vocab or (QUICK_VOCAB if quick else VOCAB)
    args.threads = args.threads or (QUICK_THREADS if quick else THREADS)
    args.rounds = args.rounds or (QUICK_ROUNDS if quick else ROUNDS)
    args.variants = args.variants or (QUICK_VARIANTS if quick else list(VARIANTS))
    args.parts = args.parts or [part for part in PARTS if not (quick and part == "memory")]
    published = [ROWS, VOCAB, THREADS, list(DTYPES), list(VARIANTS), list(PARTS)]
    chosen = [args.rows, args.vocab, args.threads, args.dtypes, args.variants, args.parts]
    if args.out is None and chosen == published and args.rounds >= ROUNDS:
        args.out = harness.RESULTS
    return args


def main(argv=None):
    settings = parse(argv)
    torch.set_num_threads(settings.threads)
    machine = harness.machine()
    records = []
    for dtype in settings.dtypes:
        records += measure(dtype, settings)
    tiny = {}
    if "tiny" in settings.parts:
        rounds = QUICK_ROUNDS if settings.quick else TINY_ROUNDS
        for threads in sorted({1, settings.threads}):
            lines, difference = measure_tiny(threads, rounds)
            records += lines
            if difference:
                tiny[threads] = difference
    harness.say("done")
    print(", ".join(f"{name}: {value}" for name, value in machine.items()))
    print(f"\n{report(records, tiny)}")

    if settings.out is not None:
        chosen = {name: value for name, value in vars(settings).items() if name != "out"}
        document = {
            "question": "dense",
            "machine": machine,
            "settings": {**chosen, "temperature": TEMPERATURE, "alpha": ALPHA},
            "tiny_us_more_than_pytorch": tiny,
            "rows": records,
        }
        name = f"dense-{harness.slug(machine['cpu'])}"
        harness.write(settings.out, name, document, readme(records, tiny, settings, machine))
        print(f"\nwritten: {name}.csv, .json and .md")
    return int(any(line["status"].startswith("wrong") for line in records))


if __name__ == "__main__":
    sys.exit(main())
