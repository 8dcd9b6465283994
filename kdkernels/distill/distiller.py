"""`Distiller`: trains a student on a teacher's soft targets, on hard labels, or on both.

The loss is `kdkernels.KDLoss` and nothing else: a network without a teacher is trained by the same
loop with alpha = 0, where the loss does not read the teacher.
"""

import contextlib
import functools
from dataclasses import dataclass, field

import torch
from torch import nn

from ..functional import kd_loss
from . import checks

ADAM = functools.partial(torch.optim.Adam, lr=1e-3)


@dataclass(frozen=True)
class Evaluation:
    """How a model does on labelled examples at T = 1; `labels` (N, ...) give results of (...)."""

    errors: torch.Tensor  # (...), int64: examples whose largest logit is not the label's
    cross_entropy: torch.Tensor  # (...), float32 or float64: mean over the N examples, in nats


@dataclass
class History:
    """What `Distiller.train` recorded, one entry per recording: the learning curves."""

    steps: list[int] = field(default_factory=list)  # optimiser steps taken so far
    losses: list[float] = field(default_factory=list)  # mean training loss since the last entry
    evaluations: list[Evaluation] = field(default_factory=list)  # empty without test data


class Distiller:
    """Trains a student on examples held in memory.

    Every step takes a batch of rows i, in an order that depends on `seed` only, and descends

        loss(student(inputs[i]), teacher's logits for i, labels[i])

    with `loss` a `kdkernels.KDLoss`: alpha · T² · D(teacher, student) + (1 − alpha) · CE (Hinton,
    Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2). The teacher is
    frozen: evaluated in evaluation mode, without gradients, and not at all where alpha = 0.

    Args:
        student: the module to train, in place. It maps a batch (B, ...) to logits (B, ..., V).
        teacher: a module that maps the same batch to logits; or its logits for all inputs,
            computed before, (N, ..., V), any float dtype; or None, with alpha = 0 and labels.
        inputs: (N, ...), any dtype the student takes. Inputs and labels have to be on the devices
            of the models.
        labels: (N, ...), int64 or int32, shaped as the student's logits without V; or None for an
            unlabelled transfer set, where the loss is T² · D.
        loss: a `KDLoss` that returns a single number (not reduction="none" or return_terms).
        optimizer: called with the student's parameters, returns a `torch.optim.Optimizer`.
        batch_size: examples per step, the last batch of an epoch may be smaller; None takes all.
        seed: an int; fixes the order of the examples, not the student's initial weights or its
            dropout.

    Raises:
        TypeError: an argument of another type than listed.
        ValueError: lengths that do not match, an empty data set, no teacher where one is needed, a
            loss that is no single number.

    Example:
        loss = KDLoss(temperature=4.0, alpha=0.9)
        distiller = Distiller(student, teacher, images, labels, loss=loss, batch_size=128)
        history = distiller.train(1000, test=(test_images, test_labels))
    """

    def __init__(
        self,
        student,
        teacher,
        inputs,
        labels=None,
        *,
        loss,
        optimizer=ADAM,
        batch_size=None,
        seed=0,
    ):
        checks.instance("student", student, nn.Module, "a torch.nn.Module")
        checks.single_loss(loss)
        checks.data(inputs, labels)
        checks.teacher(teacher, inputs, labels, loss)
        batch_size = len(inputs) if batch_size is None else batch_size
        checks.integer("batch_size", batch_size, low=1)
        checks.integer("seed", seed)

        self.student = student
        self.teacher = teacher
        self.inputs = inputs
        self.labels = labels
        self.loss = loss
        self.optimizer = optimizer(student.parameters())
        wanted = "a torch.optim.Optimizer"
        checks.instance("optimizer(...)", self.optimizer, torch.optim.Optimizer, wanted)
        self.history = History()
        self.steps_taken = 0
        generator = torch.Generator().manual_seed(seed)
        self._batches = _batches(len(inputs), batch_size, generator)

    def train(self, steps, *, test=None, record_every=50, on_step=None):
        """Takes `steps` optimiser steps; a further call continues where this one ended.

        Args:
            steps: how many, at least 1.
            test: None, or (inputs, labels) as in `evaluate`, evaluated at every recording.
            record_every: steps between two entries of the history; the last step is always one.
            on_step: None, or called without arguments after every step (a progress bar).

        Returns:
            The `History` of all calls so far, also kept as `self.history`.

        Raises:
            TypeError, ValueError: steps or record_every is no integer of at least 1; and what
                `evaluate` and the loss raise.
        """
        checks.integer("steps", steps, low=1)
        checks.integer("record_every", record_every, low=1)
        self.student.train()
        total, count = 0.0, 0
        for step in range(1, steps + 1):
            total, count = total + self._step(), count + 1
            if step % record_every == 0 or step == steps:
                # The only place that reads a number back from the device.
                self.history.steps.append(self.steps_taken)
                self.history.losses.append(float(total) / count)
                if test is not None:
                    self.history.evaluations.append(evaluate(self.student, *test))
                total, count = 0.0, 0
            if on_step is not None:
                on_step()
        return self.history

    def _step(self):
        """One optimiser step on the next batch -> its loss, (), detached."""
        rows = next(self._batches).to(self.inputs.device)  # (B,)
        batch = self.inputs[rows]  # (B, ...)
        labels = None if self.labels is None else self.labels[rows]
        logits = self.student(batch)  # (B, ..., V)
        loss = self.loss(logits, self._teacher_logits(logits, batch, rows), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps_taken += 1
        return loss.detach()

    def _teacher_logits(self, logits, batch, rows):
        """logits (B, ..., V) of the student, batch (B, ...), rows (B,) -> (B, ..., V)."""
        if not checks.reads_teacher(self.loss, self.labels):
            return logits.detach()  # a stand-in of the right shape
        if isinstance(self.teacher, torch.Tensor):
            return self.teacher[rows]
        with _inference(self.teacher):
            return self.teacher(batch)


def predict(model, inputs, *, batch_size=1024):
    """A model's logits, in evaluation mode and without gradients.

    Args:
        model: a module that maps a batch (B, ...) to logits (B, ..., V).
        inputs: (N, ...), N ≥ 1.
        batch_size: examples per call of the model.

    Returns:
        The logits (N, ..., V), in the model's dtype.
    """
    checks.integer("batch_size", batch_size, low=1)
    with _inference(model):
        return torch.cat([model(batch) for batch in inputs.split(batch_size)])


def evaluate(model, inputs, labels):
    """A model's errors and cross-entropy on labelled examples, at T = 1.

    T belongs to the training: a distilled student is used, and judged, at T = 1 (Hinton et al.
    2015, section 2).

    Args:
        model: a module that maps a batch (B, ...) to logits (B, ..., V).
        inputs: (N, ...), N ≥ 1.
        labels: (N, ...), int64 or int32, shaped as the logits without V.

    Returns:
        An `Evaluation`.

    Raises:
        TypeError, ValueError, IndexError: labels that do not fit the logits, as from `kd_loss`.
    """
    logits = predict(model, inputs)  # (N, ..., V)
    # alpha = 0: the cross-entropy alone; the second argument is not read.
    rows = kd_loss(logits, logits, labels, alpha=0.0, reduction="none")  # (N, ...)
    return Evaluation((logits.argmax(-1) != labels).sum(0), rows.mean(0))


@contextlib.contextmanager
def _inference(model):
    """Evaluation mode without gradients; afterwards every submodule is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _batches(count, batch_size, generator):
    """Yields the row indices (B,) of batch after batch, every epoch in a new order."""
    while True:
        yield from torch.randperm(count, generator=generator).split(batch_size)
