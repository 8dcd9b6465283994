"""What the loop requires of its arguments: typed errors that say what is wanted and what came."""

import importlib
import math
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from ..cache import TeacherCache
from ..modules import KDLoss
from .batches import Streamed
from .predictions import SeveralTeachers, found_by


def instance(name: str, value: object, kind: type, wanted: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")


def integer(name: str, value: object, low: int | None = None, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if low is not None and high is not None and not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def installed(*packages: str) -> None:
    """Packages of the extra `train`, before the work that needs them in the end."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"{error}: pip install 'kdkernels[train]'") from error


def single_loss(loss: Any) -> None:
    """A loss that is one number to descend."""
    instance("loss", loss, KDLoss, "a kdkernels.KDLoss")
    for option, wrong in (("reduction", "none"), ("return_terms", True)):
        if loss.options[option] == wrong:
            raise ValueError(f"loss must return a single number, got {option}={wrong!r}")


def reads_teacher(loss: KDLoss[Any], labels: torch.Tensor | None) -> bool:
    """Whether the teacher enters the loss: without labels it is T² · D, whatever alpha is."""
    return labels is None or loss.options["alpha"] > 0


def data(inputs: Any, labels: torch.Tensor | None) -> None:
    """inputs (N, ...), labels (N, ...) or None; the loss checks the rest of the labels. Or a map-
    style data set, whose examples have their own."""
    if isinstance(inputs, (Dataset, Streamed)):
        examples: Any = inputs
        if labels is not None:
            raise ValueError("labels must be None for a Dataset, whose examples have their own")
        if isinstance(inputs, IterableDataset):
            raise TypeError("inputs must be a map-style Dataset, got an IterableDataset")
        if len(examples) == 0:
            raise ValueError("inputs must have an example at least, got an empty Dataset")
        return
    instance("inputs", inputs, torch.Tensor, "a tensor (N, ...) or a torch Dataset")
    if inputs.dim() == 0 or len(inputs) == 0:
        raise ValueError(f"inputs must be (N, ...) with N ≥ 1, got shape {tuple(inputs.shape)}")
    if labels is not None:
        instance("labels", labels, torch.Tensor, "a tensor (N, ...) or None")
        _one_row_each("labels", labels, inputs)


def teacher(given: Any, inputs: Any, labels: torch.Tensor | None, loss: Any) -> None:
    """A module, its predictions for all inputs or a cache of them, several teachers, or None where
    none is read."""
    wanted = (
        "a torch.nn.Module, its predictions for all inputs, a TeacherCache, SeveralTeachers or None"
    )
    if given is None:
        # Whether the examples of a data set have labels is known when they come.
        unread = loss.options["alpha"] == 0 and not isinstance(inputs, torch.Tensor)
        if not unread and reads_teacher(loss, labels):
            raise ValueError(
                "teacher must be a module or its logits, got None, which goes with labels and a "
                "loss with alpha=0 only"
            )
    elif isinstance(given, SeveralTeachers):
        for each in given.teachers:
            teacher(each, inputs, labels, loss)
    elif isinstance(given, TeacherCache):
        if isinstance(inputs, torch.Tensor):
            found_by(given, inputs)
    elif isinstance(given, torch.Tensor):
        if not given.is_floating_point():
            raise TypeError(f"teacher must be logits of a float dtype, got {given.dtype}")
        _one_row_each("teacher", given, inputs)
    elif not isinstance(given, nn.Module):
        rows = hasattr(given, "__getitem__") and hasattr(given, "__len__")
        if not rows or isinstance(given, (str, bytes, dict)):
            raise TypeError(f"teacher must be {wanted}, got {type(given).__name__}")
        if len(given) != len(inputs):
            raise ValueError(
                f"teacher must have a row for each of the {len(inputs)} inputs, got {len(given)}"
            )


def _one_row_each(name: str, value: torch.Tensor, inputs: Any) -> None:
    if value.dim() == 0 or len(value) != len(inputs):
        raise ValueError(
            f"{name} must have a row for each of the {len(inputs)} inputs, got shape "
            f"{tuple(value.shape)}"
        )
