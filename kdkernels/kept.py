"""The teacher's distribution over the classes it knows: `TopK` and `Sampled`, brought in order.

    kept = keep(TopK(ids, logprobs), labels, objective)

The row operators, eager's too, take a sparse teacher in this one form: every class at most once,
ascending, its log-probability at T, and the log-probability of all other classes together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .objective import Objective
from .ops import LIBRARY
from .sources import Sampled, TopK

INF = float("inf")
# How much more than 1 the probabilities may sum to, for the rounding of log-probabilities.
SURPLUS = {torch.float16: 2**-7, torch.bfloat16: 2**-4}
DEFAULT_SURPLUS = 2.0**-10


@dataclass(frozen=True, eq=False)
class Kept:
    """K >= 1. A row without classes has D = 0: `rest` is all of it, on both sides."""

    ids: torch.Tensor  # (L, K) or (B, L, K), int64, ascending; V where there is no class
    log_p: torch.Tensor  # (L, K) or (B, L, K), float64; −inf where there is no class
    log_rest: torch.Tensor  # (L) or (B, L), float64: of all other classes together

    def fields(self) -> list[Tensor]:
        return [self.ids, self.log_p, self.log_rest]

    def at(self, index: Any) -> Kept:
        """Some of the rows."""
        return Kept(*(x[index] for x in self.fields()))

    def dense(self, columns: int, dtype: torch.dtype) -> Tensor:
        """log p (…, V) of a teacher whose other classes have no probability."""
        shape = *self.ids.shape[:-1], columns + 1
        log_p = torch.full(shape, -INF, dtype=dtype, device=self.ids.device)
        return log_p.scatter_(-1, self.ids, self.log_p.to(dtype))[..., :columns]


def keep(teacher: TopK | Sampled, labels: Tensor | None, objective: Objective) -> Kept:
    """teacher (L, K) or (B, L, K), labels (L) or (B, L) or None -> Kept.

    Rows of `ignore_index` are empty, whatever they hold. On the CPU other ids and values are
    checked; elsewhere, where nobody waits for the device, a row of bad ones is NaN.

    Raises:
        IndexError: an id outside [0, V) that is not −1.
        ValueError: a duplicate id of `TopK`; probabilities that sum to more than 1; a count that is
            negative, infinite or NaN.
    """
    counts = None if labels is None else labels != objective.ignore_index
    if isinstance(teacher, Sampled):
        values, kind = teacher.counts, "counts"
    else:
        values, kind = teacher.logprobs, teacher.tail
    arguments = counts, kind, objective.temperature, objective.vocab_size
    return Kept(*torch.ops.kdkernels.keep(teacher.ids, values, *arguments))


LIBRARY.define(
    "keep(Tensor ids, Tensor values, Tensor? counts, str kind, float temperature, int vocab_size) "
    "-> (Tensor ids, Tensor log_p, Tensor log_rest)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("kdkernels::keep", lib=LIBRARY)
def _fake_keep(
    ids: Tensor,
    values: Tensor,
    counts: Tensor | None,
    kind: str,
    temperature: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = *ids.shape[:-1], max(ids.shape[-1], 1)
    return (
        ids.new_empty(shape, dtype=torch.int64),
        values.new_empty(shape, dtype=torch.float64),
        values.new_empty(shape[:-1], dtype=torch.float64),
    )


@torch.library.impl(LIBRARY, "keep", "CompositeExplicitAutograd")
def _keep(
    ids: Tensor,
    values: Tensor,
    counts: Tensor | None,
    kind: str,
    temperature: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    surplus = SURPLUS.get(values.dtype, DEFAULT_SURPLUS)
    if not ids.shape[-1]:
        ids, values = (x.new_full((*x.shape[:-1], 1), -1) for x in (ids, values))
    ids = ids.long()
    absent = ids == -1
    if counts is not None:
        absent |= ~counts[..., None]
    outside = ~absent & ((ids < 0) | (ids >= vocab_size))
    _refuse(IndexError, f"ids must be in [0, {vocab_size}) or -1", outside, ids)
    ids = ids.masked_fill(absent | outside, vocab_size)
    values = values.double()
    if kind == "counts":
        wrong = ~absent & ~((values >= 0) & (values < INF))
        _refuse(ValueError, "counts must be finite and not negative", wrong, values)
        ids, log_p = _drawn(ids, values.masked_fill(absent, 0.0), vocab_size)
    else:
        ids, order = ids.sort(-1)
        log_p = values.gather(-1, order)
        wrong = (ids == F.pad(ids[..., :-1], (1, 0), value=-1)) & (ids < vocab_size)
        _refuse(ValueError, "ids must differ from each other", wrong, ids)
    absent = ids == vocab_size
    log_p = log_p.masked_fill(absent, -INF)
    log_rest = torch.where(absent.all(-1), 0.0, -INF).double()
    if kind == "renormalize":
        # The maximum subtracted before the division: no T overflows it.
        log_p = ((log_p - log_p.amax(-1, keepdim=True)) / temperature).log_softmax(-1)
    elif kind == "bucket":
        total = log_p.exp().sum(-1)
        whole = ~absent[..., :vocab_size].any(-1) & (ids.shape[-1] >= vocab_size)
        off = (total > 1 + surplus) | (whole & (total < 1 - surplus))
        _refuse(ValueError, "the probabilities of a row must sum to 1, or less", off, total)
        # What rounding put above 1, or what no other class is there to take.
        closed = whole | (total >= 1)
        log_p = torch.where(closed[..., None], log_p - total[..., None].log(), log_p)
        log_rest = torch.where(closed, -INF, torch.log1p(-total))
        wrong = wrong | off[..., None]
    poison = torch.where((outside | wrong).any(-1), float("nan"), 0.0)
    log_p = log_p.masked_fill(absent, -INF) + poison[..., None]
    return ids, log_p, log_rest + poison


def _drawn(ids: Tensor, counts: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """ids and counts (..., K) -> ids and log(counts / Σ counts), duplicates added up."""
    ids, order = ids.sort(-1)
    new = ids != F.pad(ids[..., :-1], (1, 0), value=-1)
    place = new.cumsum(-1) - 1
    counts = torch.zeros_like(counts).scatter_add(-1, place, counts.gather(-1, order))
    ids = torch.full_like(ids, vocab_size).scatter(-1, place, ids)
    total = counts.sum(-1, keepdim=True)
    return ids.masked_fill(total == 0, vocab_size), (counts / total).log()


def _refuse(error: type[Exception], wanted: str, wrong: Tensor, values: Tensor) -> None:
    """Raise for the first of `values` (L, …) or (B, L, …) that is wrong, where that is known."""
    if wrong.device.type == "cpu" and wrong.any():
        first = int(wrong.flatten().to(torch.uint8).argmax())
        row = first // max(wrong.shape[-1] if wrong.dim() == values.dim() else 1, 1)
        raise error(f"teacher: {wanted}, got {values.flatten()[first].item()} at row {row}")
