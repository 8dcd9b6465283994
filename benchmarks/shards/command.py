"""`python -m kdkernels bench shards`: the model's tables, and a simulation that checks them.

Exit codes: 0 done, 1 what was counted is not what the model says, or a loss or gradient is wrong,
2 a wrong argument, or no compiled operators.
"""

import argparse
import platform
from dataclasses import asdict, replace

import torch

from kdkernels.backends import native

from .. import results
from ..arguments import positive
from ..devices import Gpu
from ..measure import say
from ..report import text_table
from . import pages, simulation

SUITE = "shards"


def main(argv=None):
    """argv: the arguments after `bench shards` -> the exit code.

    Raises:
        SystemExit: code 2 after a wrong argument, code 0 after --help.
    """
    parser = make_parser()
    options = parser.parse_args(argv)
    gpus = torch.cuda.device_count()
    if options.device == "cuda" and gpus < 2:
        print(f"skipped: ranks over NCCL take a GPU each, two at least, and there are {gpus}")
        return 0
    # The eager operators differentiate inside of themselves, which no dispatch mode allows.
    if reason := native.unavailable(options.device):
        parser.error(f"the compiled operators are missing: {reason}")
    settings, some = chosen(options, gpus)
    if any(settings.rows % ranks or settings.vocab % ranks for ranks in settings.ranks):
        parser.error("--rows and --vocab must be multiples of all --ranks")
    for title, header, rows in pages.tables():
        print(f"\n{title}\n{text_table(header, rows)}")
    print("", *pages.crossovers(), sep="\n")
    say(f"simulation: {max(settings.ranks)} processes")
    machine = results.machine()
    if settings.device == "cuda":
        machine.update(Gpu().facts())
    machine["packages"] = {
        "Python": platform.python_version(),
        "torch": machine["packages"]["torch"],
    }
    records = simulation.run(settings)
    document = {
        "suite": SUITE,
        "machine": machine,
        "settings": asdict(settings),
        "rows": records,
    }
    print(f"\n{text_table(pages.CHECK_HEADER, pages.check_rows(records))}\n")
    if options.out is not None:
        file = results.file_name(machine, SUITE, *(["some"] if some else []))
        publish(options.out, file, document)
        print(f"written: {options.out}/{file}.*")
    found = [(line, pages.wrong(line)) for line in records]
    for line, what in found:
        if what is not None:
            say(f"{line['way']}, {line['ranks']} ranks, {line['dtype']}: {what}")
    say("done")
    return int(any(what for _, what in found))


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels bench shards",
        description="Logits sharded over the vocabulary: bytes communicated and memory of a rank, "
        "by a model, and counted in processes of this machine.",
    )
    add = parser.add_argument
    published = simulation.Settings()
    add("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: a GPU for each rank, NCCL")
    add("--rows", type=positive, metavar="N", help=f"of the simulation; default: {published.rows}")
    add("--vocab", type=positive, metavar="V", help=f"default: {published.vocab}")
    ranks = dict(type=positive, nargs="+", metavar="R")
    add("--ranks", **ranks, help=f"default: {' '.join(map(str, published.ranks))}")
    add("--quick", action="store_true", help="seconds: tiny, two processes")
    add("--out", metavar="DIR", help="write CSV, JSON and Markdown there")
    return parser


def chosen(options, gpus=0):
    """-> settings, whether they are others than the published ones"""
    published = simulation.Settings()
    if options.device == "cuda":
        ranks = tuple(x for x in published.ranks if x <= gpus)
        published = replace(published, device="cuda", ranks=ranks)
    settings = published.small() if options.quick else published
    asked = {name: getattr(options, name) for name in ("rows", "vocab", "ranks")}
    settings = replace(settings, **{name: x for name, x in asked.items() if x is not None})
    settings = replace(settings, ranks=tuple(settings.ranks))
    return settings, settings != published


def publish(folder, name, document):
    """Write the files of a run: what it counted, and the pages."""
    check = {"model": pages.model_page(), "check": pages.check_page(document)}
    results.write(folder, name, document, check)
