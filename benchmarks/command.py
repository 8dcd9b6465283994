"""`python -m kdkernels bench`: arguments -> cases -> records -> tables, pictures and files."""

import argparse
import itertools
import sys
from dataclasses import fields, replace

import torch

from kdkernels.objective import DIVERGENCES

from . import measure, plots, report, results, scaling, targets
from .case import DTYPES
from .devices import DEVICES
from .peers.base import Missing
from .suites import PUBLISHED, SUITES

ROUNDS = 5
PATIENCE = {"cpu": 15.0, "cuda": 0.5}
SIZES = ("rows", "vocab", "hidden", "k", "tail", "threads")
OBJECTIVE = ("dtype", "divergence", "temperature", "alpha")
SCALES = ("rows", "vocab", "k", "threads")


def parser():
    found = argparse.ArgumentParser(
        prog="python -m kdkernels bench",
        description="Distillation losses: correctness, time and memory, kdkernels next to "
        "everybody else who is installed. Every variant is compared with the float64 definition "
        "before it is timed, and all of a case are timed in turns.",
        epilog="Exit status: 0; 1 if kdkernels is wrong somewhere; 2 for a wrong argument, or "
        "--device cuda without a GPU. benchmarks/README.md says how to read the tables. "
        "`bench stages --help`: the parts of a kernel, one by one.",
    )
    add = found.add_argument
    add("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all")
    add("--device", choices=DEVICES, help="default: cuda where there is a GPU, else cpu")
    sizes = found.add_argument_group("what is measured (default: the published cases)")
    many = dict(nargs="+", metavar="N", type=positive)
    sizes.add_argument("--rows", **many, help="tokens")
    sizes.add_argument("--vocab", **many, help="classes")
    sizes.add_argument("--hidden", **many, help="width of hidden states (linear, loop)")
    sizes.add_argument("--k", **many, help="classes of the teacher that are known (sparse)")
    sizes.add_argument("--tail", **some_of(("bucket", "renormalize", "sampled")))
    sizes.add_argument("--threads", **many, help="of the CPU; default: all")
    sizes.add_argument("--dtypes", dest="dtype", **some_of(DTYPES))
    sizes.add_argument("--divergences", dest="divergence", **some_of(DIVERGENCES))
    sizes.add_argument(
        "--temperatures", dest="temperature", nargs="+", type=temperature, metavar="T"
    )
    sizes.add_argument("--alphas", dest="alpha", nargs="+", type=share, metavar="A")
    sizes.add_argument("--loss-only", action="store_true", help="without the gradient")
    sizes.add_argument(
        "--scale",
        choices=SCALES,
        help="vary one size (those that its option names), fit an exponent",
    )
    how = found.add_argument_group("how")
    how.add_argument("--variants", nargs="+", metavar="NAME", help="default: all; --list has them")
    how.add_argument("--rounds", type=positive, help=f"at least; default: {ROUNDS}")
    how.add_argument(
        "--patience",
        type=float,
        metavar="SECONDS",
        help="what takes longer is called once; default: 15, on a GPU 0.5",
    )
    how.add_argument("--no-memory", action="store_true", help="no peaks (a process for each)")
    how.add_argument("--quick", action="store_true", help="seconds: tiny, no compiler, no memory")
    how.add_argument("--list", action="store_true", help="print cases and variants, measure none")
    how.add_argument("--out", metavar="DIR", help="write CSV, JSON, Markdown and SVG there")
    how.add_argument(
        "--include",
        nargs="+",
        metavar="PAGE",
        help="no run: bring the tables that these Markdown pages include up to date",
    )
    return found


def some_of(names):
    """Options of an argument that takes some of these."""
    return dict(nargs="+", choices=tuple(names), metavar="NAME", help=f"of {', '.join(names)}")


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


def temperature(text):
    value = float(text)
    if not 2.0**-20 <= value <= 2.0**20:
        raise argparse.ArgumentTypeError(f"{text}: expected a temperature from 2^-20 to 2^20")
    return value


