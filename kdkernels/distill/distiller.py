"""`Distiller`: trains a student on a teacher's soft targets, on hard labels, or on both.

The loss is `kdkernels.kd_loss` and, where asked, hints; a network without a teacher is trained by
the same loop with alpha = 0, where the loss does not read the teacher.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ..cache import CacheMismatchError
from ..functional import kd_loss
from ..modules import KDLoss
from ..source_rows import detached, rows_of, to_device
from . import batches, checks, engine, failures, interrupt, randomness
from .batches import Batch
from .checkpoints import Checkpoints
from .evaluation import Evaluation, evaluate
from .hints import Hint, Recorder
from .hints import check as check_hints
from .history import History, Meter
from .predictions import Teacher, as_teacher, checksum, inference, predict_with
from .validation import Scores


class Log(Protocol):
    """What `train` writes every recording to: `logs` has some."""

    def write(self, step: int, values: dict[str, float]) -> object: ...


Test: TypeAlias = tuple[Tensor, Tensor] | Callable[[nn.Module], Evaluation | Scores]

ADAM = functools.partial(torch.optim.Adam, lr=1e-3)


class TrainingError(RuntimeError):
    """Nothing was learned; the text says why."""


class Distiller:
    """Trains a student on a teacher's predictions.

    Every step takes a batch of rows i, in an order that depends on `seed` only, and descends

        loss(student(inputs[i]), teacher's logits for i, labels[i])

    with `loss` a `kdkernels.KDLoss`: alpha · T² · D(teacher, student) + (1 − alpha) · CE (Hinton,
    Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2), to which hints
    are added. The teacher is frozen: evaluated in evaluation mode, without gradients, and not at
    all where alpha = 0 and there are no hints.

    A step whose loss or gradient is not finite is not taken: a warning and the history name the
    examples.

    Args:
        student: the module to train, in place. It maps a batch (B, ...) to logits (B, ..., V), a
            `LinearHead`, or an object that has `logits`.
        teacher: a module that maps the same batch likewise, on any device, its weights possibly
            sharded over processes by `fully_shard`; or its predictions for all inputs, computed
            before: logits (N, ..., V), any float dtype, or what has a row [i] of those or of a
            source for each input; or a `kdkernels.cache.TeacherCache`, which finds them by the
            token ids; or `SeveralTeachers`; or None, with alpha = 0 and labels.
        inputs: (N, ...), any dtype the student takes; or a map-style `Dataset`, whose examples have
            labels of their own (`batches.Streamed` says which).
        labels: (N, ...), int64 or int32, shaped as the student's logits without V; or None for an
            unlabelled transfer set, where the loss is T² · D.
        loss: a `KDLoss` that returns a single number (not reduction="none" or return_terms).
        optimizer: called with the student's parameters, returns a `torch.optim.Optimizer`.
        scheduler: None, or called with the optimiser, returns what has a step() for every step.
        batch_size: examples per step, the last batch of an epoch may be smaller; None takes all.
        accumulate: a batch is taken in that many parts, one after the other; the gradient is that
            of the whole batch.
        clip_norm: None, or the largest norm of a gradient.
        hints: `FeatureHint` and `AttentionTransfer`, for a teacher that is a module, or a
            `CachedTeacher` with one; copied, what is learned of them is in `self.hints`.
        alpha_warmup: steps over which alpha grows to the loss's, from alpha / steps on.
        workers: processes that read a `Dataset`.
        accelerator: an `accelerate.Accelerator` for devices, mixed precision and several processes,
            with DDP or FSDP2 (`batch_size` is that of all together, an example for each at least).
            It moves a teacher that lies on the CPU to its device. None: one process, where the
            student is.
        seed: an int; fixes the order of the examples and the projections of hints, not the
            student's initial weights or its dropout.

    Raises:
        TypeError: an argument of another type than listed.
        ValueError: lengths that do not match, an empty data set, no teacher where one is needed, a
            loss that is no single number, a hint for a module that is not there.

    Example:
        loss = KDLoss(temperature=4.0, alpha=0.9)
        distiller = Distiller(student, teacher, images, labels, loss=loss, batch_size=128)
        history = distiller.train(1000, test=(test_images, test_labels))
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        inputs: batches.Inputs,
        labels: Tensor | None = None,
        *,
        loss: KDLoss,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = ADAM,
        scheduler: Callable[[Any], Any] | None = None,
        batch_size: int | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        hints: Sequence[Hint] = (),
        alpha_warmup: int = 0,
        workers: int = 0,
        accelerator: Any = None,
        seed: int = 0,
    ) -> None:
        checks.instance("student", student, nn.Module, "a torch.nn.Module")
        checks.single_loss(loss)
        checks.data(inputs, labels)
        checks.teacher(teacher, inputs, labels, loss)
        check_hints(hints, teacher)
        examples: Any = inputs  # which have a length
        batch_size = len(examples) if batch_size is None else batch_size
        checks.integer("batch_size", batch_size, low=1)
        checks.integer("accumulate", accumulate, low=1)
        checks.integer("alpha_warmup", alpha_warmup, low=0)
        checks.integer("workers", workers, low=0)
        checks.integer("seed", seed)
        if clip_norm is not None:
            checks.positive("clip_norm", clip_norm)

        self.engine = engine.of(accelerator, student)
        if min(batch_size, len(examples)) < self.engine.num_processes:
            raise ValueError(
                f"batch_size and inputs must have an example for each of the "
                f"{self.engine.num_processes} processes, got {batch_size} and {len(examples)}"
            )
        self.data = batches.of(inputs, labels, workers)
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self.loss, self.clip_norm, self.alpha_warmup = loss, clip_norm, alpha_warmup
        self.teacher = None if teacher is None else as_teacher(teacher, accelerator)
        self.hints = self._prepare_hints(student, teacher, hints).to(self.engine.device)
        learned = nn.ModuleList([student, *self.hints])
        built = optimizer([x for x in learned.parameters() if x.requires_grad])
        checks.instance("optimizer(...)", built, torch.optim.Optimizer, "a torch.optim.Optimizer")
        self.student, self.optimizer = engine.prepare(self.engine, student, built)
        # Steps have an autocast of their own; that of `prepare` makes float32 copies of all logits.
        self.engine.unwrap_model(self.student, keep_fp32_wrapper=False)
        self.scheduler = scheduler and scheduler(built)
        self.history, self.meter = History(), Meter()
        self.steps_taken = 0
        self.best: dict[str, Any] = {"cross_entropy": math.inf, "recordings": 0, "student": None}

    def train(
        self,
        steps: int,
        *,
        test: Test | None = None,
        record_every: int = 50,
        on_step: Callable[[], object] | None = None,
        logs: Sequence[Log] = (),
        checkpoints: Checkpoints | None = None,
        checkpoint_every: int | None = None,
        patience: int | None = None,
    ) -> History:
        """Takes `steps` optimiser steps; a further call continues where this one ended.

        Args:
            steps: how many, at least 1.
            test: None, or (inputs, labels) as in `evaluate`, evaluated at every recording; or a
                function of the student that returns an `Evaluation` or `Scores`.
            record_every: steps between two entries of the history; the last step is always one.
            on_step: None, or called without arguments after every step (a progress bar).
            logs: objects whose `write(step, values)` gets every recording: {name: number}, in the
                main one of several processes.
            checkpoints: None, or the `Checkpoints` to save to: after every `checkpoint_every`
                steps, after the last one, and when interrupted (Ctrl-C).
            patience: None, or early stopping: after that many recordings in a row without a
                smaller test cross-entropy. With it the student has its best weights in the end.

        Returns:
            The `History` of all calls so far, also kept as `self.history`.

        Raises:
            TypeError, ValueError: steps, record_every, checkpoint_every or patience is no integer
                of at least 1, patience without a test, checkpoints of another run for one that
                begins; and what the test and the loss raise.
            KeyboardInterrupt: after the step that was being taken, and its checkpoint.
            ProcessError: another of several processes failed, died or hangs.
        """
        checks.integer("steps", steps, low=1)
        checks.integer("record_every", record_every, low=1)
        for name, value in (("checkpoint_every", checkpoint_every), ("patience", patience)):
            if value is not None:
                checks.integer(name, value, low=1)
        if patience is not None and test is None:
            raise ValueError(f"test must be given for patience={patience}, got None")
        if checkpoints is not None:
            engine.check_whole(self.engine)
            if self.steps_taken == 0 and checkpoints.paths():
                raise ValueError(
                    f"checkpoints must be empty for a run that begins, {checkpoints.folder} has "
                    "some: resume, or choose another folder"
                )
        end = self.steps_taken + steps
        if self.history.stopped_early:  # and is to go on all the same
            self.history.stopped_early, self.best["recordings"] = False, 0
        self.student.train()
        batches = self._batches()
        with interrupt.deferred() as interrupted, failures.shared():
            last = stopped = False
            while not last:
                self.meter.add(*self._step(next(batches)))
                if on_step is not None:
                    on_step()
                # An interrupted step is no recording: without the interruption it is none.
                stopped = engine.any_of(self.engine, interrupted())
                last = stopped or self.steps_taken == end
                if self.steps_taken == end or self.steps_taken % record_every == 0:
                    last = self._record(test, logs, patience) or last
                due = checkpoint_every and self.steps_taken % checkpoint_every == 0
                if checkpoints is not None and (last or due):
                    self._save(checkpoints)
            if stopped or engine.any_of(self.engine, interrupted()):
                raise KeyboardInterrupt
        if patience is not None:
            self.restore_best()
        return self.history

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, as `Checkpoints` can hold it."""
        whole = functools.partial(engine.whole_state, self.engine)
        return {
            "student": self.student_state(),
            "hints": self.hints.state_dict(),
            "optimizer": whole(self.optimizer.state_dict()),
            "scheduler": self.scheduler and self.scheduler.state_dict(),
            "scaler": self.engine.scaler and self.engine.scaler.state_dict(),
            "history": self.history.state(),
            "meter": engine.gathered(self.engine, self.meter.state()),
            "best": whole(self.best),
            "randomness": engine.gathered(self.engine, randomness.state()),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "examples": len(self.data),
            "teacher_cache": checksum(self.teacher),
        }

    def student_state(self) -> Any:
        """The student's `state_dict`. Where it is sharded the main process has it, whole and on the
        CPU; all have to call this."""
        return engine.whole_state(self.engine, self._model().state_dict())

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Continues at a step from what `state` returned there: bit for bit on as many processes.

        On another number of them the order of the examples, the weights and the optimiser go on as
        they would have, and sums are rounded otherwise; what dropout draws begins anew, from the
        seed, the step and the process.

        Raises:
            ValueError: it is the state of another run: of other data, batches or order; the text
                says what differs.
            CacheMismatchError: of another teacher's cache.
            RuntimeError: of another model.
        """
        here = dict(seed=self.seed, batch_size=self.batch_size, examples=len(self.data))
        for name, value in here.items():
            if state[name] != value:
                raise ValueError(f"{name} must be {state[name]}, as before, got {value}")
        if (before := state.get("teacher_cache")) != (now := checksum(self.teacher)):
            raise CacheMismatchError(f"the teacher's cache must be {before}, as before, got {now}")
        processes = len(state["randomness"])
        count = len(self.data), self.batch_size
        steps = [batches.steps_per_epoch(*count, x) for x in (processes, self.engine.num_processes)]
        if steps[0] != steps[1]:
            raise ValueError(
                f"the processes must be {processes}, as before, got {self.engine.num_processes}: "
                "the last batch of an epoch does not have an example for each of the larger number"
            )
        changing = dict(scheduler=self.scheduler, scaler=self.engine.scaler)
        for name, thing in changing.items():
            if (thing is None) != (state[name] is None):
                before, now = ("none" if x is None else "one" for x in (state[name], thing))
                raise ValueError(f"{name} must be as before, when there was {before}, got {now}")
        engine.load(self._model(), state["student"])
        self.hints.load_state_dict(state["hints"])
        engine.load_optimizer(self.optimizer, state["optimizer"])
        for name, thing in changing.items():
            if thing is not None:
                thing.load_state_dict(state[name])
        self.history = History.of(state["history"])
        self.best = state["best"]
        place = self.engine.process_index
        if processes == self.engine.num_processes:
            self.meter.restore(state["meter"][place])
            randomness.restore(state["randomness"][place])
        else:
            self.meter.restore(Meter.mean(state["meter"]))
            randomness.begin(f"{self.seed} {step} {place}")
        self.steps_taken = step

    def resume(self, checkpoints: Checkpoints) -> int:
        """Continues from the newest of `Checkpoints` that is whole -> its step; 0 without any.

        Raises:
            CheckpointError: there are some, and none is whole.
            ValueError, RuntimeError: as `restore`.
        """
        found = checkpoints.load()
        if found is not None:
            self.restore(*found)
        return self.steps_taken

    def restore_best(self) -> None:
        """Gives the student the weights of its smallest test cross-entropy, where `train` was
        called with patience."""
        if self.best["student"] is not None:
            engine.load(self._model(), self.best["student"])

    def _model(self) -> Any:
        """The student, without what makes it one of several processes."""
        return self.engine.unwrap_model(self.student)

    def _record(self, test: Test | None, logs: Sequence[Log], patience: int | None) -> bool:
        """A recording -> whether training is to stop early."""
        # With the check of the gradient's norm, what reads a number from the device.
        terms, rows_per_second = self.meter.read(self.engine)
        rate = self.optimizer.param_groups[0]["lr"]
        self.history.steps.append(self.steps_taken)
        self.history.losses.append(terms["loss"])
        terms["learning_rate"] = float(rate)
        self.history.terms.append({k: x for k, x in terms.items() if k != "loss"})
        values, stop = {**terms, "rows_per_second": rows_per_second}, False
        if test is not None:
            model = self._model()
            found = test(model) if callable(test) else evaluate(model, *test)
            self.history.evaluations.append(found)
            values |= _numbers(found)
            if patience is not None:
                # That of the main process: what batch normalisation remembers differs.
                (found, *_) = engine.gathered(self.engine, values["test_cross_entropy"])
                stop = self._worse(found) >= patience
                self.history.stopped_early = stop
        for log in logs if self.engine.is_main_process else ():
            log.write(self.steps_taken, values)
        self.meter.reset()
        self.student.train()
        return stop

    def _worse(self, cross_entropy: float) -> int:
        """How many recordings, up to this one, the smallest cross-entropy is ago."""
        if cross_entropy < self.best["cross_entropy"]:
            weights = {name: x.detach().clone() for name, x in self._model().state_dict().items()}
            self.best = dict(cross_entropy=cross_entropy, recordings=0, student=weights)
        else:
            self.best["recordings"] += 1
        return int(self.best["recordings"])

    def _save(self, checkpoints: Checkpoints) -> None:
        state = self.state()
        if self.engine.is_main_process:
            checkpoints.save(self.steps_taken, state)
        self.engine.wait_for_everyone()

    def _batches(self) -> Iterator[Batch]:
        place = self.engine.num_processes, self.engine.process_index
        count = len(self.data)
        rows = batches.rows_from(self.steps_taken, count, self.batch_size, self.seed, *place)
        return self.data.batches(rows)

    def _step(self, batch: Batch) -> tuple[dict[str, Tensor] | None, int | Tensor]:
        """One optimiser step on this process's batch -> its terms {name: ()}, None if it was not
        taken, and the rows (int or ()) that counted."""
        batch = batch.to(self.engine.device)
        # As many in every process: all of them gather for each what is sharded.
        of_data = self.steps_taken, len(self.data), self.batch_size
        least = batches.least_rows(*of_data, self.engine.num_processes)
        parts = batch.split(min(self.accumulate, least))
        whole = self._whole(batch, parts)
        # What layers like BatchNorm2d remember of a batch that turns out not to be finite.
        buffers = [(x, x.clone()) for x in self.student.buffers()]
        self.optimizer.zero_grad()
        terms: dict[str, Any] = {}
        rows: int | Tensor = 0
        for part in parts:
            last = part is parts[-1]
            with contextlib.nullcontext() if last else self.engine.no_sync(self.student):
                found, counted = self._descend(part, whole)
            terms = {name: terms.get(name, 0.0) + x for name, x in found.items()}
            rows = rows + counted
        for x in self.hints.parameters() if self.engine.num_processes > 1 else ():
            x.grad = self.engine.reduce(x.grad, "mean")
        learned = [x for group in self.optimizer.param_groups for x in group["params"]]
        norm = self.engine.clip_grad_norm_(learned, self.clip_norm or math.inf)
        # A student without probability where its teacher has some: only the loss is infinite.
        facts = [engine.whole(norm).float(), self.engine.reduce(terms["loss"]).float()]
        finite, loss_finite = map(math.isfinite, torch.stack(facts).tolist())
        scaled = self.engine.scaler is not None
        if not loss_finite:
            self.optimizer.zero_grad()  # a scaler has to take a step: of nothing
        if (finite and loss_finite) or scaled:  # it leaves out what overflowed, and learns from it
            self.optimizer.step()
        taken = loss_finite and (finite or scaled)
        if not taken:
            self._skip(parts)
            for x, before in buffers:
                x.copy_(before)
        if self.scheduler is not None:
            self.scheduler.step()
        self.steps_taken += 1
        return terms if taken else None, rows

    def _whole(self, batch: Batch, parts: list[Batch]) -> tuple[Tensor, Tensor | None] | None:
        """(examples, rows that count or None) of the whole step, over all parts and processes.

        None where a part is the whole. A process's gradients are averaged with the others', so
        that each divides by its share of the counts.
        """
        if len(parts) == 1 and self.engine.num_processes == 1:
            return None
        counted = 0 if batch.labels is None else self._counted(batch.labels)
        counts = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        counts[0], counts[1] = len(batch), counted  # a list of them would wait for the device
        counts = self.engine.reduce(counts).clamp_min(1)  # where no row counts the loss is 0 / 1
        examples, items = (counts / self.engine.num_processes).unbind()
        return examples, None if batch.labels is None else items

    def _counted(self, labels: Tensor) -> Tensor:
        """labels (B, ...) -> (), how many of their rows count in the loss."""
        labels = labels[..., 1:] if self.loss.options["shift"] else labels
        counted: Tensor = (labels != self.loss.options["ignore_index"]).sum()
        return counted

    def _descend(
        self, part: Batch, whole: tuple[Tensor, Tensor | None] | None
    ) -> tuple[dict[str, Tensor], int | Tensor]:
        """Adds the gradient of a part of a step -> its terms {name: ()}, detached, and its rows."""
        examples, items = whole or (len(part), None)
        share = len(part) / examples
        summed = self.loss.options["reduction"] == "sum"
        with self.engine.autocast():
            prediction, target, extra = self._predict(part)
            both = part.labels is not None and 0 < self.loss.options["alpha"] < 1
            options = dict(num_items=None if summed else items, return_terms=both)
            found = self._loss(prediction, target, part.labels, **options)
            loss = found.loss if both else found
            if summed:
                loss = loss * self.engine.num_processes
            elif part.labels is None:
                loss = loss * share
            terms = {}
            if both:
                mine = 1.0 if items is None else found.num_items / items
                terms = {"distill": found.distill * mine, "hard": found.hard * mine}
            if extra is not None:
                terms["hints"] = extra * share
                loss = loss + terms["hints"]
        self.engine.backward(loss)
        terms = {name: x.detach() for name, x in dict(loss=loss, **terms).items()}
        return terms, rows_of(prediction) if part.labels is None else self._counted(part.labels)

    def _loss(self, prediction: Any, target: Any, labels: Tensor | None, **options: Any) -> Any:
        """`self.loss` at the alpha of this step."""
        options = {**self.loss.options, **options}
        if self.steps_taken < self.alpha_warmup:
            options["alpha"] *= (self.steps_taken + 1) / self.alpha_warmup
        return kd_loss(prediction, target, labels, **options)

    def _predict(self, part: Batch) -> tuple[Any, Any, Tensor | None]:
        """The student's prediction, the teacher's, and Σ weight · mean of the hints, or None."""
        with self.of_student():
            prediction = predict_with(self.student, part.inputs)
        if not self.hints and not checks.reads_teacher(self.loss, part.labels):
            return prediction, detached(prediction), None
        if self.teacher is None:  # of a data set, whose labels are known now
            raise ValueError("teacher must be given for examples without labels, got None")
        with self.of_teacher():
            target = to_device(self.teacher(part), self.engine.device)
        if not self.hints:
            return prediction, target, None
        of_teacher = [x.to(self.engine.device) for x in self.of_teacher.features()]
        features = zip(self.of_student.features(), of_teacher, strict=True)
        hints = zip(self.hints, features, strict=True)
        return prediction, target, sum(hint.weight * hint(*pair).mean() for hint, pair in hints)

    def _prepare_hints(
        self, student: nn.Module, teacher: Any, hints: Sequence[Hint]
    ) -> nn.ModuleList:
        """Hooks on both models; projections, made for the first examples, -> `nn.ModuleList`."""
        hints = copy.deepcopy(list(hints))  # they may be another distiller's too
        models = ("student", student), ("teacher", teacher if hints else None)
        self.of_student, self.of_teacher = (
            Recorder(name, model, [(getattr(hint, name), hint.select) for hint in hints])
            for name, model in models
        )
        teach = self.teacher
        if not hints or teach is None:
            return nn.ModuleList()
        with torch.random.fork_rng(), inference(student):
            torch.manual_seed(self.seed)
            batch = next(self.data.batches(iter([torch.arange(min(2, len(self.data)))])))
            # The student is moved later, with what the hints will have made.
            device = next(student.parameters()).device
            with self.of_student():
                predict_with(student, batch.to(device).inputs)
            with self.of_teacher():
                teach(batch.to(self.engine.device))
            features = zip(self.of_student.features(), self.of_teacher.features(), strict=True)
            for hint, pair in zip(hints, features, strict=True):
                hint.prepare(*(x.to(device) for x in pair))
        return nn.ModuleList(hints)

    def _of_all(self, each: list[Any]) -> list[Any]:
        """A list of every process -> one list."""
        return [x for mine in engine.gathered(self.engine, each) for x in mine]

    def _skip(self, parts: list[Batch]) -> None:
        """Says which rows of a step have no finite loss; if all have one, which examples it had."""
        wrong = []
        for part in parts:
            with torch.no_grad(), self.engine.autocast():
                prediction, target, _ = self._predict(part)
                losses = self._loss(prediction, target, part.labels, reduction="none")
            for example, *position in (~losses.isfinite()).nonzero().tolist():
                wrong.append((part.rows[example].item(), *position))
        wrong = self._of_all(wrong)
        wrong = wrong or self._of_all([(row,) for part in parts for row in part.rows.tolist()])
        self.history.skipped.append((self.steps_taken, wrong))
        names = [f"{row} at {', '.join(map(str, at))}" if at else f"{row}" for row, *at in wrong]
        warnings.warn(
            f"step {self.steps_taken}: loss or gradient is not finite, the step was not taken; "
            f"examples {'; '.join(names[:8])}{'; …' if len(names) > 8 else ''}",
            stacklevel=4,
        )


def _numbers(found: Evaluation | Scores) -> dict[str, float]:
    """An `Evaluation` or `Scores` -> {name: number} for logs."""
    names = (name for name in ("cross_entropy", "errors", "accuracy") if hasattr(found, name))
    return {
        f"test_{name}": torch.as_tensor(getattr(found, name), dtype=torch.float64).mean().item()
        for name in names
    }
