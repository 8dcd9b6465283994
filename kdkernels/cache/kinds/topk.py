"""The most probable classes of a row, and the mass of the others."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...files import Array
from ...source_rows import logit_chunks
from ...sources import LinearHead, Tail, TopK
from ..errors import Malformed
from ..sections import Column
from . import checks, entries

# How far log-probabilities may be below the largest of their row, in nats: a step of 2⁻⁶ up to 8,
# then 256 steps to each octave: as exact as matters for what is as improbable.
DEPTHS = np.concatenate(
    [np.arange(512) / 64, *(2.0 ** (3 + k) * (1 + np.arange(256) / 256) for k in range(8))]
)
HALFWAY = (DEPTHS[1:] + DEPTHS[:-1]) / 2
OVER = 1e-2  # what probabilities that came rounded may sum to beyond 1
NOISE = 1e-4  # the same of those read
TAILS = "bucket", "renormalize"


class TopKKind:
    """The K most probable classes, ascending, as gaps; each log-probability as the number of its
    depth below the largest, in `DEPTHS`; the largest, and the log of the mass of all other classes,
    as float32.

    The largest is stored such that all probabilities and the tail sum to 1. A log-probability is
    off by up to half a step of its depth, and by a shift of all of its row, as much at most as the
    largest of these errors: by 2⁻⁶ in all, or 2⁻⁸ of the row's depth where that is more.
    """

    name = "topk"

    def __init__(self, vocab_size: int, k: int, tail: Tail = "bucket") -> None:
        self.vocab_size, self.k, self.tail = vocab_size, k, tail
        self.spec = f"topk:{k}"
        width = entries.width_of(vocab_size - 1)
        self.columns = (
            Column("counts", "<u2", 2),
            Column("gaps", "<u4", width, "entry"),
            Column("below", "<u2", 2, "entry"),
            Column("peak", "<f4", 4),
            Column("tail", "<f4", 4),
        )

    def describe(self) -> dict[str, Any]:
        # With room for the rounding of float32.
        bound = {"logprobs": {"absolute": 2.0**-6 * (1 + 2.0**-8), "of_depth": 2.0**-8}}
        return {"name": "topk", "k": self.k, "tail": self.tail, "bound": bound}

    def encode(self, prediction: TopK | Tensor | LinearHead, seed: int) -> dict[str, Array]:
        """`TopK`, or logits or a `LinearHead` whose most probable classes are taken: n rows."""
        checks.one_of(prediction, TopK, torch.Tensor, LinearHead)
        if not isinstance(prediction, TopK):
            checks.logits(prediction, self.vocab_size)
            top = most_probable(prediction, self.k, self.vocab_size)
            prediction = TopK(top["ids"], top["logprobs"])
        ids = entries.ids_of("ids", prediction.ids, self.vocab_size)  # (n, k)
        logprobs = prediction.logprobs.detach().cpu().double().numpy()
        if logprobs.shape != ids.shape:
            raise ValueError(f"logprobs must be {ids.shape}, as ids, got {logprobs.shape}")
        kept = ids >= 0
        if (np.isnan(logprobs) | (logprobs > OVER))[kept].any():
            raise ValueError("logprobs must not be above 0, and not NaN")
        peak = np.where(kept, logprobs, -np.inf).max(1, initial=-np.inf)
        peak = np.where(np.isfinite(peak), peak, 0.0)
        # What is further below has no probability in any precision.
        kept &= peak[:, None] - logprobs <= DEPTHS[-1]
        counts = kept.sum(1)
        if counts.max(initial=0) > self.k:
            raise ValueError(f"ids must be at most {self.k} of a row, got {counts.max()}")
        row, ids, logprobs = entries.in_order(kept, ids, logprobs)
        gaps = entries.gaps_of(row, ids)
        if (gaps < 0).any():
            wrong = ids[np.flatnonzero(gaps < 0)[0]]
            raise ValueError(f"ids must be different in a row, got {wrong} twice")
        below = np.searchsorted(HALFWAY, peak[row] - logprobs)
        with np.errstate(divide="ignore"):  # rows without classes
            mass = peak + np.log(np.bincount(row, np.exp(logprobs - peak[row]), len(counts)))
            stored = np.log(np.bincount(row, np.exp(-DEPTHS[below]), len(counts)))
            if mass.max(initial=0) > np.log1p(OVER):
                total = np.exp(mass.max())
                raise ValueError(f"probabilities must sum to 1 at most, got {total:.4g}")
            mass = np.minimum(mass, 0.0)
            tail = np.log1p(-np.exp(mass))
        peak = np.where(counts, np.minimum(mass - np.where(counts, stored, 0), 0), 0)
        return {"counts": counts, "gaps": gaps, "below": below, "peak": peak, "tail": tail}

    def decode(self, columns: dict[str, Array]) -> dict[str, Array]:
        """{column: numbers of n rows} -> {"ids": (n, k), "logprobs": (n, k) float32}"""
        counts = columns["counts"]
        here = entries.grid_of(counts)
        gaps = here(columns["gaps"], 0)
        ids = entries.ids_from(gaps, counts, self.vocab_size)
        below = here(columns["below"], 0)
        if below.max(initial=0) >= len(DEPTHS):
            raise Malformed(f"a depth of number {below.max()}")
        logprobs = _NEGATED[below]
        logprobs += columns["peak"][:, None]
        entries.blank(counts, ids, logprobs)
        return {"ids": ids, "logprobs": logprobs}

    def check(self, columns: dict[str, Array], decoded: dict[str, Array]) -> None:
        counts, peak, tail = columns["counts"], columns["peak"], columns["tail"]
        if counts.max(initial=0) > self.k:
            raise Malformed(f"{counts.max()} classes in a row of a cache of {self.k}")
        if not ((peak <= 0) & np.isfinite(peak) & (tail <= 0)).all():
            raise Malformed("log-probabilities that are above 0 or not numbers")
        # In float64, for what is filled up counts exp(0): a float32 sum of 65,535 is off by 2⁻⁸.
        kept = np.exp(decoded["logprobs"]).sum(1, dtype=np.float64)
        kept -= decoded["ids"].shape[1] - counts.astype(np.float64)
        if not (np.abs(kept + np.exp(tail) - 1) <= NOISE).all():
            raise Malformed("probabilities that do not sum to 1")

    def source(
        self, decoded: dict[str, Tensor], tail: Tail | None = None, head: LinearHead | None = None
    ) -> TopK:
        return TopK(decoded["ids"], decoded["logprobs"], tail or self.tail)

    padding = {"ids": -1, "logprobs": 0}


def most_probable(
    prediction: Tensor | LinearHead, k: int, vocab_size: int | None = None
) -> dict[str, Tensor]:
    """Of the rows of logits or a `LinearHead` (..., V), the most probable classes, in that order.

    Returns:
        {"ids": int64, "logprobs": at least float32}, each (rows, k), on the CPU.

    Raises:
        ValueError: k is more than there are classes, or a row is not finite.
    """
    ids, logprobs = [], []
    for _, logits in logit_chunks(prediction, vocab_size):
        if k > logits.shape[-1]:
            raise ValueError(f"k must be in [1, {logits.shape[-1]}], got {k}")
        top, which = logits.topk(k, -1)  # (n, k)
        # Below the largest, so that nothing is lost where all of them are large.
        peak = top[:, :1]
        total = (logits - peak).logsumexp(-1, keepdim=True)
        if not total.isfinite().all():
            raise ValueError("teacher's predictions must be finite or −inf, got NaN or +inf")
        logprobs.append((top - peak - total).clamp_(max=0).cpu())  # rounding
        ids.append(which.cpu())
    return {"ids": torch.cat(ids), "logprobs": torch.cat(logprobs)}


_NEGATED = (-DEPTHS).astype(np.float32)