def share(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a weight from 0 to 1")
    return value


def main(argv=None):
    """argv: the arguments after `bench` -> the exit status."""
    if argv is None:
        argv = sys.argv[1:]
    if argv[:1] == ["stages"]:
        from .stages.command import main as stages

        return stages(argv[1:])
    command = parser()
    settings = command.parse_args(argv)
    try:
        if settings.include:
            return update(settings.include)
        settings.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        plan = planned(settings)
    except (ValueError, OSError) as error:
        command.error(str(error))
    if settings.list:
        print(listing(plan))
        return 0
    try:
        device = DEVICES[settings.device]()
    except Missing as why:
        command.error(f"--device {settings.device}: {why}")
    return run(plan, device, settings)


def update(pages):
    for page in pages:
        text = results.include(page)
        with open(page, "w", encoding="utf-8") as file:
            file.write(text)
        print(f"up to date: {page}")
    return 0


# What to measure


def planned(settings):
    """{suite: {case: names of variants}}; raises ValueError."""
    unknown = [name for name in settings.suites if name not in SUITES]
    if unknown:
        raise ValueError(f"unknown suite {unknown[0]}: expected {', '.join(SUITES)} or stages")
    threads = max(settings.threads or [torch.get_num_threads()])
    plan = {}
    for suite in settings.suites or SUITES:
        cases, only = PUBLISHED[suite](settings.device, threads)
        if settings.scale:
            cases, only = scaling.series(cases[0], settings.scale, threads)[1], {}
        wanted, dropped = {}, []
        for case in cases:
            for each in changed(case, settings, dropped):
                names = only.get(case)
                if each in wanted and wanted[each] is None:
                    names = None
                wanted[each] = names
        if not wanted:
            raise ValueError(f"{suite}: {dropped[0]}")
        plan[suite] = {case: variants(case, names, settings) for case, names in wanted.items()}
    if settings.variants:
        known = {name for suite in plan for name in SUITES[suite].variants}
        missing = [name for name in settings.variants if name not in known]
        if missing:
            raise ValueError(
                f"--variants {missing[0]}: expected some of {', '.join(sorted(known))}"
            )
    return plan


def changed(case, settings, dropped):
    """A case with each combination of what was asked for; why there is none goes to `dropped`."""
    if settings.quick:
        case = case.small()
    if settings.loss_only:
        case = case.loss_only()
    has = {field.name for field in fields(case)}
    names = [name for name in SIZES + OBJECTIVE if getattr(settings, name) and name in has]
    found = []
    for values in itertools.product(*(getattr(settings, name) for name in names)):
        try:
            found.append(replace(case, **dict(zip(names, values, strict=True))))
        except ValueError as error:
            dropped.append(error)
    return found


def variants(case, names, settings):
    """Those of a case to measure, of those it has."""
    if settings.variants:
        return [name for name in case.variants if name in settings.variants]
    if settings.scale:
        names = scaling.DEFAULT
    known = case.variants
    if settings.quick:
        known = {name: each for name, each in known.items() if not each.compiled}
    return [name for name in known if names is None or name in names]


def listing(plan):
    blocks = []
    for suite, cases in plan.items():
        lines = [f"{case.title}: {', '.join(names)}" for case, names in cases.items()]
        titles = {
            name: SUITES[suite].variants[name].title for names in cases.values() for name in names
        }
        rows = [[name, title] for name, title in titles.items()]
        table = "\n".join(f"  {name.ljust(24)} {title}" for name, title in rows)
        blocks.append("\n".join([*lines, table]))
    return "\n\n".join(blocks)


# Measuring it


def run(plan, device, settings):
    """Measure, print and write all of a plan -> the exit status.

    Files are written after each case: what ends a run early takes nothing that was measured.
    """
    rounds = settings.rounds or (3 if settings.quick else ROUNDS)
    patience = PATIENCE[device.name] if settings.patience is None else settings.patience
    memory = not (settings.no_memory or settings.quick)
    show = scaled if settings.scale else compared
    machine, bad = results.machine(), False
    for suite, cases in plan.items():
        measuring = measure.Run(device, rounds, patience, memory)
        document = {"suite": suite, "machine": machine, "targets": []}
        document["settings"] = {**vars(settings), "suites": [suite], "rounds": rounds}
        document["rows"] = records = []
        try:
            for case, names in cases.items():
                records += measuring.measure(case, names)
                device.release()
                # At once, while the clocks are those of the last round.
                document["machine"] = {**machine, **device.facts()}
                if settings.out is not None:
                    show(document, settings, rounds)
        finally:
            if records:
                print(f"{show(document, settings, rounds)}\n")
        ours = [line["status"] for line in records if line["ours"]]
        bad |= any(status.startswith(("wrong", "failed")) for status in ours)
    measure.say("done")
    return int(bad)


def compared(document, settings, rounds):
    """The tables of a suite, as text and, where it is to be kept, in files."""
    records, machine = document["rows"], document["machine"]
    document["targets"] = judged = targets.judge(records, machine.get("gpu", ""))
    text = f"{report.provenance(machine)}\n\n{report.terminal(records, judged)}"
    if settings.out is None:
        return text
    name = results.file_name(machine, document["suite"])
    results.write(
        settings.out,
        name,
        document,
        all=report.page(records, judged, machine, rounds),
        summary=report.summary(records, machine, rounds),
        targets=report.markdown_table(report.TARGET_HEADER, report.target_rows(judged, records)),
    )
    picture(plots.roofline, records, f"{settings.out}/{name}.roofline.svg")
    return f"{text}\n\nwritten: {settings.out}/{name}.*"


def scaled(document, settings, rounds):
    """Sizes and exponents of a suite, as text and, where they are to be kept, in files."""
    records, machine, field = document["rows"], document["machine"], settings.scale
    document["fits"] = found = scaling.fits(records, field)
    tables = scaling.terminal(records, field, found)
    text = f"{report.provenance(machine)}\n\n{document['suite']}\n{tables}"
    if settings.out is None:
        return text
    name = results.file_name(machine, document["suite"], field)
    page = scaling.page(records, field, found, machine)
    results.write(settings.out, name, document, summary=page)
    for what, part in (("ms", "time"), ("peak_mb", "memory")):
        picture(plots.over, records, field, what, f"{settings.out}/{name}.{part}.svg")
    return f"{text}\n\nwritten: {settings.out}/{name}.*"


def picture(draw, *args):
    try:
        draw(*args)
    except Missing as why:
        measure.say(str(why))
