"""The command line: `python -m kdkernels distill`, `bench` and `info`.

Exit codes: 0 done, 1 what `bench` found wrong, 2 a wrong argument or file (one line on stderr says
which), 130 interrupted.
"""

import argparse
import importlib
import sys
from pathlib import Path

from . import info
from .distill import digits, digits_demo


def main(argv=None):
    """Runs a command; argv: the arguments without the program's name -> the exit code.

    Raises:
        SystemExit: code 2 after a wrong argument, code 0 after --help.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels", description="Knowledge distillation: the loss and the loop."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_distill(commands)
    # Its arguments are those of benchmarks/command.py, help included.
    commands.add_parser(
        "bench", help="measure losses: correctness, time and memory", add_help=False
    ).set_defaults(run=_bench)
    commands.add_parser(
        "info", help="print what was built, what is usable now and why the rest is not"
    ).set_defaults(run=_info)
    arguments, others = parser.parse_known_args(argv)
    if arguments.command == "bench":
        arguments.others = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return 130


def _add_distill(commands):
    distill = commands.add_parser(
        "distill",
        help="train a teacher and distil it into students",
        description=f"Trains a teacher on {digits.TRAINING:,} handwritten digits, then students on "
        "few of them, with hard labels and with the teacher's soft targets, and compares them on "
        "797 test images. Prints tables, writes pictures and results.json.",
    )
    add = distill.add_argument
    add("--preset", choices=["digits"], default="digits", help="data and models; default: digits")
    add("--out", metavar="DIR", default="runs/digits", help="for the results; default: %(default)s")
    add(
        "--sizes",
        metavar="N",
        type=int,
        nargs="+",
        default=digits.SIZES,
        help=f"labelled images that students see; default: {_spaced(digits.SIZES)}",
    )
    add(
        "--temperatures",
        metavar="T",
        type=float,
        nargs="+",
        default=digits.TEMPERATURES,
        help=f"of the soft targets; default: {_spaced(digits.TEMPERATURES)}",
    )
    add(
        "--seeds",
        metavar="N",
        type=int,
        default=digits.SEEDS,
        help="students for each size and target; default: %(default)s",
    )
    add(
        "--steps",
        metavar="N",
        type=int,
        default=digits.STEPS,
        help="optimiser steps of every network; default: %(default)s",
    )
    add(
        "--teacher-logits",
        metavar="FILE.npy",
        help="the teacher's logits for the training images, "
        f"({digits.TRAINING}, {digits.CLASSES}): used instead of a teacher where the file exists, "
        "written where it does not",
    )
    add("--backend", metavar="NAME", help="of the loss; default: the fastest that is usable")
    distill.set_defaults(run=_distill)


def _spaced(numbers):
    return " ".join(f"{each:g}" for each in numbers)


def _distill(arguments):
    try:
        demo = digits_demo.Demo(
            arguments.out,
            sizes=arguments.sizes,
            temperatures=arguments.temperatures,
            seeds=arguments.seeds,
            steps=arguments.steps,
            teacher_logits=arguments.teacher_logits,
            backend=arguments.backend,
        )
    except (TypeError, ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"python -m kdkernels distill: error: {error}", file=sys.stderr)
        return 2
    demo.run()
    return 0


def _bench(arguments):
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "command.py").is_file():
        print(
            "python -m kdkernels bench: error: the benchmarks come with the source, not with the "
            f"installed package, and {root} has none: run it in a checkout of kdkernels",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.command").main(arguments.others)


def _info(arguments):
    info.main()
    return 0
