"""What a prediction comes as: logits as a tensor, or one of the sources here.

A source holds tensors and says what they mean; `kd_loss` checks them against each other. Leading
dimensions (...) are the same for student, teacher and labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

import torch
from torch import Tensor

MAX_WEIGHT = 2.0**1000  # their sum is finite

Tail = Literal["bucket", "renormalize"]
Mean = Literal["arithmetic", "geometric"]


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Logits that never exist in full: a hidden state and the layer that projects it.

    logits = cap(logit_scale · (hidden weightᵀ + bias)), with cap(x) = softcap · tanh(x / softcap)
    (Gemma 2, 2024, arXiv:2408.00118, section 2) or the identity. They are computed a chunk of rows
    at a time, in the dtype of `hidden`.

    Attributes:
        hidden: (..., H), float32, bfloat16, float16, or float64 (eager).
        weight: (V, H), of the same dtype. Rows from `vocab_size` on are not used.
        bias: (V,), of the same dtype, or None.
        logit_scale: a finite number.
        softcap: a positive number, or None.
        chunk_rows: rows of these logits that exist at a time, twice over a group; None: as many as
            `chunked` says, by a budget in bytes. A student's are at least as many as its teachers'.
        grad_dtype: what the gradient of `weight` is added up in: None for float32 (float64 for
            float64), or bfloat16 for a weight of bfloat16, which takes half of the memory and loses
            digits with every chunk.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    chunk_rows: int | None = None
    grad_dtype: torch.dtype | None = None


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher's most probable classes: what an inference server or a cache has of it.

    Attributes:
        ids: (..., K), any integer dtype, in any order; −1 pads.
        logprobs: (..., K), the log of their probabilities at T = 1; ignored where `ids` is −1.
        tail: "bucket": all other classes are one more class, on both sides, with the probability
            that is left; "renormalize": the others have none, and what is kept sums to 1.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tail = "bucket"


@dataclass(frozen=True, eq=False)
class Sampled:
    """Classes drawn from a teacher at T = 1: the target is counts / Σ counts, whose expectation is
    the teacher (Anshumann et al. 2025, arXiv:2503.16870, section 4), and the forward KL's gradient
    is unbiased.

    Attributes:
        ids: (..., K), any integer dtype, in any order; −1 pads, duplicates add up.
        counts: (..., K), not negative, integers or floats; ignored where `ids` is −1.
    """

    ids: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several teachers as one: the mean of their distributions at T, each tempered by itself.

    Attributes:
        teachers: logits, `LinearHead`, or, under the arithmetic mean, `TopK(tail="renormalize")`.
        weights: a number for each, not negative, taken relative to their sum; None: all the same.
        mean: "arithmetic", p = Σ w_k p_k, or "geometric", p ∝ Π p_k^{w_k}.
    """

    teachers: Sequence[Tensor | LinearHead | TopK]
    weights: Sequence[float] | None = None
    mean: Mean = "arithmetic"

    def shares(self) -> list[float]:
        """The weights, checked, with a sum of 1."""
        count = len(self.teachers)
        if self.weights is None:
            return [1 / count] * count
        if isinstance(self.weights, str) or not isinstance(self.weights, Sequence):
            raise TypeError(
                f"teacher.weights must be a list of numbers, got {type(self.weights).__name__}"
            )
        if len(self.weights) != count:
            raise ValueError(
                f"teacher.weights must be {count} numbers, one for each teacher, "
                f"got {len(self.weights)}"
            )
        for weight in self.weights:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise TypeError(f"teacher.weights must be numbers, got {type(weight).__name__}")
            if not 0 <= weight <= MAX_WEIGHT:
                raise ValueError(f"teacher.weights must be finite and not negative, got {weight}")
        total = math.fsum(self.weights)
        if not total:
            raise ValueError(f"teacher.weights must not all be 0, got {self.weights}")
        return [weight / total for weight in self.weights]


Dense: TypeAlias = Tensor | LinearHead  # what a student's prediction comes as, and
Prediction: TypeAlias = Dense | TopK | Sampled | Ensemble  # a teacher's


def tensors_of(source: Prediction) -> list[tuple[str, Tensor]]:
    """(name of its field, "" for logits; tensor) of every tensor of a source."""
    if isinstance(source, torch.Tensor):
        return [("", source)]
    if isinstance(source, Ensemble):
        return [
            (f".teachers[{k}]{name}", x)
            for k, member in enumerate(source.teachers)
            for name, x in tensors_of(member)
        ]
    values = [(f".{field.name}", getattr(source, field.name)) for field in fields(source)]
    return [(name, x) for name, x in values if isinstance(x, torch.Tensor)]
