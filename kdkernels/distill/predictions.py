"""What models predict, as `kd_loss` takes it: logits or a source; and who the teacher may be."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from ..backends import eager
from ..sources import Ensemble, LinearHead, Sampled, TopK, tensors_of

SOURCES = (LinearHead, TopK, Sampled, Ensemble)
LOGITS = 2**24  # that exist at a time beside those that a model returns


def predict_with(model, inputs):
    """A model's prediction for inputs (B, ...), or for a dict of keyword arguments.

    Logits (B, ..., V), a source, or an object that has them as `logits`.

    Raises:
        TypeError: the model returns something else.
    """
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(output, (torch.Tensor, *SOURCES)):
        return output
    logits = getattr(output, "logits", None)
    if logits is None:
        raise TypeError(
            f"a model must return logits, a source of kdkernels or an object with logits, "
            f"{type(model).__name__} returns {type(output).__name__}"
        )
    return logits


def detached(prediction):
    """A prediction whose tensors, a head's weight too, require no gradient."""
    if isinstance(prediction, Ensemble):
        return replace(prediction, teachers=[detached(x) for x in prediction.teachers])
    if isinstance(prediction, LinearHead):
        tensors = {name: getattr(prediction, name) for name in ("hidden", "weight", "bias")}
        return replace(
            prediction, **{name: x if x is None else x.detach() for name, x in tensors.items()}
        )
    return prediction.detach() if isinstance(prediction, torch.Tensor) else prediction


def to_device(prediction, device):
    """Logits or a source, with all of its tensors there."""
    if isinstance(prediction, torch.Tensor):
        return prediction.to(device, non_blocking=True)
    if isinstance(prediction, Ensemble):
        return replace(prediction, teachers=[to_device(x, device) for x in prediction.teachers])
    moved = {name[1:]: x.to(device, non_blocking=True) for name, x in tensors_of(prediction)}
    return replace(prediction, **moved)


def rows_of(prediction):
    """How many rows a prediction has: the product of its leading dimensions."""
    _, leading = tensors_of(prediction)[0]
    return leading.shape[:-1].numel()


def logit_chunks(prediction, columns=None, rows=None):
    """The logits of a prediction's rows, a few at a time: those of a head never exist together.

    Args:
        prediction: logits or a `LinearHead`, of leading dimensions (...).
        columns: classes, from the first on; None: all.
        rows: (N,) int64, which of its rows, as they are flat; None: all, in order.

    Yields:
        (rows (n,), logits (n, columns) in at least float32).
    """
    if not isinstance(prediction, (torch.Tensor, LinearHead)):
        raise TypeError(
            f"a prediction must be logits or a LinearHead, got {type(prediction).__name__}"
        )
    if columns is None:
        head = isinstance(prediction, LinearHead)
        columns = len(prediction.weight) if head else prediction.shape[-1]
    prediction = map_rows(prediction, flat)
    if rows is None:
        _, leading = tensors_of(prediction)[0]
        rows = torch.arange(len(leading), device=leading.device)
    for some in rows.split(max(1, LOGITS // columns)) if len(rows) else ():
        yield some, eager.logits(map_rows(prediction, lambda x, some=some: x[some]), columns)


def map_rows(source, function):
    """A source with the function's result for each of its tensors (..., ·) that has rows."""
    if isinstance(source, torch.Tensor):
        return function(source)
    if isinstance(source, Ensemble):
        return replace(source, teachers=[map_rows(x, function) for x in source.teachers])
    names = [name for name in ("hidden", "ids", "logprobs", "counts") if hasattr(source, name)]
    return replace(source, **{name: function(getattr(source, name)) for name in names})


def flat(x):
    """(..., K) -> (N, K), a view where it can be."""
    return x.flatten(0, -2)


@contextlib.contextmanager
def inference(model):
    """Evaluation mode without gradients; afterwards every submodule is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class ModelTeacher:
    """A module, frozen: in evaluation mode, without gradients."""

    def __init__(self, model):
        self.model = model

    def __call__(self, batch):
        with inference(self.model):
            # A head's weight is the model's own parameter, which may require a gradient.
            return detached(predict_with(self.model, batch.inputs))


class StoredTeacher:
    """Predictions that were made before: `rows` (N, ..., V), a tensor, a mapped array, or anything
    whose rows [i] (B,) are logits or a source."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, batch):
        if isinstance(self.rows, torch.Tensor):
            return self.rows[batch.rows.to(self.rows.device)]
        found = self.rows[batch.rows.numpy()]
        return found if isinstance(found, SOURCES) else torch.as_tensor(found)


class SeveralTeachers:
    """The mean of several teachers' distributions: `kdkernels.Ensemble`.

    Args:
        teachers: modules, or predictions that were made before, two or more.
        weights: one for each, in any unit; None: all alike.
        mean: "arithmetic" or "geometric".

    Raises:
        ValueError: None among the teachers.
    """

    def __init__(self, teachers, weights=None, mean="arithmetic"):
        self.teachers, self.weights, self.mean = list(teachers), weights, mean
        if any(each is None for each in self.teachers):
            raise ValueError("teachers must be modules or predictions, got None among them")

    def __call__(self, batch):
        found = [as_teacher(each)(batch) for each in self.teachers]
        return Ensemble(found, self.weights, self.mean)


def as_teacher(teacher, accelerator=None):
    """A module, its predictions, or several of them -> what a batch is asked of. Modules are moved
    to the accelerator's device."""
    if isinstance(teacher, SeveralTeachers):
        for each in teacher.teachers:
            as_teacher(each, accelerator)
        return teacher
    if isinstance(teacher, nn.Module):
        return ModelTeacher(teacher if accelerator is None else teacher.to(accelerator.device))
    return StoredTeacher(teacher)
