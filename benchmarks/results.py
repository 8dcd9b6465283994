"""What a run leaves: CSV and JSON with the machine, versions and commit in them, pages, and the
tables that other pages include word for word."""

import csv
import datetime
import importlib.metadata
import io
import json
import math
import re
import subprocess
from pathlib import Path

import torch

import kdkernels
from kdkernels.backends import native
from kdkernels.info import info

from .peers import PACKAGES

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
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
    """With "-dirty" where another file than a result differs from it."""
    git = ["git", "--no-optional-locks"]
    try:
        name = subprocess.run(
            [*git, "describe", "--always", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
        )
        others = [*git, "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"]
        dirty = subprocess.run(others, cwd=ROOT, capture_output=True).returncode == 1
    except OSError:
        return "unknown"
    return (name.stdout.strip() or "unknown") + ("-dirty" if dirty else "")


def slug(name):
    """A file name for a processor: 'Intel(R) Xeon(R) …' -> 'intel-xeon-…'."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def file_name(machine, *parts):
    return "-".join([*parts, slug(machine.get("gpu") or machine["cpu"])])


def write(folder, name, document, pages):
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
    files = {"csv": text.getvalue(), "json": json.dumps(finite(document), indent=1) + "\n"}
    files.update((f"{page}.md", f"{content}\n") for page, content in pages.items())
    for ending, content in files.items():
        path = folder / f"{name}.{ending}"
        whole = path.with_suffix(path.suffix + ".new")
        whole.write_text(content, encoding="utf-8")
        whole.replace(path)  # never half of it


def finite(value):
    """JSON has neither NaN nor infinities: None, and the status of the line says it."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remove(folder, name):
    for path in Path(folder).glob(f"{name}.*"):
        path.unlink()


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
