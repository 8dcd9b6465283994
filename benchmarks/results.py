"""What a run leaves: CSV and JSON with the machine, versions and commit in them, pages, and the
tables that other pages include word for word."""

import csv
import datetime
import importlib.metadata
import io
import json
import re
import subprocess
from pathlib import Path

import torch

import kdkernels
from kdkernels.backends import native
from kdkernels.info import info

from .peers import PACKAGES

ROOT = Path(__file__).resolve().parent.parent
INCLUDED = re.compile(r"(<!-- from (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def machine():
    """What a number depends on that its benchmark does not choose."""
    return {
        "cpu": info()["cpu"],
        "instruction set": native._C.isa_level() if native._C else "native part not built",
        "kdkernels": kdkernels.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "packages": {"torch": torch.__version__, **versions("triton", *PACKAGES)},
    }


def versions(*packages):
    """{package: its version, or None where it is not installed}."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _commit():
    git = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        run = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def slug(name):
    """A file name for a processor: 'Intel(R) Xeon(R) …' -> 'intel-xeon-…'."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def file_name(machine, *parts):
    return "-".join([*parts, slug(machine.get("gpu") or machine["cpu"])])


def write(folder, name, document, **pages):
    """Write name.json (all of it), name.csv (its "rows", with the machine) and name.PAGE.md."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {key: value for key, value in document["machine"].items() if key != "packages"}
    flat.update(document["machine"]["packages"])
    rows = [{**row, **flat} for row in document["rows"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / f"{name}.csv").write_text(text.getvalue(), encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for page, content in pages.items():
        (folder / f"{name}.{page}.md").write_text(content + "\n", encoding="utf-8")


def include(path, root=ROOT):
    """The text of a page with what it includes brought up to date.

    Between `<!-- from FILE -->` and `<!-- end -->` stands what the file holds, word for word.

    Raises:
        FileNotFoundError: there is no such file; the text names it and the page.
    """

    def replaced(match):
        source = root / match[2]
        if not source.is_file():
            raise FileNotFoundError(f"{path} includes {match[2]}, which is not there")
        return match[1] + source.read_text(encoding="utf-8") + match[4]

    return INCLUDED.sub(replaced, Path(path).read_text(encoding="utf-8"))
