"""The demo: runs the `text` experiment and shows it as a table, a picture and `results.json`."""

import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from ... import cache
from ...backends import registry
from ...files import atomic
from ...modules import KDLoss
from ...sources import LinearHead
from .. import checks, report
from ..batches import steps_per_epoch
from ..capture import write_cache
from ..validation import compare
from . import text

CURVES, CACHE = "learning_curves.png", "teacher.cache"
PICTURED = 4  # one in so many held-out blocks is what curves are of
VALIDATION_BATCH = 16  # blocks
MEMORY_BLOCKS = 8  # in the step whose memory is measured
HARD, SOFT = "student, hard labels", "student, soft targets"


class Demo:
    """The experiment with its options, checked here and not in the middle of a run.

    Args:
        out: the directory to write to; made when missing.
        steps: optimiser steps of a student, at least 1.
        teacher_steps: those of the teacher.
        blocks: how much of the training text students see, in blocks of 64 tokens.
        temperature, alpha: of the soft targets, as `kdkernels.kd_loss` takes them.
        topk: K, the tokens that are kept of each of the teacher's predictions in a cache; from it a
            student learns at T = 1 and the same alpha.
        seed: an int: initial weights, the text that students see and its order.
        backend: of the loss, as `kdkernels.kd_loss` takes it.

    Raises:
        TypeError, ValueError: arguments outside what is listed.
        RuntimeError: a backend that cannot be used here.
        OSError: a directory that cannot be made.
        ImportError: a package of the extra `train` is missing.
    """

    def __init__(
        self,
        out,
        *,
        steps=text.STUDENT_STEPS,
        teacher_steps=text.TEACHER_STEPS,
        blocks=text.STUDENT_BLOCKS,
        temperature=text.TEMPERATURE,
        alpha=text.ALPHA,
        topk=text.TOPK,
        seed=0,
        backend=None,
    ):
        checks.integer("steps", steps, low=1)
        checks.integer("teacher_steps", teacher_steps, low=1)
        checks.integer("topk", topk, low=1, high=text.VOCABULARY)
        checks.integer("seed", seed, low=0)
        KDLoss(temperature=temperature, alpha=alpha)
        registry.resolve("cpu", torch.float32, backend)
        checks.installed("rich", "matplotlib", "transformers", "zstandard")
        self.tokenizer = text.load_tokenizer()
        self.corpus = text.load(self.tokenizer)
        checks.integer("blocks", blocks, low=1, high=len(self.corpus.train))

        self.options = dict(
            steps=steps,
            teacher_steps=teacher_steps,
            blocks=blocks,
            temperature=temperature,
            alpha=alpha,
            topk=topk,
            seed=seed,
            backend=backend,
        )
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self):
        """Trains, prints and writes everything -> what `results.json` holds, a dict."""
        from rich.console import Console

        started = time.perf_counter()
        console = Console()
        with report.progress(console) as bar:
            task = bar.add_task("memory of the loss", total=2)
            memory = self._memory(functools.partial(bar.advance, task))
            teacher, teacher_history = self._train_teacher(bar)
            students, histories = self._train_students(teacher, bar)
            task = bar.add_task("held-out text", total=1)
            rows = compare(
                students,
                teacher,
                self.corpus.test,
                shift=True,
                batch_size=VALIDATION_BATCH,
            )
            bar.advance(task)
        targets = ["hard", "hard", self._targets(), f"{self._targets(1.0)}, K = {self._topk}"]
        comparison = [{**row, "targets": each} for row, each in zip(rows, targets, strict=True)]
        curves = [
            {
                "name": name,
                "steps": history.steps,
                "values": [each.perplexity for each in history.evaluations],
                "ylabel": "held-out perplexity",
            }
            for name, history in {"teacher": teacher_history, **histories}.items()
        ]
        results = {
            "title": "Distilling a language model: what soft targets do for little text",
            "preset": "text",
            "torch": torch.__version__,
            "seconds": time.perf_counter() - started,
            "options": self.options,
            "comparison": comparison,
            "curves": curves,
            "memory": memory,
            "notes": self._notes(memory),
        }
        _print_table(console, comparison, len(self.corpus.test))
        _draw(self.out / CURVES, curves, comparison[0]["perplexity"])
        with atomic(self.out / "results.json") as file:
            file.write(json.dumps(results, indent=1).encode())

        for note in results["notes"]:
            print(note)
        print(f"Picture, results.json and {CACHE}: {self.out}")
        teacher, hard, soft, kept = (row["perplexity"] for row in comparison)
        print(
            f"Held-out perplexity: {hard:.0f} → {soft:.0f} with soft targets, {kept:.0f} with "
            f"their top {self._topk} (teacher: {teacher:.0f})"
        )
        return results

    @property
    def _topk(self):
        return self.options["topk"]

    @property
    def _few(self):
        """The text that students see."""
        return text.some_of(self.corpus.train, self.options["blocks"], self.options["seed"])

    def _training(self, name, bar, steps):
        """What all trainings share; `name` is what the progress bar says."""
        task = bar.add_task(name, total=steps)
        return dict(
            steps=steps,
            seed=self.options["seed"],
            test=text.Blocks(self.corpus.test.ids[::PICTURED]),
            backend=self.options["backend"],
            on_step=functools.partial(bar.advance, task),
        )

    def _train_teacher(self, bar):
        """-> the teacher, frozen, and its `History`; its cache is written."""
        model = text.language_model(text.TEACHER_HIDDEN, self.options["seed"])
        training = self._training("teacher", bar, self.options["teacher_steps"])
        history = text.train(model, self.corpus.train, rate=text.TEACHER_RATE, **training)
        model.requires_grad_(False)
        task = bar.add_task(f"the teacher's top {self._topk}", total=1)
        shutil.rmtree(self.out / CACHE, ignore_errors=True)  # of an earlier run, another teacher's
        write_cache(
            self.out / CACHE,
            model,
            self._few,
            f"topk:{self._topk}",
            tokenizer=self.tokenizer,
            data={"text": f"the documentation in Python {platform.python_version()}"},
            batch_size=VALIDATION_BATCH,
        )
        bar.advance(task)
        return model, history

    def _train_students(self, teacher, bar):
        """-> ({name: student}, {name: its `History`}), hard labels first.

        All begin with the same weights and see the same text in the same order.
        """
        alpha, temperature = self.options["alpha"], self.options["temperature"]
        few, stored = self._few, cache.open(self.out / CACHE)
        cells = {
            HARD: (None, dict(alpha=0.0)),
            SOFT: (teacher, dict(alpha=alpha, temperature=temperature)),
            f"student, top {self._topk} in a cache": (stored, dict(alpha=alpha)),
        }
        students, histories = {}, {}
        for name, (targets, loss) in cells.items():
            students[name] = text.language_model(text.STUDENT_HIDDEN, self.options["seed"] + 1)
            training = self._training(name, bar, self.options["steps"])
            histories[name] = text.train(
                students[name], few, targets, rate=text.STUDENT_RATE, **loss, **training
            )
        return students, histories

    def _targets(self, temperature=None):
        temperature = self.options["temperature"] if temperature is None else temperature
        return f"α = {self.options['alpha']:g}, T = {temperature:g}"

    def _memory(self, advance):
        """Peaks in MB of a step of the loss with this run's options, `peak_of`; None: unknown."""
        loss = {name: self.options[name] for name in ("temperature", "alpha", "backend")}
        peaks = {}
        for kind in ("fused", "naive"):
            peaks[f"{kind}_mb"] = peak_of(kind, MEMORY_BLOCKS, **loss)
            advance()
        return {"tokens": MEMORY_BLOCKS * text.BLOCK, **peaks}

    def _notes(self, memory):
        train, blocks = len(self.corpus.train), self.options["blocks"]
        epochs = self.options["teacher_steps"] / steps_per_epoch(train, text.BATCH)
        stored = cache.open(self.out / CACHE)
        logits = 4 * blocks * text.BLOCK * text.VOCABULARY
        notes = [
            f"Text: the documentation in Python {platform.python_version()}, "
            f"{len(self.corpus.train_documents)} documents to train on ({train:,} blocks of "
            f"{text.BLOCK} tokens, {epochs:.1f} times), {len(self.corpus.test_documents)} held out "
            f"({len(self.corpus.test):,} blocks). Students see {blocks:,} blocks.",
            f"The teacher's top {self._topk}: {stored.bytes / 1e6:,.1f} MB, "
            f"{stored.bytes / stored.tokens:.0f} bytes a token; its logits would be "
            f"{logits / 1e6:,.0f} MB.",
        ]
        fused, naive = memory["fused_mb"], memory["naive_mb"]
        if fused is None or naive is None:
            notes.append(
                "Peak memory of the loss: not measured; it takes Linux's /proc and the memory."
            )
        else:
            notes.append(
                f"Peak memory of the loss and its gradient for {memory['tokens']} tokens: "
                f"{fused:,.0f} MB; as a formula in PyTorch: {naive:,.0f} MB."
            )
        return notes


