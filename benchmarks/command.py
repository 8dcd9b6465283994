"""`python -m kdkernels bench`: arguments -> cases -> records -> tables, pictures and files."""

import argparse
import itertools
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch

from kdkernels.objective import DIVERGENCES

from . import measure, plots, report, results, scaling, targets
from .arguments import positive
from .cache import command as cache
from .case import DTYPES
from .devices import DEVICES
from .peers.base import Missing
from .shards import command as shards
from .suites import PUBLISHED, SUITES

ROUNDS = 5
PATIENCE = {"cpu": 15.0, "cuda": 0.5}
SIZES = ("rows", "vocab", "hidden", "k", "tail", "threads")
OBJECTIVE = ("dtype", "divergence", "temperature", "alpha")
ELSEWHERE = ("out", "include", "list")  # options that change no number, and may name a folder
SCALES = ("rows", "vocab", "k", "threads")


def parser():
    found = argparse.ArgumentParser(
        prog="python -m kdkernels bench",
        description="Distillation losses: correctness, time and memory, kdkernels next to "
        "everybody else who is installed. Every variant is compared with the float64 definition "
        "before it is timed, and all of a case are timed in turns.",
        epilog="Exit status: 0; 1 if kdkernels is wrong somewhere; 2 for a wrong argument, or "
        "--device cuda without a GPU. benchmarks/README.md says how to read the tables. "
        "`bench stages --help`: the parts of a kernel, one by one. `bench cache --help`: a teacher "
        "on disk. `bench shards --help`: a vocabulary on many devices.",
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
        help="no run: write the pages of results/ anew, and what these include of them",
    )
    return found


def some_of(names):
    """Options of an argument that takes some of these."""
    return dict(nargs="+", choices=tuple(names), metavar="NAME", help=f"of {', '.join(names)}")


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
    if argv[:1] == ["cache"]:
        return cache.main(argv[1:])
    if argv[:1] == ["shards"]:
        return shards.main(argv[1:])
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
    """The pages of all result files, and then what other pages include of them."""
    for path in sorted(results.FOLDER.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        suite = document["suite"].partition("-")[0]
        write = {"cache": cache.publish, "shards": shards.publish}.get(suite, publish)
        write(results.FOLDER, path.stem, document)
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
        raise ValueError(
            f"unknown suite {unknown[0]}: expected {', '.join(SUITES)}, stages, cache or shards"
        )
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
        for reason in dict.fromkeys(map(str, dropped)):
            measure.say(f"{suite}, left out: {reason}")
        if settings.scale:
            one_series(wanted, settings.scale)
        plan[suite] = {case: variants(case, names, settings) for case, names in wanted.items()}
    if settings.variants:
        known = {name for suite in SUITES.values() for name in suite.variants}
        missing = [name for name in settings.variants if name not in known]
        if missing:
            raise ValueError(
                f"--variants {missing[0]}: expected some of {', '.join(sorted(known))}"
            )
    return plan


def one_series(cases, axis):
    """Raises ValueError where more than one size is varied, or none."""
    others = {replace(case, **{axis: getattr(next(iter(cases)), axis)}) for case in cases}
    if len(others) > 1:
        raise ValueError(f"--scale {axis} varies one size: name one dtype, divergence, … at a time")
    if len(cases) < 2:
        raise ValueError(f"--scale {axis}: one size alone has no exponent")


def changed(case, settings, dropped):
    """A case with each combination of what was asked for; why there is none goes to `dropped`."""
    if settings.quick:
        case = case.small()
    if settings.loss_only:
        case = case.loss_only()
    has = {field.name for field in fields(case)}
    if case.device == "cuda":
        has.remove("threads")
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
        return [name for name in case.variants if case.is_one_of(name, settings.variants)]
    if settings.scale:
        names = [case.base, case.formula]
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

    After each case there are files of what was measured so far, named "partial": what ends a run
    early takes nothing of it, and nothing of the last whole run.
    """
    rounds = settings.rounds or (3 if settings.quick else ROUNDS)
    patience = PATIENCE[device.name] if settings.patience is None else settings.patience
    memory = not (settings.no_memory or settings.quick)
    machine, bad = results.machine(), False
    for suite, cases in plan.items():
        measuring = measure.Run(device, rounds, patience, memory)
        document = {"suite": suite, "machine": machine, "scale": settings.scale}
        chosen = {name: value for name, value in vars(settings).items() if name not in ELSEWHERE}
        document["settings"] = {**chosen, "suites": [suite], "rounds": rounds}
        document["rows"] = records = []
        parts = [suite, *([settings.scale] if settings.scale else [])]
        if narrowed(settings):
            parts.append("some")
        try:
            for case, names in cases.items():
                records += measuring.measure(case, names)
                device.release()
                # At once, while the clocks are those of the last round.
                document["machine"] = {**machine, **device.facts()}
                partial = results.file_name(document["machine"], *parts, "partial")
                if settings.out is not None and records:
                    publish(settings.out, partial, document)
        finally:
            if records:
                print(f"{in_words(document)}\n")
        if settings.out is not None and records:
            name = results.file_name(document["machine"], *parts)
            publish(settings.out, name, document, pictures=True)
            results.remove(settings.out, partial)
            print(f"written: {settings.out}/{name}.*\n")
        ours = [line["status"] for line in records if line["ours"]]
        bad |= any(status.startswith(("wrong", "failed")) for status in ours)
    measure.say("done")
    return int(bad)


def narrowed(settings):
    """Whether it is not the published cases: their files are not to be replaced."""
    cases = (*SIZES, *OBJECTIVE, "variants", "loss_only", "quick")
    return any(getattr(settings, name) for name in cases)


def judged(document):
    """The targets of a run, which is none of several sizes."""
    if document["scale"]:
        return []
    return targets.judge(document["rows"], document["machine"].get("gpu", ""))


def in_words(document):
    """What a run measured, for a terminal."""
    records, machine, field = (document[part] for part in ("rows", "machine", "scale"))
    if field:
        tables = scaling.terminal(records, field, scaling.fits(records, field))
    else:
        tables = report.terminal(records, judged(document))
    return f"{report.provenance(machine)}\n\n{tables}"


def publish(folder, name, document, pictures=False):
    """Write the files of a run: what it measured, and its pages."""
    records, machine, field = (document[part] for part in ("rows", "machine", "scale"))
    rounds = document["settings"]["rounds"]
    if field:
        document["fits"] = found = scaling.fits(records, field)
        pages = {"summary": scaling.page(records, field, found, machine)}
    else:
        document["targets"] = found = judged(document)
        table = report.markdown_table(report.TARGET_HEADER, report.target_rows(found, records))
        pages = {
            "all": report.page(records, found, machine, rounds),
            "summary": report.summary(records, machine, rounds),
            "targets": table,
        }
    results.write(folder, name, document, pages)
    if not pictures:
        return
    base = Path(folder, name)
    if field:
        picture(plots.over, records, field, "ms", f"{base}.time.svg")
        picture(plots.over, records, field, "peak_mb", f"{base}.memory.svg")
    else:
        ceiling = machine.get("special_g_per_s")
        picture(plots.roofline, records, f"{base}.roofline.svg", ceiling)


def picture(draw, *args):
    try:
        draw(*args)
    except Missing as why:
        measure.say(str(why))
