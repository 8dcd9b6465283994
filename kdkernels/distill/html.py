"""`report.html`: one page of a run's folder that can be sent to somebody.

It needs no network and runs nothing: pictures are in it, and its policy forbids the rest. Jinja2
comes with PyTorch; it escapes every text, for names come from users.
"""

import base64
import datetime
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import atomic
from . import report

WANTED = {"title": str, "comparison": list, "options": dict, "curves": list, "notes": list}
CURVE = {"name": str, "steps": list, "values": list, "ylabel": str}
CURVES = "learning_curves.png"

# key of a comparison: heading, how a number is written, and which is best
COLUMNS: dict[str, tuple[str, str, Callable[..., Any] | None]] = {
    "name": ("model", "{}", None),
    "targets": ("targets", "{}", None),
    "accuracy": ("accuracy (%)", "{:.2%}", max),
    "errors": ("errors", "{:,.4g}", min),
    "cross_entropy": ("cross-entropy (nats)", "{:.4f}", min),
    "perplexity": ("perplexity", "{:,.4g}", min),
    "agreement": ("agreement with the teacher (%)", "{:.2%}", max),
    "calibration_error": ("calibration error (%)", "{:.2%}", min),
    "parameters": ("parameters", "{:,.0f}", min),
    "bytes": ("size (MB)", "{:,.3f}", min),
    "latency_ms": ("latency (ms)", "{:.3g}", min),
    "speed_up": ("speed-up (times)", "{:.3g}", max),
    "peak_mb": ("peak memory (MB)", "{:,.1f}", min),
}


def write(folder: Path | str) -> Path:
    """Writes `report.html` of a run into its folder -> its path.

    It shows `results.json` and every PNG picture that lies beside it; where `learning_curves.png`
    is not among those, the curves are drawn.

    Args:
        folder: with a `results.json` that has "title", a text; "comparison", a list of dicts, one a
            model, with the keys of `COLUMNS` (shares, not per cent; bytes) or others, None where
            there is no value; "options", a dict; "curves", a list of dicts of "name", "steps",
            "values" and "ylabel"; "notes", a list of texts. And where it is known: "pictures",
            {file: what is seen in it}; "versions", {package: version}; "finished", a date.

    Raises:
        ValueError: there is no such file, or one of another form: the text says what was wanted.
        ImportError: matplotlib is missing (the extra `train`), where curves are to be drawn.
    """
    import jinja2

    folder = Path(folder)
    results = _read(folder / "results.json")
    template = resources.files(__package__).joinpath("templates/report.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    modified = datetime.datetime.fromtimestamp((folder / "results.json").stat().st_mtime)
    page = environment.from_string(template).render(
        title=results["title"],
        notes=results["notes"],
        comparison=_table(results["comparison"]),
        pictures=_pictures(folder, results),
        options=[(name, _text(value)) for name, value in results["options"].items()],
        finished=results.get("finished") or f"{modified:%Y-%m-%d %H:%M}",
        versions=_dict(results.get("versions")) or {"kdkernels": __version__},
    )
    with atomic(folder / "report.html") as file:
        file.write(page.encode("utf-8", "replace"))  # JSON can hold halves of characters
    return folder / "report.html"


def _read(path: Path) -> dict[str, Any]:
    """results.json, with what the page needs in it."""
    try:
        results: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"folder must have a results.json, got {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    _check(path, "results", results, WANTED)
    for position, line in enumerate(results["comparison"]):
        _check(path, f"comparison[{position}]", line, {})
    for position, curve in enumerate(results["curves"]):
        name = f"curves[{position}]"
        _check(path, name, curve, CURVE)
        if len(curve["steps"]) != len(curve["values"]) or not all(
            isinstance(x, (int, float)) for x in curve["steps"] + curve["values"]
        ):
            raise ValueError(f"{path}: {name} must have a number in values for each in steps")
    return results


def _check(path: Path, name: str, found: Any, wanted: dict[str, Any]) -> None:
    """Raises where it is no dict that has these keys with values of these types."""
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {name} must be an object, got {type(found).__name__}")
    for key, kind in wanted.items():
        if not isinstance(found.get(key), kind):
            got = f"got {type(found[key]).__name__}" if key in found else "it is missing"
            raise ValueError(f"{path}: {name} must have {key!r}, a {kind.__name__}, {got}")


def _table(comparison: list[dict[str, Any]]) -> tuple[list[str], list[Any]]:
    """-> headings and rows of (text, whether it is the best of its column)."""
    used = [key for line in comparison for key in line if line[key] is not None]
    known = [key for key in COLUMNS if key in used]
    headings, columns = [], []
    for key in dict.fromkeys(known + used):
        heading, form, choose = COLUMNS.get(key, (key.replace("_", " "), "{:,.4g}", None))
        headings.append(heading)
        values: list[Any] = [line.get(key) for line in comparison]
        numbers: set[Any] = {x for x in values if _is_number(x) and math.isfinite(x)}
        best = choose(numbers) if choose and len(numbers) > 1 else None
        scale = 1e-6 if key == "bytes" else 1
        columns.append(
            [
                (form.format(scale * x).rstrip("%") if _is_number(x) else _text(x), x == best)
                if x is not None
                else ("–", False)
                for x in values
            ]
        )
    return headings, list(zip(*columns, strict=True))


def _pictures(folder: Path, results: dict[str, Any]) -> list[tuple[str, str]]:
    """(what is seen, the PNG file in base64) of each picture."""
    said = _dict(results.get("pictures"))
    found = []
    for path in sorted(folder.glob("*.png")):
        text = said.get(path.name) or path.stem.replace("_", " ")
        found.append((text, _base64(path)))
    if not (folder / CURVES).exists():
        found += _drawn(results["curves"])
    return found


def _drawn(curves: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """The curves, a picture for each of their units."""
    for ylabel in dict.fromkeys(curve["ylabel"] for curve in curves):
        mine = [curve for curve in curves if curve["ylabel"] == ylabel and curve["steps"]]
        if not mine:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / CURVES
            lines = [(curve["name"], curve["steps"], curve["values"]) for curve in mine]
            report.plot_curves(path, [("", lines)], ylabel, "Learning curves")
            ends = [f"{name} {y[-1]:.4g} after {x[-1]:g} steps" for name, x, y in lines]
            yield f"learning curves, {ylabel}: {'; '.join(ends)}", _base64(path)


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _dict(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _text(value: object) -> str:
    """A value as people write it: text as it is, lists with commas."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(_text(each) for each in value)
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value is None else json.dumps(value, ensure_ascii=False)
