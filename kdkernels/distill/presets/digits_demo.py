"""The demo: runs the `digits` experiment and shows it as tables, pictures and `results.json`."""

import functools
import json
import statistics
import time
from pathlib import Path

import torch

from ...backends import registry
from ...files import atomic, check_writable
from ...modules import KDLoss
from .. import checks, report
from ..arrays import load_logits, save_logits
from ..evaluation import evaluate, predict
from . import digits

# The comparison that is reported in one line: fixed beforehand, because the best temperature of a
# run would be chosen on the test images.
HEADLINE_SIZE, HEADLINE_TEMPERATURE = 100, 8.0
PICTURED_TEMPERATURES = (1.0, 4.0, 20.0)

CURVES, TEMPERATURES, TARGETS = (
    "learning_curves.png",
    "error_against_temperature.png",
    "soft_targets.png",
)


class Demo:
    """The experiment with its options, checked here and not in the middle of a run.

    Args:
        out: the directory to write to; made when missing.
        sizes: numbers of labelled images that students see, each in [1, 1000].
        temperatures: of the soft targets, as `kdkernels.kd_loss` takes them.
        seeds: students for each size and loss, at least 1.
        steps: optimiser steps of every network, at least 1.
        teacher_logits: None, or a .npy file of the teacher's logits for the training images in the
            order of `digits.load`, (1000, 10), floating point. Where it exists no teacher is
            trained, and what only the teacher itself could tell is left out; where it does not, it
            is written.
        backend: of the loss, as `kdkernels.kd_loss` takes it.

    Raises:
        TypeError, ValueError: arguments outside what is listed, a file without such logits.
        RuntimeError: a backend that cannot be used here.
        OSError: a file that cannot be read, a directory that cannot be made.
        ImportError: rich or matplotlib is missing (the extra `train`).
    """

    def __init__(
        self,
        out,
        *,
        sizes=digits.SIZES,
        temperatures=digits.TEMPERATURES,
        seeds=digits.SEEDS,
        steps=digits.STEPS,
        teacher_logits=None,
        backend=None,
    ):
        for size in sizes:
            checks.integer("sizes", size, low=1, high=digits.TRAINING)
        checks.integer("seeds", seeds, low=1)
        checks.integer("steps", steps, low=1)
        if not sizes or not temperatures:
            raise ValueError("sizes and temperatures must not be empty")
        for temperature in temperatures:
            KDLoss(temperature=temperature)
        registry.resolve("cpu", torch.float32, backend)
        checks.installed("rich", "matplotlib")

        self.sizes = sorted(set(sizes))
        self.temperatures = sorted(set(temperatures))
        self.seeds = seeds
        self.training = dict(steps=steps, backend=backend)
        self.teacher_logits = teacher_logits and Path(teacher_logits)
        self.teacher = None
        if self.teacher_logits and self.teacher_logits.exists():
            shape = (digits.TRAINING, digits.CLASSES)
            self.teacher = digits.Teacher(load_logits(self.teacher_logits, shape))
        elif self.teacher_logits:
            check_writable(self.teacher_logits)
        self.train_split, self.test_split = digits.load()
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self):
        """Trains, prints and writes everything -> what `results.json` holds, a dict."""
        from rich.console import Console

        started = time.perf_counter()
        console = Console()
        with digits.one_thread(), report.progress(console) as bar:
            teacher = self.teacher or self._train_teacher(bar)
            runs = self._train_students(teacher, bar)
            student = _student_facts(self.test_split)
            advance = functools.partial(bar.advance, bar.add_task("pictures", total=3))
            _draw(self.out, runs, teacher, self.train_split, advance)
        _print_table(console, runs, teacher, student, len(self.test_split.labels))
        results = {
            "title": "Digits: students with few labels, and the teacher's soft targets",
            "comparison": _comparison(runs, teacher, student, len(self.test_split.labels)),
            "curves": [_curve(run) for run in runs],
            "options": dict(
                sizes=self.sizes, temperatures=self.temperatures, seeds=self.seeds, **self.training
            ),
            "notes": [f"Students: means over {self.seeds} seeds."],
            "preset": "digits",
            "torch": torch.__version__,
            "seconds": time.perf_counter() - started,
            "seeds": self.seeds,
            **self.training,
            "training_images": len(self.train_split.labels),
            "test_images": len(self.test_split.labels),
            "teacher": {k: v for k, v in vars(teacher).items() if "logits" not in k},
            "student": student,
            "runs": [
                {**vars(each), "mean": each.mean_errors, "standard_error": each.standard_error}
                for each in runs
            ],
        }
        with atomic(self.out / "results.json") as file:
            file.write(json.dumps(results, indent=1).encode())

        if self.teacher:
            print(
                f"The teacher was read from {self.teacher_logits}: logits of the training images "
                "do not tell its errors on the test images, its size or its speed."
            )
        elif self.teacher_logits:
            print(f"Teacher's logits: {self.teacher_logits}")
        print(f"Pictures and results.json: {self.out}")
        hard, soft = _headline(runs)
        print(
            f"{hard.size} labels: {hard.mean_errors:.1f} → {soft.mean_errors:.1f} errors with soft "
            f"targets at T = {soft.temperature:g}"
        )
        return results

    def _train_teacher(self, bar):
        """Trains the teacher and, where asked, saves its logits -> `digits.Teacher`."""
        test = self.test_split
        task = bar.add_task("teacher", total=self.training["steps"])
        advance = functools.partial(bar.advance, task)
        model = digits.train_teacher(self.train_split, on_step=advance, **self.training)
        logits = predict(model, self.train_split.images)
        if self.teacher_logits:
            save_logits(self.teacher_logits, logits)
        return digits.Teacher(
            logits=logits,
            test_logits=predict(model, test.images),
            errors=evaluate(model, test.images, test.labels).errors.item(),
            parameters=_parameters(model),
            latency_us=_latency_us(model, test.images[:1]),
        )

    def _train_students(self, teacher, bar):
        """-> a list of `digits.Run`: for each size hard labels, then each temperature."""
        cells = [(size, t) for size in self.sizes for t in (None, *self.temperatures)]
        task = bar.add_task("students", total=len(cells) * self.training["steps"])
        advance = functools.partial(bar.advance, task)
        runs = []
        for size, temperature in cells:
            bar.update(task, description=f"students: {size} labels, {_targets(temperature)}")
            run = digits.train_students(
                self.train_split,
                self.test_split,
                teacher,
                size,
                temperature,
                seeds=self.seeds,
                on_step=advance,
                **self.training,
            )
            runs.append(run)
        bar.update(task, description="students")
        return runs


