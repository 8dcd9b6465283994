"""Classes of a row and what is stored with each: as many in a row as there are."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...files import Array
from ..errors import Malformed

MOST_CLASSES = 2**32


def width_of(largest: int) -> int:
    """Bytes that hold the numbers up to it."""
    return max(1, (largest.bit_length() + 7) // 8)


def ids_of(name: str, ids: Tensor, vocab_size: int) -> Array:
    """(n, k), −1 pads -> int64"""
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() != 2:
        raise TypeError(
            f"{name} must be integers of shape (n, k), got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    found: Array = ids.detach().cpu().numpy().astype(np.int64)
    if found.size and not -1 <= found.min() <= found.max() < vocab_size:
        raise IndexError(
            f"{name} must be in [-1, {vocab_size}), got {found.min()} to {found.max()}"
        )
    return found


def in_order(kept: Array, ids: Array, *others: Array) -> tuple[Array, ...]:
    """(n, k) each -> row (m,), ids (m,) and others (m,) where kept, by row and id"""
    order = np.argsort(np.where(kept, ids, MOST_CLASSES), 1, kind="stable")
    kept = np.take_along_axis(kept, order, 1)
    return np.nonzero(kept)[0], *(np.take_along_axis(x, order, 1)[kept] for x in (ids, *others))


def gaps_of(row: Array, ids: Array) -> Array:
    """row, ids: (m,), sorted -> (m,): how many classes lie between an id and the one before it in
    its row; −1 for the same id again."""
    before = np.concatenate([[-1], ids[:-1]])
    starts = np.concatenate([[True], row[1:] != row[:-1]])[: len(row)]
    gaps: Array = ids - np.where(starts, -1, before[: len(ids)]) - 1
    return gaps


def grid_of(counts: Array) -> Callable[[Array, int], Array]:
    """counts (n,) -> a function: (Σ counts,) -> (n, largest count, at least 1), filled up."""
    shape = len(counts), max(1, int(counts.max(initial=0)))
    if (counts == shape[1]).all():
        return lambda numbers, fill: numbers.reshape(shape)
    here = np.arange(shape[1]) < counts[:, None]

    def grid(numbers: Array, fill: int) -> Array:
        found = np.full(shape, fill, numbers.dtype)
        found[here] = numbers
        return found

    return grid


def ids_from(gaps: Array, counts: Array, vocab_size: int) -> Array:
    """gaps (n, k) -> ids (n, k), int32 where that suffices.

    Raises:
        Malformed: one is outside of the vocabulary.
    """
    k = gaps.shape[1]
    # The sums are exact: bounded by the bytes of a gap, or, of 64 bits, by those and K.
    small = k << 8 * width_of(vocab_size - 1) < 2**32
    ids: Array = np.cumsum(gaps, 1, dtype=np.uint32 if small else np.uint64)
    ids += np.arange(k, dtype=ids.dtype)
    last = ids[np.arange(len(ids)), np.maximum(counts.astype(np.int64), 1) - 1]
    if (last[counts > 0] >= vocab_size).any():
        raise Malformed(f"ids must be below {vocab_size}, got {last[counts > 0].max()}")
    return ids.astype(np.int32 if vocab_size <= 2**31 else np.int64, copy=False)


def blank(counts: Array, ids: Array, values: Array) -> None:
    """Fills what is beyond the entries of a row, in place."""
    if not (counts == ids.shape[1]).all():
        beyond = np.arange(ids.shape[1]) >= counts[:, None]
        ids[beyond], values[beyond] = -1, 0
