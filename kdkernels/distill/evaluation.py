"""What a model in memory answers: its logits, its errors, its cross-entropy."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..functional import kd_loss
from . import checks
from .predictions import inference, predict_with


@dataclass(frozen=True)
class Evaluation:
    """How a model does on labelled examples at T = 1; `labels` (N, ...) give results of (...)."""

    errors: Tensor  # (...), int64: examples whose largest logit is not the label's
    cross_entropy: Tensor  # (...), float32 or float64: mean over the N examples, in nats


def predict(model: nn.Module, inputs: Tensor, *, batch_size: int = 1024) -> Tensor:
    """A model's logits, in evaluation mode and without gradients.

    Args:
        model: a module that maps a batch (B, ...) to logits (B, ..., V).
        inputs: (N, ...), N ≥ 1, on any device.
        batch_size: examples per call of the model.

    Returns:
        The logits (N, ..., V), in the model's dtype, where the model is.
    """
    checks.integer("batch_size", batch_size, low=1)
    device = next(model.parameters(), inputs).device
    with inference(model):
        parts = inputs.split(batch_size)
        return torch.cat([predict_with(model, part.to(device)) for part in parts])


def evaluate(model: nn.Module, inputs: Tensor, labels: Tensor) -> Evaluation:
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
    labels = labels.to(logits.device)
    # alpha = 0: the cross-entropy alone; the second argument is not read.
    rows = kd_loss(logits, logits, labels, alpha=0.0, reduction="none")  # (N, ...)
    return Evaluation((logits.argmax(-1) != labels).sum(0), rows.mean(0))