def _student_facts(test):
    """Size and speed of a single student; neither depends on its training."""
    student = digits.MLPStack([0], digits.STUDENT_WIDTHS)
    image = digits.for_members(test.images[:1], 1)
    return dict(parameters=_parameters(student), latency_us=_latency_us(student, image))


def _parameters(model):
    return sum(each.numel() for each in model.parameters())


def _latency_us(model, image):
    """Median time of `predict` for one image (1, ...), in microseconds, after a warm-up."""
    times = []
    for _ in range(220):
        start = time.perf_counter()
        predict(model, image)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[20:])


def _targets(temperature):
    return "hard" if temperature is None else f"T = {temperature:g}"


def _comparison(runs, teacher, student, test_images):
    """A dict for each model, as the report of any run has them."""

    def row(name, targets, errors, agreement, parameters, latency_us):
        return dict(
            name=name,
            targets=targets,
            errors=errors,
            accuracy=None if errors is None else 1 - errors / test_images,
            agreement=agreement,
            parameters=parameters,
            latency_ms=None if latency_us is None else latency_us / 1000,
        )

    rows = [row("teacher", "hard", teacher.errors, None, teacher.parameters, teacher.latency_us)]
    for run in runs:
        agreement = run.agreement and statistics.fmean(run.agreement)
        name = f"student, {run.size} labels"
        rows.append(row(name, _targets(run.temperature), run.mean_errors, agreement, **student))
    return rows


