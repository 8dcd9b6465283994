"""The sweep: which temperature and alpha suit students that see few labelled digits.

They are chosen on images that are held out of the training images. The test images judge the
choice once, next to hard labels: the best of many numbers on the test images would flatter itself.
"""

import functools
import json
import time
from pathlib import Path

import torch

from ... import __version__
from ...backends import registry
from ...files import atomic
from ...modules import KDLoss
from .. import checks, report, validation
from ..distiller import Distiller
from ..evaluation import evaluate, predict
from ..sweep import grid, search
from . import digits

VALIDATION = 300  # of the training images; nobody trains on them
TEMPERATURES = digits.TEMPERATURES
ALPHAS = (0.25, 0.5, 0.75, 1.0)
SIZE = 100
SCORE = "errors on the validation images"
PICTURE, CURVES = "sweep.png", "learning_curves.png"


class Demo:
    """The sweep with its options, checked here and not in the middle of a run.

    Args:
        out: the directory to write to; made when missing.
        temperatures, alphas: of the loss, as `kdkernels.kd_loss` takes them; every combination is
            tried, or, with `trials`, values between their smallest and largest.
        trials: None for the grid, or how many trainings Optuna may choose.
        size: labelled images that a student sees, in [1, 700].
        seeds: students for each temperature and alpha, at least 1.
        steps: optimiser steps of every network, at least 1.
        backend: of the loss, as `kdkernels.kd_loss` takes it.

    Raises:
        TypeError, ValueError: arguments outside what is listed.
        RuntimeError: a backend that cannot be used here.
        OSError: a directory that cannot be made.
        ImportError: rich, matplotlib or optuna is missing (the extra `train`).
    """

    def __init__(
        self,
        out,
        *,
        temperatures=TEMPERATURES,
        alphas=ALPHAS,
        trials=None,
        size=SIZE,
        seeds=digits.SEEDS,
        steps=digits.STEPS,
        backend=None,
    ):
        checks.integer("size", size, low=1, high=digits.TRAINING - VALIDATION)
        checks.integer("seeds", seeds, low=1)
        checks.integer("steps", steps, low=1)
        if trials is not None:
            checks.integer("trials", trials, low=1)
        if not temperatures or not alphas:
            raise ValueError("temperatures and alphas must not be empty")
        for temperature in temperatures:
            KDLoss(temperature=temperature)
        for alpha in alphas:
            KDLoss(alpha=alpha)
        registry.resolve("cpu", torch.float32, backend)
        checks.installed("rich", "matplotlib", *(["optuna"] if trials else []))
        self.temperatures, self.alphas = sorted(set(temperatures)), sorted(set(alphas))
        self.trials, self.size, self.seeds = trials, size, seeds
        self.training = dict(steps=steps, backend=backend)
        train, self.test_split = digits.load()
        held = digits.TRAINING - VALIDATION
        self.train_split = digits.Split(train.images[:held], train.labels[:held])
        self.validation_split = digits.Split(train.images[held:], train.labels[held:])
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self):
        """Trains, prints and writes everything -> what `results.json` holds, a dict."""
        from rich.console import Console

        started, console = time.perf_counter(), Console()
        cells = self.trials or len(self.temperatures) * len(self.alphas)
        with digits.one_thread(), report.progress(console) as bar:
            steps = self.training["steps"]
            advance = functools.partial(bar.advance, bar.add_task("teacher", total=steps))
            teacher = digits.train_teacher(self.train_split, on_step=advance, **self.training)
            advance = functools.partial(
                bar.advance, bar.add_task("students", total=(1 + cells) * steps)
            )
            hard = self._train(teacher, advance, temperature=1.0, alpha=0.0)
            students = {}

            def train(**options):
                student = students[tuple(options.values())] = self._train(
                    teacher, advance, **options
                )
                return self._errors(student[0], self.validation_split)

            trials = self._choose(train)
            best = trials[0].options
            soft = students[tuple(best.values())]
            models = {_named(None): hard, _named(best): soft}
            comparison = self._compare(teacher, {name: x for name, (x, _) in models.items()})
        self._print(console, trials)
        title = f"Students with {self.size} labels: {SCORE}"
        points = [(*x.options.values(), x.score) for x in trials]
        report.plot_sweep(self.out / PICTURE, points, SCORE, title)
        curves = [_curve(name, history) for name, (_, history) in models.items()]
        lines = [(each["name"], each["steps"], each["values"]) for each in curves]
        report.plot_curves(
            self.out / CURVES, [(f"{self.size} labels", lines)], SCORE, "Learning curves"
        )
        before, after = (line["errors"] for line in comparison[1:])
        headline = (
            f"{self.size} labels: {before:.1f} → {after:.1f} errors on the test images with "
            f"{_named(best)}, chosen on {VALIDATION} validation images"
        )
        notes = [headline]
        if len(self.temperatures) > 1 and best["temperature"] == self.temperatures[-1]:
            notes.append(f"T = {best['temperature']:g} is the highest tried: look beyond it")
        results = {
            "title": "Which temperature and alpha: students of handwritten digits",
            "notes": notes,
            "comparison": comparison,
            "options": {
                "temperatures": self.temperatures,
                "alphas": self.alphas,
                "trials": self.trials,
                "size": self.size,
                "seeds": self.seeds,
                **self.training,
            },
            "curves": curves,
            "pictures": {PICTURE: f"{title}, at every temperature and alpha that was tried"},
            "versions": {"kdkernels": __version__, "torch": torch.__version__},
            "trials": [vars(trial) for trial in trials],
            "seconds": time.perf_counter() - started,
        }
        with atomic(self.out / "results.json") as file:
            file.write(json.dumps(results, indent=1).encode())
        print(f"Pictures and results.json: {self.out}")
        print(headline)
        return results

    def _choose(self, train):
        if self.trials is None:
            return grid(train, temperature=self.temperatures, alpha=self.alphas)
        ranges = dict(temperature=self.temperatures, alpha=self.alphas)
        return search(train, self.trials, **{k: (x[0], x[-1]) for k, x in ranges.items()})

    def _train(self, teacher, advance, *, temperature, alpha):
        """A student a seed, each on its own `size` images -> (`digits.MLPStack`, `History`).

        A seed has the same images and initial weights at every temperature and alpha.
        """
        images, labels = self.train_split.images, self.train_split.labels
        generators = [torch.Generator().manual_seed(seed) for seed in range(self.seeds)]
        drawn = [torch.randperm(len(labels), generator=each)[: self.size] for each in generators]
        rows = torch.stack(drawn, 1)  # (size, seeds)
        stack = digits.MLPStack(range(self.seeds), digits.STUDENT_WIDTHS)
        distiller = Distiller(
            stack,
            predict(teacher, images)[rows],
            images[rows],
            labels[rows],
            loss=KDLoss(temperature=temperature, alpha=alpha, backend=self.training["backend"]),
            optimizer=digits.ADAM,
            batch_size=digits.STUDENT_BATCH,
        )
        test = self._for_seeds(self.validation_split)
        return stack, distiller.train(self.training["steps"], test=test, on_step=advance)

    def _for_seeds(self, split):
        return [digits.for_members(x, self.seeds) for x in (split.images, split.labels)]

    def _errors(self, stack, split):
        """Mean over the seeds."""
        return evaluate(stack, *self._for_seeds(split)).errors.double().mean().item()

    def _compare(self, teacher, stacks):
        """The teacher and all students on the test images -> rows of `results.json`."""
        images, labels = self._for_seeds(self.test_split)
        answers = predict(teacher, self.test_split.images)
        size_of_teacher = validation.size_of(teacher, self.test_split.images[:1])
        one = digits.MLPStack([0], digits.STUDENT_WIDTHS)
        size = validation.size_of(one, digits.for_members(self.test_split.images[:1], 1))
        scores = validation.validate(teacher, self.test_split.images, self.test_split.labels)
        rows = [validation.row("teacher", scores, size_of_teacher)]
        for name, stack in stacks.items():
            expected = digits.for_members(answers, self.seeds)
            scores = validation.validate(stack, images, labels, teacher=expected)
            line = validation.row(name, scores, size, size_of_teacher)
            rows.append({**line, "errors": line["errors"] / self.seeds})
        return rows

    def _print(self, console, trials):
        rows = [
            [f"{x.options['temperature']:.3g}", f"{x.options['alpha']:.3g}", f"{x.score:.1f}"]
            for x in trials
        ]
        report.print_table(
            console,
            f"Errors on {VALIDATION} validation images, mean of {self.seeds} seeds",
            ["temperature", "alpha", "errors"],
            [rows[:1], rows[1:]],
        )


def _named(options):
    if options is None:
        return "hard labels"
    return f"T = {options['temperature']:.3g}, alpha = {options['alpha']:.3g}"


def _curve(name, history):
    """The mean over the seeds of the errors on the validation images."""
    errors = [each.errors.double().mean().item() for each in history.evaluations]
    return dict(name=name, steps=history.steps, values=errors, ylabel=SCORE)
