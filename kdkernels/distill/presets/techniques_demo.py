"""The demo: runs a technique on digits and shows it as a table, a picture and `results.json`."""

import json
import time
from pathlib import Path

import torch

from ...backends import registry
from ...files import atomic
from .. import checks, report
from . import digits
from .study import TEMPERATURE, Study, errors_of
from .techniques import TECHNIQUES

PICTURE = "learning_curves.png"
HEADINGS = {"cross_entropy": "nats", "agreement": "agrees", "3s recognised": "3s found"}


class Demo:
    """A technique on the digits, as `python -m kdkernels distill` runs it.

    Args:
        out: the directory to write to; made when missing.
        technique: one of `TECHNIQUES`.
        seeds: students a row, at least 1.
        steps: optimiser steps of every network, at least 1.
        backend: of the loss, as `kdkernels.kd_loss` takes it.

    Raises:
        TypeError, ValueError: arguments outside what is listed.
        RuntimeError: a backend that cannot be used here.
        OSError: a directory that cannot be made.
        ImportError: rich, matplotlib, safetensors, scipy or zstandard is missing (the extra
            `train`).
    """

    def __init__(self, out, technique, *, seeds=digits.SEEDS, steps=digits.STEPS, backend=None):
        if technique not in TECHNIQUES:
            known = ", ".join(TECHNIQUES)
            raise ValueError(f"technique must be one of {known}, got {technique!r}")
        checks.integer("seeds", seeds, low=1)
        checks.integer("steps", steps, low=1)
        registry.resolve("cpu", torch.float32, backend)
        checks.installed("rich", "matplotlib", "safetensors", "scipy", "zstandard")
        self.out, self.technique = Path(out), technique
        self.options = dict(seeds=seeds, steps=steps, backend=backend)
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self):
        """Trains, prints and writes everything -> what `results.json` holds, a dict."""
        from rich.console import Console

        started, console = time.perf_counter(), Console()
        technique = TECHNIQUES[self.technique]
        with digits.one_thread(), report.progress(console) as bar:
            study = Study(self.out, **self.options, bar=bar)
            result = technique(study)
        title = technique.__doc__.partition("\n\n")[0]
        results = {
            "title": " ".join(title.split()),
            "preset": "digits",
            "technique": self.technique,
            "options": {**self.options, "temperature": TEMPERATURE},
            "comparison": study.comparison,
            "curves": study.curves,
            "notes": [*study.notes, result],
            "result": result,
            "torch": torch.__version__,
            "seconds": time.perf_counter() - started,
        }
        _print_table(console, study)
        curves = [(each["name"], each["steps"], each["values"]) for each in study.curves]
        ylabel, title = study.curves[0]["ylabel"], f"Learning curves: {self.technique}"
        report.plot_curves(self.out / PICTURE, [("mean over seeds", curves)], ylabel, title)
        with atomic(self.out / "results.json") as file:
            file.write(json.dumps(results, indent=1).encode())
        for note in study.notes:
            print(note)
        print(f"Picture and results.json: {self.out}")
        print(result)
        return results


def _print_table(console, study):
    forms = {"cross_entropy": "{:.3f}", "agreement": "{:.1%}", "parameters": "{:,}"}
    forms |= {"3s recognised": "{:.1%}", "file bytes": "{:,}"}
    shown = [key for key in forms if any(key in row for row in study.comparison)]
    rows = []
    for row in study.comparison:
        values = [(row.get(key), forms[key]) for key in shown]
        texts = ["–" if value is None else form.format(value) for value, form in values]
        rows.append([row["name"], errors_of(row), *texts])
    report.print_table(
        console,
        f"On {len(study.test.labels)} test images (mean ± standard error of {study.seeds} seeds)",
        ["model", "errors", *(HEADINGS.get(key, key) for key in shown)],
        [rows],
    )
