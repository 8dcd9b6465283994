"""What models predict, as `kd_loss` takes it: logits or a source; and who the teacher may be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from ..cache import TeacherCache
from ..source_rows import detached
from ..sources import Ensemble, LinearHead, Mean, Prediction, Sampled, TopK
from .batches import Batch
from .engine import is_sharded, whole


class Rows(Protocol):
    """Predictions that were made before: a row for each input, logits or of a source."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


SOURCES = (LinearHead, TopK, Sampled, Ensemble)


def predict_with(model: nn.Module, inputs: Any) -> Any:
    """A model's prediction for inputs (B, ...), or for a dict of keyword arguments.

    Logits (B, ..., V), a source, or an object that has them as `logits`.

    Raises:
        TypeError: the model returns something else.
        ValueError: a head whose weight FSDP2 has freed since.
    """
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(output, LinearHead):
        return _readable(output)
    if isinstance(output, (torch.Tensor, *SOURCES)):
        return output
    logits = getattr(output, "logits", None)
    if logits is None:
        raise TypeError(
            f"a model must return logits, a source of kdkernels or an object with logits, "
            f"{type(model).__name__} returns {type(output).__name__}"
        )
    return logits


def _readable(head: LinearHead) -> LinearHead:
    """A head whose weight can be read, also where FSDP2 shards it."""
    if is_sharded(head.weight):
        if torch.is_grad_enabled():  # `kd_loss` gathers it, and shards its gradient
            return head
        return replace(head, weight=whole(head.weight), bias=whole(head.bias))
    if head.weight.numel() and not head.weight.untyped_storage().size():
        raise ValueError(
            "a sharded model that returns a LinearHead must be one of fully_shard(..., "
            "reshard_after_forward=False) where the head's weight is: it is read afterwards"
        )
    return head


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device | None:
    """Where a module's first parameter is; None of one that has none."""
    return next((x.device for x in model.parameters()), None)


class ModelTeacher:
    """A module, frozen: in evaluation mode, without gradients, on the device where it is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, batch: Batch) -> Prediction:
        if (device := device_of(self.model)) is not None:
            batch = batch.to(device)
        with inference(self.model):
            # A head's weight is the model's own parameter, which may require a gradient.
            prediction: Prediction = detached(predict_with(self.model, batch.inputs))
            return prediction


class StoredTeacher:
    """Predictions that were made before: `rows` (N, ..., V), a tensor, a mapped array, or anything
    whose rows [i] (B,) are logits or a source."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __call__(self, batch: Batch) -> Prediction:
        if isinstance(self.rows, torch.Tensor):
            return self.rows[batch.rows.to(self.rows.device)]
        found: Any = self.rows[batch.rows.numpy()]
        return found if isinstance(found, SOURCES) else torch.as_tensor(found)


class CachedTeacher(nn.Module):
    """A `kdkernels.cache.TeacherCache`, which finds what a batch is by its content.

    Of a cache of token ids, that are the inputs (B, L) themselves, or their "input_ids", with an
    "attention_mask" that says which of them count, or without one and "position_ids" (B, L), at
    whose zeros samples begin; of a cache of values, the inputs (B, ...).

    Args:
        cache: of the predictions.
        model: None, or the teacher, whose features hints compare; its predictions are not used.
    """

    def __init__(self, cache: TeacherCache, model: nn.Module | None = None) -> None:
        super().__init__()
        self.cache, self.model = cache, model

    def forward(self, batch: Batch) -> Prediction:
        wanted = found_by(self.cache, batch.inputs)
        if self.model is not None:
            ModelTeacher(self.model)(batch)
        return self.cache.to(wanted[0].device).read(*wanted)


def found_by(cache: TeacherCache, inputs: Any) -> list[Any]:
    """What a cache finds inputs by: (them,), or (ids, attention mask).

    Raises:
        TypeError: they have none.
    """
    wanted, of_tokens = [inputs], cache.description["sample"] == "tokens"
    if of_tokens and isinstance(inputs, Mapping):
        wanted = [inputs.get("input_ids"), inputs.get("attention_mask")]
        positions = inputs.get("position_ids")
        if wanted[1] is None and positions is not None and positions.shape == wanted[0].shape:
            wanted[1] = 1 + (positions == 0).cumsum(-1)  # of a row of several samples, no padding
    if not isinstance(wanted[0], torch.Tensor) or (of_tokens and wanted[0].is_floating_point()):
        what = "token ids, or have input_ids" if of_tokens else "a tensor"
        got = getattr(wanted[0], "dtype", type(inputs).__name__)
        raise TypeError(f"inputs of this cached teacher must be {what}, got {got}")
    return wanted


class SeveralTeachers:
    """The mean of several teachers' distributions: `kdkernels.Ensemble`.

    Args:
        teachers: modules, or predictions that were made before, two or more.
        weights: one for each, in any unit; None: all alike.
        mean: "arithmetic" or "geometric".

    Raises:
        ValueError: None among the teachers.
    """

    def __init__(
        self,
        teachers: Iterable[Any],
        weights: Sequence[float] | None = None,
        mean: Mean = "arithmetic",
    ) -> None:
        self.teachers, self.weights, self.mean = list(teachers), weights, mean
        if any(each is None for each in self.teachers):
            raise ValueError("teachers must be modules or predictions, got None among them")

    def __call__(self, batch: Batch) -> Ensemble:
        found = [as_teacher(each)(batch) for each in self.teachers]
        return Ensemble(found, self.weights, self.mean)


Teacher: TypeAlias = nn.Module | Rows | SeveralTeachers


def as_teacher(teacher: Any, accelerator: Any = None) -> Callable[[Batch], Any]:
    """A module, its predictions, or several of them -> what a batch is asked of. The head of a
    cache, and modules that lie on the CPU, are moved to the accelerator's device."""
    if isinstance(teacher, SeveralTeachers):
        for each in teacher.teachers:
            as_teacher(each, accelerator)
        return teacher
    if isinstance(teacher, TeacherCache):
        teacher = CachedTeacher(teacher)
    if isinstance(teacher, nn.Module) and accelerator is not None:
        parameter = next(teacher.parameters(), None)
        # On another GPU, or sharded, it is where it shall be.
        if parameter is None or (parameter.device.type == "cpu" and not is_sharded(parameter)):
            teacher = teacher.to(accelerator.device)
    if isinstance(teacher, CachedTeacher):
        return teacher
    return ModelTeacher(teacher) if isinstance(teacher, nn.Module) else StoredTeacher(teacher)


def checksum(teacher: Any) -> Any:
    """Of the cache that a teacher of `as_teacher` reads: text; a list of several's; else None."""
    if isinstance(teacher, SeveralTeachers):
        return [checksum(as_teacher(each)) for each in teacher.teachers]
    return teacher.cache.checksum if isinstance(teacher, CachedTeacher) else None