def _curve(run):
    name = f"{run.size} labels, {_targets(run.temperature)}"
    return dict(name=name, steps=run.steps, values=run.curve, ylabel="errors on the test images")


def _by_size(runs):
    """-> {size: its runs, hard labels first}"""
    groups = {}
    for run in runs:
        groups.setdefault(run.size, []).append(run)
    return groups


def _headline(runs):
    """The `Run`s with hard labels and with soft targets that are closest to the HEADLINE ones."""
    groups = _by_size(runs)
    hard, *soft = groups[min(groups, key=lambda size: abs(size - HEADLINE_SIZE))]
    return hard, min(soft, key=lambda run: abs(run.temperature - HEADLINE_TEMPERATURE))


def _print_table(console, runs, teacher, student, test_images):
    def text(value, form):
        return "–" if value is None else form.format(value)

    def size_and_speed(parameters, latency_us):
        return [text(parameters, "{:,}"), text(latency_us, "{:.0f} µs")]

    columns = ["model", "labels", "targets", "errors", "agreement", "parameters", "latency"]
    name = ["teacher", str(digits.TRAINING), _targets(None), text(teacher.errors, "{}"), "–"]
    sections = [[name + size_and_speed(teacher.parameters, teacher.latency_us)]]
    for size, cells in _by_size(runs).items():
        rows = []
        for run in cells:
            errors = f"{run.mean_errors:.1f}"
            if run.standard_error is not None:
                errors += f" ± {run.standard_error:.1f}"
            agreement = run.agreement and 100 * statistics.fmean(run.agreement)
            name = ["student", str(size), _targets(run.temperature)]
            rows.append([*name, errors, text(agreement, "{:.1f} %"), *size_and_speed(**student)])
        sections.append(rows)
    report.print_table(
        console,
        f"Errors on {test_images} test images (students: mean ± standard error of "
        f"{len(runs[0].errors)} seeds)",
        columns,
        sections,
        caption="agreement: same answer as the teacher's; latency: of one image",
    )


def _draw(out, runs, teacher, train, advance):
    """Writes the three pictures into `out`; advance: called without arguments after each."""
    example = _telling_example(teacher.logits, train.labels)
    report.plot_soft_targets(
        out / TARGETS,
        train.images[example].view(digits.SIDE, digits.SIDE).numpy(),
        teacher.logits[example],
        PICTURED_TEMPERATURES,
        train.labels[example].item(),
    )
    advance()
    groups, panels = [], []
    for size, cells in _by_size(runs).items():
        hard, *soft = cells
        groups.append(
            report.Group(
                name=f"{size} labels",
                temperatures=[run.temperature for run in soft],
                means=[run.mean_errors for run in soft],
                standard_errors=[run.standard_error or 0.0 for run in soft],
                baseline=hard.mean_errors,
            )
        )
        curves = [(_targets(run.temperature), run.steps, run.curve) for run in cells]
        panels.append((f"{size} labels", curves))
    ylabel = "errors on the test images"
    reference = (f"teacher, {digits.TRAINING} labels", teacher.errors)
    report.plot_temperatures(
        out / TEMPERATURES,
        groups,
        None if teacher.errors is None else reference,
        ylabel,
        "Errors of students with few labels",
    )
    advance()
    report.plot_curves(
        out / CURVES,
        panels,
        ylabel,
        "Learning curves: hard labels, and soft targets at each T (mean over seeds)",
    )
    advance()


def _telling_example(logits, labels):
    """logits (1000, 10), labels (1000,) -> the row of the training image to picture.

    The one that is answered rightly with a probability next to 0.95: at T = 1 such an answer hides
    what a higher temperature brings out.
    """
    probabilities = logits.softmax(-1).gather(1, labels[:, None])[:, 0]  # (1000,), of the label
    return (probabilities - 0.95).abs().argmin().item()
