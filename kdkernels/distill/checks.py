"""What the loop requires of its arguments: typed errors that say what is wanted and what came."""

import torch
from torch import nn

from ..modules import KDLoss


def instance(name, value, kind, wanted):
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")


def integer(name, value, low=None, high=None):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if high is not None and not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def single_loss(loss):
    """A loss that is one number to descend."""
    instance("loss", loss, KDLoss, "a kdkernels.KDLoss")
    for option, wrong in (("reduction", "none"), ("return_terms", True)):
        if loss.options[option] == wrong:
            raise ValueError(f"loss must return a single number, got {option}={wrong!r}")


def reads_teacher(loss, labels):
    """Whether the teacher enters the loss: without labels it is T² · D, whatever alpha is."""
    return labels is None or loss.options["alpha"] > 0


def data(inputs, labels):
    """inputs (N, ...), labels (N, ...) or None; the loss checks the rest of the labels."""
    instance("inputs", inputs, torch.Tensor, "a tensor (N, ...)")
    if inputs.dim() == 0 or len(inputs) == 0:
        raise ValueError(f"inputs must be (N, ...) with N ≥ 1, got shape {tuple(inputs.shape)}")
    if labels is not None:
        instance("labels", labels, torch.Tensor, "a tensor (N, ...) or None")
        _one_row_each("labels", labels, inputs)


def teacher(teacher, inputs, labels, loss):
    """A module, its logits (N, ..., V), or None where the loss does not read it."""
    if teacher is None:
        if reads_teacher(loss, labels):
            raise ValueError(
                "teacher must be a module or its logits, got None, which goes with labels and a "
                "loss with alpha=0 only"
            )
    elif isinstance(teacher, torch.Tensor):
        if not teacher.is_floating_point():
            raise TypeError(f"teacher must be logits of a float dtype, got {teacher.dtype}")
        _one_row_each("teacher", teacher, inputs)
    else:
        instance("teacher", teacher, nn.Module, "a torch.nn.Module, its logits or None")


def _one_row_each(name, value, inputs):
    if value.dim() == 0 or len(value) != len(inputs):
        raise ValueError(
            f"{name} must have a row for each of the {len(inputs)} inputs, got shape "
            f"{tuple(value.shape)}"
        )
