"""`Job`: distils real checkpoints, from directories to a directory, as a `Config` says.

OUT/config.yaml        every option
    checkpoints/       of the run; the same command continues from them
    student/           the trained student, as save_pretrained writes it, in float32
    results.json       student and teacher compared, learning curves, notes
    log.csv, tensorboard/, learning_curves.png
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import __version__
from ...files import atomic, check_writable
from ...integrations.transformers import HiddenStates
from ...modules import KDLoss
from ...source_rows import to_device
from .. import batches, checks, engine, report
from ..checkpoints import Checkpoints
from ..distiller import Distiller, TrainingError
from ..hints import AttentionTransfer, FeatureHint, Hint, module_of
from ..history import History
from ..logs import CsvLog, TensorBoardLog
from ..offline import open_predictions, write_predictions
from ..predictions import CachedTeacher, as_teacher, inference, predict_with
from ..validation import Scores, row, size_of, validate
from . import config, models, parts

HINTS: dict[str, Any] = {"feature": FeatureHint, "attention": AttentionTransfer}
# Options that a run may change when it is resumed: no weight depends on them.
FREE = {"out", "checkpoint_every", "workers", "tensorboard", "timeout"}
FREE |= {"teacher_device", "shard_teacher", "shard_student"}
CURVES = "learning_curves.png"
HEADINGS = dict(name="", accuracy="accuracy", cross_entropy="nats", perplexity="perplexity")
HEADINGS.update(agreement="agrees", parameters="parameters", latency_ms="ms", speed_up="speed")


class Job:
    """A distillation, all of which is checked here, before its first step.

    Args:
        options: a `Config`.

    Raises:
        TypeError, ValueError: options, models, tokenizers, labels or data that do not go together.
        OSError: a directory or file that is not there.
        ImportError: a package is missing (the extra `train`).
    """

    def __init__(self, options: config.Config) -> None:
        checks.instance("options", options, config.Config, "a Config")
        self.options: Any = options
        self.out = Path(options.out)
        self.notes: list[str] = []
        self.checkpoints = Checkpoints(self.out / "checkpoints")
        self._check_resumable()
        self._check_teacher()
        task = models.task_of("student", models.config_of("student", options.student))
        of_task = {models.TEXT: parts.of_text, models.IMAGES: parts.of_images}[task]
        self.parts = of_task(options, self.notes)
        self.is_text = task == models.TEXT
        names = "divergence", "temperature", "alpha", "beta", "label_smoothing", "backend"
        given = {name: getattr(options, name) for name in names}
        self.loss = KDLoss(vocab_size=self.parts.vocab_size, **given)
        each = batches.steps_per_epoch(len(self.parts.train), options.batch_size)
        self.steps = options.steps or math.ceil((options.epochs or 1) * each)
        self.accelerator = _accelerator(options, self.parts.student)
        if self.parts.teacher is not None:
            self._place(self.parts.teacher)
        if options.write_teacher_predictions:
            self.distiller: Any = None  # comes when the file is there
            self._try(self.parts.teacher)
            check_writable(str(options.teacher_predictions))
        else:
            self.distiller = self._distiller()
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self) -> dict[str, Any] | None:
        """Trains, validates and saves -> what `results.json` holds, a dict; None in all of several
        processes but the main one.

        Raises:
            TrainingError: no step had a finite gradient.
            KeyboardInterrupt: after a checkpoint; the same job continues from there.
        """
        from accelerate.utils import set_seed
        from rich.console import Console

        options, started = self.options, time.perf_counter()
        is_main = self.accelerator.is_main_process
        console = Console(quiet=not is_main, markup=False, highlight=False)
        if options.write_teacher_predictions:
            resumed = self.checkpoints.paths() and Path(options.teacher_predictions).exists()
            with self._others_waiting():
                if is_main and not resumed:
                    self._write_predictions()
            self.distiller = self._distiller()
        rows = self._first_rows()
        step = self.distiller.resume(self.checkpoints) if self.checkpoints.paths() else 0
        if not step:
            set_seed(options.seed)
        if is_main:
            options.dump(self.out / "config.yaml")
        history = self._train(console, step)
        if len(history.skipped) == self.steps:
            raise TrainingError(f"none of the {self.steps} steps had a finite gradient")
        student, path = _inner(self.parts.student)
        state = self.distiller.student_state()
        state = {name.removeprefix(path): x for name, x in state.items()}
        rows.append({**self._row("student", self.parts.student), "targets": self._targets()})
        if not is_main:
            return None
        student.save_pretrained(self.out / "student", state_dict=state)
        for kept in self.parts.kept:
            kept.save_pretrained(self.out / "student")
        results = self._results(rows, history, time.perf_counter() - started)
        with atomic(self.out / "results.json") as file:
            file.write(json.dumps(results, indent=1).encode())
        _print(console, rows)
        console.print(f"The student and results.json: {self.out}", soft_wrap=True)
        return results

    def _place(self, teacher: Any) -> None:
        options, device = self.options, self.accelerator.device
        if options.shard_teacher:
            if self.accelerator.num_processes == 1:
                raise ValueError("shard_teacher goes with several processes")
            models.shard(teacher)
            return
        if not options.teacher_device:
            teacher.to(device)
            return
        devices = options.teacher_device.split(",")
        try:
            own = torch.device(devices[self.accelerator.local_process_index % len(devices)])
            if own.type != device.type:
                raise ValueError(
                    f"teacher_device must be of the student's kind, {device.type}, got {own.type}"
                )
            teacher.to(own)
        except (RuntimeError, AssertionError) as error:
            text = str(error).splitlines()[0]
            raise ValueError(f"teacher_device must be a device: {text}") from error

    @contextlib.contextmanager
    def _others_waiting(self) -> Iterator[None]:
        """What is done here is waited for, longer than `timeout`, unless the process dies."""
        if self.accelerator.num_processes == 1:
            yield
            return
        import torch.distributed as dist

        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        yield
        dist.barrier(group)

    def _check_resumable(self) -> None:
        path = self.out / "config.yaml"
        if not (self.checkpoints.paths() and path.exists()):
            return
        before = config.Config.load(path)
        changed = [x for x in config.differences(before, self.options) if x not in FREE]
        if changed:
            facts = (
                f"{x} was {getattr(before, x)!r} and is {getattr(self.options, x)!r}"
                for x in changed
            )
            raise ValueError(
                f"{self.out} has checkpoints of a run with other options: {', '.join(facts)}; "
                "continue that one, or choose another `out`"
            )

    def _check_teacher(self) -> None:
        options = self.options
        file, write = options.teacher_predictions, options.write_teacher_predictions
        if write and not (file and options.teacher):
            raise ValueError("write_teacher_predictions needs a teacher and teacher_predictions")
        if write and options.shard_teacher:
            raise ValueError("write_teacher_predictions must not be given with shard_teacher")
        if options.teacher_cache and file:
            raise ValueError("teacher_cache and teacher_predictions must not both be given")
        if options.tail and not options.teacher_cache:
            raise ValueError("tail goes with teacher_cache")
        if file and not write and not Path(file).is_file():
            raise FileNotFoundError(f"teacher_predictions must be a file, {file} is none")
        if file and not file.endswith((".safetensors", ".npy")):
            raise ValueError(f"teacher_predictions must end in .safetensors or .npy, got {file}")
        stored = file or options.teacher_cache
        if not (stored or options.teacher) and options.alpha > 0:
            raise ValueError(
                f"alpha must be 0 without a teacher, got {options.alpha:g}: name a teacher, or "
                "train one on the labels first, with alpha 0"
            )
        if options.hints and (file or not options.teacher):
            what = "teacher_predictions" if file else "teacher_cache" if stored else "labels"
            raise ValueError(f"hints need the teacher itself, not {what} alone")

    def _distiller(self) -> Distiller:
        options, student, train = self.options, self.parts.student, self.parts.train
        teacher = self.parts.teacher
        if options.teacher_cache:
            teacher = CachedTeacher(self.parts.cache, teacher if options.hints else None)
        if options.teacher_predictions:
            teacher = open_predictions(options.teacher_predictions, len(train))
            self._check_predictions()
        self._try(teacher)
        hints = [_hint(each, student, teacher) for each in options.hints]
        return Distiller(
            student,
            teacher,
            train,
            loss=self.loss,
            optimizer=functools.partial(
                torch.optim.AdamW, lr=options.learning_rate, weight_decay=options.weight_decay
            ),
            scheduler=self._scheduler,
            batch_size=options.batch_size,
            accumulate=options.accumulate,
            clip_norm=options.clip_norm,
            hints=hints,
            alpha_warmup=options.alpha_warmup,
            workers=options.workers,
            accelerator=self.accelerator,
            seed=options.seed,
        )

    def _try(self, teacher: Any) -> None:
        """The loss of an example: predictions of other shapes or classes, or a loss that they have
        no answer for, are found before the first step."""
        # One that is going to be sharded need not fit on a device.
        device = "cpu" if self.options.shard_student else self.accelerator.device
        student = self.parts.student.to(device)
        batch = next(batches.of(self.parts.train, None, 0).batches(iter([torch.arange(1)])))
        batch = batch.to(device)
        with inference(student), self.accelerator.autocast():
            prediction = predict_with(student, batch.inputs)
            target = prediction
            if teacher is not None:
                target = as_teacher(teacher, self.accelerator)(batch)
            labels: Any = batch.labels
            self.loss(prediction, to_device(target, labels.device), labels)

    def _scheduler(self, optimizer: Any) -> Any:
        from transformers import get_scheduler

        name = self.options.scheduler.replace("constant", "constant_with_warmup")
        return get_scheduler(name, optimizer, self.options.warmup, self.steps)

    def _write_predictions(self) -> None:
        options, facts = self.options, self._facts_of_predictions()
        facts.unlink(missing_ok=True)  # of another file, if this one is not finished
        write_predictions(
            options.teacher_predictions,
            self.parts.teacher,
            self.parts.train,
            vocab_size=self.parts.vocab_size,
            batch_size=options.batch_size,
        )
        with atomic(facts) as file:
            file.write(json.dumps({"data": self.parts.train.digest()}).encode())

    def _facts_of_predictions(self) -> Path:
        return Path(f"{self.options.teacher_predictions}.json")

    def _check_predictions(self) -> None:
        """Another seed holds out other files: as many rows, but of other examples. Files that
        other programs wrote say nothing of it."""
        path = self._facts_of_predictions()
        if path.exists() and json.loads(path.read_bytes())["data"] != self.parts.train.digest():
            raise ValueError(
                f"{self.options.teacher_predictions} must be of these training examples, it was "
                "written for others: `data`, `length`, `test_share` and `seed` choose them"
            )

    def _train(self, console: Any, step: int) -> History:
        """-> the `History`, the student having its best weights where `patience` is given"""
        options, distiller = self.options, self.distiller
        history: History = distiller.history
        left = 0 if history.stopped_early else self.steps - step
        if left <= 0:
            distiller.restore_best()
            return history
        if step:
            console.print(f"Going on from step {step} in {self.checkpoints.folder}")
        with contextlib.ExitStack() as stack:
            on_step, shown = stack.enter_context(self._progress(console, step))
            logs: list[Any] = [shown]
            if self.accelerator.is_main_process:
                logs.append(CsvLog(self.out / "log.csv", step))
                if options.tensorboard:
                    logs.append(TensorBoardLog(self.out / "tensorboard", step))
                for log in logs[1:]:
                    stack.callback(log.close)
            stack.enter_context(_told(distiller))
            history = distiller.train(
                left,
                test=self._validate,
                record_every=options.record_every,
                on_step=on_step,
                logs=logs,
                checkpoints=self.checkpoints,
                checkpoint_every=options.checkpoint_every,
                patience=options.patience,
            )
        return history

    @contextlib.contextmanager
    def _progress(self, console: Any, done: int) -> Iterator[tuple[Callable[[], object], _Shown]]:
        """-> (what is called after every step, a log that shows what it is told beside the bar)"""
        unit = "tokens/s" if self.is_text else "images/s"
        with report.progress(console) as bar:
            task = bar.add_task("training", total=self.steps, completed=done)
            shown = _Shown(lambda text: bar.update(task, description=text), unit)
            yield functools.partial(bar.advance, task), shown

    def _validate(self, model: nn.Module, teacher: Any = None) -> Scores:
        return validate(
            model,
            self.parts.test,
            teacher=teacher,
            vocab_size=self.parts.vocab_size,
            batch_size=self.options.batch_size,
            workers=self.options.workers,
        )

    def _first_rows(self) -> list[dict[str, Any]]:
        """Of the comparison: the teacher, and the student as it was."""
        rows = []
        if self.parts.teacher is not None:
            rows.append(self._row("teacher", self.parts.teacher))
        return [*rows, self._row("student before", self.parts.student)]

    def _row(self, name: str, model: Any) -> dict[str, Any]:
        scores = self._validate(model, self.parts.teacher)
        example = next(batches.of(self.parts.test, None, 0).batches(iter([torch.arange(1)])))
        size = size_of(model, example.to(self.accelerator.device).inputs)
        found = {**row(name, scores, size), "targets": None}
        return found if self.is_text else {k: x for k, x in found.items() if k != "perplexity"}

    def _targets(self) -> str:
        options = self.options
        if not options.alpha:
            return "labels"
        return f"{options.divergence}, T = {options.temperature:g}, alpha = {options.alpha:g}"

    def _results(
        self, rows: list[dict[str, Any]], history: History, seconds: float
    ) -> dict[str, Any]:
        if self.parts.teacher is not None:
            for each in rows:
                each["speed_up"] = rows[0]["latency_ms"] / each["latency_ms"]
        values = [each.cross_entropy for each in history.evaluations]
        ylabel = "test cross-entropy / nats"
        references = [(each["name"], each["cross_entropy"]) for each in rows[:-1]]
        curves = [("student", history.steps, values)]
        curves += [(name, history.steps, [x] * len(values)) for name, x in references]
        report.plot_curves(self.out / CURVES, [("test data", curves)], ylabel, "Learning curve")
        if self.options.test is None:
            self.notes.append(
                f"The test data are {self.options.test_share:g} of the files of the data, held out."
            )
        if history.stopped_early:
            self.notes.append(f"Stopped early, after {history.steps[-1]} of {self.steps} steps.")
        for step, where in history.skipped:
            self.notes.append(f"Step {step} was not taken, its gradient not finite: {where}")
        keys = "name", "steps", "values"
        return {
            "title": f"{Path(self.options.student).name}, distilled",
            "comparison": rows,
            "options": dataclasses.asdict(self.options),
            "curves": [{**dict(zip(keys, each, strict=True)), "ylabel": ylabel} for each in curves],
            "notes": self.notes,
            "pictures": {CURVES: "The student's cross-entropy on the test data, as it was trained"},
            "versions": {"kdkernels": __version__, "torch": torch.__version__},
            "steps": self.steps,
            "seconds": seconds,
            "terms": [
                {"step": step, "loss": loss, **terms}
                for step, loss, terms in zip(
                    history.steps, history.losses, history.terms, strict=True
                )
            ],
        }


def _accelerator(options: config.Config, student: Any) -> Any:
    """-> `accelerate.Accelerator`, of processes that have all of the student each, or a part"""
    import accelerate

    processes = int(os.environ.get("WORLD_SIZE") or 1)
    cpu, plugin = not torch.accelerator.is_available(), None
    if options.shard_student:
        if cpu or processes == 1:
            raise ValueError("shard_student goes with several processes, a GPU for each")
        plugin = _fsdp(student)
    timeout = datetime.timedelta(minutes=options.timeout)
    found = accelerate.Accelerator(
        cpu=cpu,
        mixed_precision=options.mixed_precision,
        fsdp_plugin=plugin,
        kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=timeout)],
    )
    engine.check_whole(found)
    if processes != found.num_processes:
        raise RuntimeError(f"WORLD_SIZE is {processes}, but accelerate has {found.num_processes}")
    return found


def _fsdp(student: Any) -> Any:
    """FSDP2 that gathers a layer at a time."""
    from accelerate import FullyShardedDataParallelPlugin

    layers = sorted({type(each).__name__ for each in models.layers_of(student)})
    policy = "transformer_based_wrap" if layers else "no_wrap"
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy=policy, transformer_cls_names_to_wrap=layers
    )


def _inner(model: Any) -> tuple[Any, str]:
    """The `transformers` or PEFT model behind a student or a teacher, and the path to it."""
    path = ""
    while isinstance(model, (HiddenStates, CachedTeacher)):
        model, path = model.model, f"{path}model."
    return model, path


def _hint(options: Any, student: Any, teacher: Any) -> Hint:
    """An entry of the option `hints`, whose paths are those of the `transformers` models."""
    if not isinstance(options, dict):
        raise TypeError(f"hints must be mappings of student, teacher, ..., got {options!r}")
    kind, options = options.get("kind", "feature"), dict(options)
    options.pop("kind", None)
    if kind not in HINTS:
        raise ValueError(f"hints must be of kind {' or '.join(HINTS)}, got {kind!r}")
    known = ["student", "teacher", "weight", "select", "dim" if kind == "feature" else "rows"]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise ValueError(f"{name!r} is no option of a {kind} hint; near: {', '.join(near)}")
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(options.get(name), str):
            raise ValueError(f"hints must name a module of the {name}, got {options.get(name)!r}")
        inner, path = _inner(model)
        module_of(name, inner, options[name])
        options[name] = path + options[name]
    hint: Hint = HINTS[kind](**options)
    return hint


@contextlib.contextmanager
def _told(distiller: Distiller) -> Iterator[None]:
    """Says where a run that is interrupted stands."""
    try:
        yield
    except KeyboardInterrupt:
        step = distiller.steps_taken
        print(f"interrupted at step {step}: the same command goes on from there", file=sys.stderr)
        raise


class _Shown:
    """A log that is read by people."""

    def __init__(self, show: Callable[[str], object], unit: str) -> None:
        self.show, self.unit = show, unit

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """values: {name: number}"""
        names = ("loss", "distill", "hard", "hints", "test_cross_entropy")
        facts = [f"{name.replace('_', ' ')} {values[name]:.4g}" for name in names if name in values]
        self.show(", ".join([*facts, f"{values['rows_per_second']:,.0f} {self.unit}"]))


def _print(console: Any, rows: list[dict[str, Any]]) -> None:
    """The comparison as a table."""
    columns = [x for x in HEADINGS if any(each.get(x) is not None for each in rows)]
    if "perplexity" in columns:  # says the same, and a terminal has 80 characters
        columns.remove("cross_entropy")
    texts = [[_cell(each.get(x)) for x in columns] for each in rows]
    report.print_table(console, "On the test data", [HEADINGS[x] for x in columns], [texts])


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4g}" if value >= 1 else f"{value:.3f}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else value
