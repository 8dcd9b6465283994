"""Logits or a source as values: detached, on another device, row by row, some logits at a time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .backends import eager
from .sources import Ensemble, LinearHead, Prediction, tensors_of

LOGITS = 2**24  # that exist at a time beside those that a model returns


def detached(prediction: Prediction) -> Any:
    """A prediction whose tensors, a head's weight too, require no gradient."""
    if isinstance(prediction, Ensemble):
        return replace(prediction, teachers=[detached(x) for x in prediction.teachers])
    if isinstance(prediction, LinearHead):
        x = prediction
        bias = None if x.bias is None else x.bias.detach()
        return replace(x, hidden=x.hidden.detach(), weight=x.weight.detach(), bias=bias)
    return prediction.detach() if isinstance(prediction, torch.Tensor) else prediction


def to_device(prediction: Prediction, device: torch.device) -> Any:
    """Logits or a source, with all of its tensors there."""
    if isinstance(prediction, torch.Tensor):
        return prediction.to(device, non_blocking=True)
    if isinstance(prediction, Ensemble):
        return replace(prediction, teachers=[to_device(x, device) for x in prediction.teachers])
    moved: Any = {name[1:]: x.to(device, non_blocking=True) for name, x in tensors_of(prediction)}
    return replace(prediction, **moved)


def rows_of(prediction: Prediction) -> int:
    """How many rows a prediction has: the product of its leading dimensions."""
    _, leading = tensors_of(prediction)[0]
    return leading.shape[:-1].numel()


def logit_chunks(
    prediction: Prediction, columns: int | None = None, rows: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
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
        wide = prediction.weight.T if isinstance(prediction, LinearHead) else prediction
        columns = wide.shape[-1]
    prediction = map_rows(prediction, flat)
    if rows is None:
        _, leading = tensors_of(prediction)[0]
        rows = torch.arange(len(leading), device=leading.device)
    for some in rows.split(max(1, LOGITS // columns)) if len(rows) else ():
        yield some, eager.logits(map_rows(prediction, partial(take_rows, some)), columns)


def map_rows(source: Prediction, function: Callable[[Tensor], Tensor]) -> Any:
    """A source with the function's result for each of its tensors (..., ·) that has rows."""
    if isinstance(source, torch.Tensor):
        return function(source)
    if isinstance(source, Ensemble):
        return replace(source, teachers=[map_rows(x, function) for x in source.teachers])
    names = [name for name in ("hidden", "ids", "logprobs", "counts") if hasattr(source, name)]
    found: Any = {name: function(getattr(source, name)) for name in names}
    return replace(source, **found)


def take_rows(rows: Tensor, x: Tensor) -> Tensor:
    """x (N, ·) at rows (n,) -> (n, ·)"""
    return x[rows]


def flat(x: Tensor) -> Tensor:
    """(..., K) -> (N, K), a view where it can be."""
    return x.flatten(0, -2)
