"""`python -m kdkernels bench cache`: arguments -> records -> tables, a picture and files.

Exit codes: 0 done, 2 a wrong argument, or a package that is missing.
"""

import argparse
import platform
from dataclasses import asdict, replace
from pathlib import Path

from .. import results
from ..arguments import positive
from ..measure import say
from ..peers.base import Missing
from ..report import text_table
from . import pages, speed, students

PARTS = {
    "speed": "bytes a token, and tokens a second written and read by one thread",
    "students": "what students learn from caches of equally many bytes, on the preset `text`",
}
PACKAGES = "numpy", "zstandard", "transformers", "mistral-common"


def main(argv=None):
    """argv: the arguments after `bench cache` -> the exit code.

    Raises:
        SystemExit: code 2 after a wrong argument, code 0 after --help.
    """
    parser = make_parser()
    options = parser.parse_args(argv)
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"unknown part {name}: expected {' or '.join(PARTS)}")
    machine = results.machine()
    machine["packages"] = {
        "Python": platform.python_version(),
        "torch": machine["packages"]["torch"],
        **results.versions(*PACKAGES),
    }
    missing = [name for name in PACKAGES if machine["packages"][name] is None]
    if missing:
        parser.error(f"{missing[0]} is missing: pip install 'kdkernels[train,cache]'")
    for name in options.parts or PARTS:
        settings, some = chosen(name, options)
        document = {"suite": f"cache-{name}", "machine": machine, "settings": asdict(settings)}
        document.update(speed.run(settings) if name == "speed" else students.run(settings))
        print(f"\n{in_words(document)}\n")
        if options.out is not None:
            parts = [document["suite"], *(["some"] if some else [])]
            file = results.file_name(machine, *parts)
            publish(options.out, file, document, pictures=True)
            print(f"written: {options.out}/{file}.*")
    say("done")
    return 0


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels bench cache",
        description="The teacher cache: its size, its speed, and what students learn from it.",
    )
    add = parser.add_argument
    what = "; ".join(f"{name}: {text}" for name, text in PARTS.items())
    add("parts", nargs="*", metavar="PART", help=f"{what}; default: both")
    budgets = students.Settings.budgets
    add("--budgets", type=positive, nargs="+", metavar="BYTES", help=f"a token; default: {budgets}")
    add("--seeds", type=positive, metavar="N", help=f"default: {students.Settings.seeds}")
    alphas = students.Settings.alphas
    share = dict(type=share_of_one, nargs="+", metavar="A")
    add("--alphas", **share, help=f"of soft targets; default: {alphas}")
    add("--quick", action="store_true", help="seconds: tiny")
    add("--out", metavar="DIR", help="write CSV, JSON, Markdown and SVG there")
    return parser


def share_of_one(text):
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError
    return value


def chosen(name, options):
    """-> settings of a part, whether they are others than the published ones"""
    settings = {"speed": speed, "students": students}[name].Settings()
    published = settings
    if options.quick:
        settings = settings.small()
    if name == "students":
        asked = dict(budgets=options.budgets, alphas=options.alphas)
        asked = {key: tuple(x) for key, x in asked.items() if x is not None}
        settings = replace(settings, **asked, seeds=options.seeds or settings.seeds)
    return settings, settings != published


def in_words(document):
    """What a run found, for a terminal."""
    if document["suite"] == "cache-speed":
        return "\n\n".join(text_table(*each) for each in pages.speed_tables(document))
    rows = pages.student_rows(document["rows"])
    return text_table(pages.STUDENT_HEADER, [[x.replace("**", "*") for x in row] for row in rows])


def publish(folder, name, document, pictures=False):
    """Write the files of a run: what it measured, its page and its picture."""
    of_speed = document["suite"] == "cache-speed"
    page = pages.speed_page if of_speed else pages.student_page
    results.write(folder, name, document, {"summary": page(document)})
    if pictures and not of_speed:
        try:
            pages.student_picture(document["rows"], Path(folder, f"{name}.svg"))
        except Missing as why:
            say(str(why))