def fused_loss(student, teacher, labels, *, temperature, alpha, backend):
    """The loss of the demo's steps.

    student, teacher: `LinearHead`, hidden (B, L, ·); labels: (B, L).
    """
    loss = KDLoss(temperature=temperature, alpha=alpha, shift=True, backend=backend)
    return loss(student, teacher, labels)


def naive_loss(student, teacher, labels, *, temperature, alpha, backend=None):
    """The same loss as it is commonly written: all logits, float32, and PyTorch's functions."""
    student, teacher = (
        F.linear(x.hidden[:, :-1], x.weight).flatten(0, 1) for x in (student, teacher)
    )
    distill = F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    hard = F.cross_entropy(student, labels[:, 1:].flatten())
    return alpha * temperature**2 * distill + (1 - alpha) * hard


LOSSES: dict[str, Callable[..., torch.Tensor]] = {"fused": fused_loss, "naive": naive_loss}


def peak_of(kind, blocks, **loss):
    """MB that a loss and its gradient take at their peak, beyond models and hidden states.

    Measured in a process of its own, which holds nothing else and does not remember memory that
    was used before.

    Args:
        kind: "fused" or "naive".
        blocks: B, of 64 tokens.
        loss: temperature, alpha, backend.

    Returns:
        A float, or None where it cannot be measured: there is no Linux's /proc/self/clear_refs, or
        the process was ended for its memory.

    Raises:
        RuntimeError: the loss failed; the text is that of its process.
    """
    arguments = json.dumps({"kind": kind, "blocks": blocks, **loss})
    code = f"from {__name__} import _print_peak; _print_peak()"
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    child = subprocess.run(
        [sys.executable, "-c", code],
        input=arguments,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    if child.returncode > 0:
        raise RuntimeError(child.stderr)
    return json.loads(child.stdout) if child.returncode == 0 else None


def _print_peak():
    """In the process of `peak_of`: arguments come from stdin, the peak goes to stdout."""
    arguments = json.load(sys.stdin)
    kind, blocks = arguments.pop("kind"), arguments.pop("blocks")

    def step(blocks, length):
        labels = torch.randint(text.VOCABULARY, (blocks, length))
        heads = [
            LinearHead(torch.randn(blocks, length, width), weight)
            for width, weight in zip(widths, weights, strict=True)
        ]
        heads[0].hidden.requires_grad_()
        LOSSES[kind](*heads, labels, **arguments).backward()
        weights[0].grad = None

    widths = text.STUDENT_HIDDEN, text.TEACHER_HIDDEN
    weights = [torch.randn(text.VOCABULARY, width) for width in widths]
    weights[0].requires_grad_()
    step(1, 2)  # libraries and threads
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = _status("VmRSS")
    except OSError:
        print("null")
        return
    step(blocks, text.BLOCK)
    print((_status("VmHWM") - before) / 1e6)


def _status(field):
    """A field of /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1])


def _print_table(console, comparison, blocks):
    columns = ["model", "perplexity", "accuracy", "agrees", "size", "latency"]
    rows = []
    for row in comparison:
        agreement = row["agreement"]
        rows.append(
            [
                row["name"],
                f"{row['perplexity']:.1f}",
                f"{100 * row['accuracy']:.1f} %",
                "–" if agreement is None else f"{100 * agreement:.1f} %",
                f"{row['parameters'] / 1e6:.1f} M",
                f"{row['latency_ms']:.1f} ms",
            ]
        )
    report.print_table(
        console,
        f"{blocks} blocks of held-out text",
        columns,
        [rows[:1], rows[1:]],
        caption="agrees: with the teacher's answer; size: parameters; latency: of a block",
    )


def _draw(path, curves, reference):
    """The students' curves, and the teacher's perplexity in the end as a level line."""
    _, *students = curves
    drawn = [(each["name"], each["steps"], each["values"]) for each in students]
    steps = students[0]["steps"]
    drawn.append(("teacher, all of the text", steps, [reference] * len(steps)))
    report.plot_curves(
        path,
        [("students", drawn)],
        "held-out perplexity",
        "Learning curves: hard labels and soft targets",
    )
