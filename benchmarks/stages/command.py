"""`python -m kdkernels bench stages`: times the stages of a pass in turns and prints a table.

Exit codes: 0 done, 2 a wrong argument, or the stages cannot be compiled or run here.
"""

import argparse
import statistics
import sys
from functools import partial
from types import SimpleNamespace

import torch

from kdkernels.objective import DIVERGENCES

from ..arguments import positive
from ..case import DTYPES
from ..devices import Cpu, Gpu
from ..report import text_table
from ..suites.dense import Dense
from .library import STAGES, Passes, Unavailable, build, stages_of

HEADER = ("", "ms", "min", "max", "ns/element", "GB/s", "% of full", "% of copy")


def main(argv=None):
    """argv: the arguments without the program's name -> the exit code.

    Raises:
        SystemExit: code 2 after a wrong argument, code 0 after --help.
    """
    parser = make_parser()
    options = parser.parse_args(argv)
    known = stages_of(options.device)
    for name in options.stages or ():
        if name not in known:
            parser.error(f"unknown stage {name!r} on {options.device}; known: {', '.join(known)}")
    names = list(dict.fromkeys(options.stages or known))
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise Unavailable("the stages on a GPU need one: torch sees no CUDA device")
        libraries = build(options.device, options.divergence)
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 2
    for dtype in options.dtypes:
        for vocab in options.vocabs:
            case = Dense(
                options.device,
                dtype,
                options.rows,
                vocab,
                divergence=options.divergence,
                temperature=options.temperature,
                backward=False,
                threads=options.threads,
            )
            print(f"\n{case.shape}, {dtype}, {case.with_gradient().objective}, {case.where}")
            taken = measure(case, libraries, names, options.rounds)
            print(text_table(HEADER, table(taken, case)))
    return 0


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels bench stages",
        description="Where the time of a pass over dense rows goes: the product's kernels, and "
        "what is left of them without some of their work. benchmarks/stages/README.md says more.",
    )
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    every = "; ".join(f"{name}: {stage.what}" for name, stage in STAGES.items())
    add("--stages", nargs="+", metavar="STAGE", help=f"default: all; {every}".replace("%", "%%"))
    add("--rows", type=positive, default=256, metavar="N", help="default: %(default)s")
    add("--vocabs", type=positive, nargs="+", default=[128256], metavar="V", help="default: 128256")
    dtypes = ["float32", "bfloat16"]
    add("--dtypes", nargs="+", choices=list(DTYPES), default=dtypes, help=f"default: {dtypes}")
    add("--rounds", type=positive, default=9, metavar="R", help="default: %(default)s")
    add("--divergence", choices=DIVERGENCES, default="forward_kl")
    add("--temperature", type=float, default=2.0, metavar="T", help="default: %(default)s")
    threads = torch.get_num_threads()
    add("--threads", type=positive, default=threads, help="of a CPU; default: those of torch")
    return parser


def measure(case, libraries, names, rounds):
    """{stage: seconds of each round}, the stages in turns; a call of each before is not counted."""
    x = case.draw()
    passes = Passes(
        libraries,
        x.student,
        x.teacher,
        x.labels,
        divergence=case.divergence,
        temperature=case.temperature,
        threads=case.threads,
    )
    device = Gpu() if case.device == "cuda" else Cpu()
    steps = {name: SimpleNamespace(run=partial(passes.run, name)) for name in names}
    for step in steps.values():
        device.seconds(step)
    taken = {name: [] for name in names}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name].append(device.seconds(step))
    return taken


def table(taken, case):
    """Rows of HEADER, as text. Shares are taken within each round."""
    speeds = {
        name: [moved(name, case) / seconds for seconds in rounds] for name, rounds in taken.items()
    }
    rows = []
    for name, rounds in taken.items():
        milliseconds = [1e3 * seconds for seconds in rounds]
        median = statistics.median(rounds)
        rows.append(
            [
                name,
                *(f"{f(milliseconds):.3f}" for f in (statistics.median, min, max)),
                f"{1e9 * median / (case.rows * case.vocab):.4f}",
                f"{statistics.median(speeds[name]) / 1e9:.2f}",
                share(rounds, taken.get("full")),
                share(speeds[name], speeds.get("copy")),
            ]
        )
    return rows


def moved(name, case):
    """Bytes that have to come from memory and go there."""
    return (STAGES[name].reads + STAGES[name].writes) * case.matrix


def share(values, whole):
    """The median of the ratios in per cent; nothing where there is no whole."""
    if whole is None:
        return ""
    return f"{100 * statistics.median(x / y for x, y in zip(values, whole, strict=True)):.1f}"
