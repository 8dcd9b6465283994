"""What the Triton kernels know of an objective: numbers worked out once for all rows."""

import math
import struct
from typing import NamedTuple

from ..objective import Objective


class Cap(NamedTuple):
    """What makes logits of a projection: see arithmetic.py."""

    scale: float
    cap: float
    rate: float


NO_CAP = Cap(1.0, 0.0, 0.0)


class Task(NamedTuple):
    """csrc/cuda/task.h: RowTask. Pairs of floats for what one float is too short for.

    Floats all of them, because Triton compiles anew for some values of integers in tuples.
    """

    power: float  # T where e^s is taken as that power of e^{s/T}, else 0
    main: float  # this launch writes loss and gradient
    others: float  # and the one before has written the term that this one does not compute
    want_terms: float  # also of rows of weight 0
    classes: float  # V
    rate: float  # log2(e) / T
    rate_lo: float
    temperature: float
    temperature_lo: float
    inv_temperature: float
    w_p: float  # of the mixture m = w_p p + w_q q
    w_q: float
    far_from: float  # from which D on, in units of 1 + |log(z_s / z_t)|, a row can be far apart
    far_limit: float  # and up to which one
    far_unit: float  # of its slopes, and what the sums of them have too much
    far_offset: float
    grad_distill: float  # distill_weight / T
    grad_distill_lo: float
    grad_hard: float
    grad_hard_lo: float
    distill_weight: float
    hard_weight: float
    distill_scale: float
    label_smoothing: float
    smoothing: float  # ε / V
    smoothing_lo: float
    smoothed_label: float  # ε (1 − 1 / V)
    student_cap: Cap
    teacher_cap: Cap


def _split(x: float) -> tuple[float, float]:
    hi = struct.unpack("f", struct.pack("f", x))[0]
    return hi, x - hi


def _weights(divergence: str, beta: float) -> tuple[float, float]:
    """Of teacher and student in the mixture."""
    return (1 - beta, beta) if divergence == "skew_reverse_kl" else (beta, 1 - beta)


def _far_limit(divergence: str, w_p: float, w_q: float) -> float:
    """As in csrc/common/far.h."""
    if divergence in ("forward_kl", "reverse_kl"):
        return 1e30
    smallest_p = 1 / 6 if divergence == "jsd" else 1 / 1024
    largest_q = 0.5 if divergence == "skew_reverse_kl" else 1
    if divergence == "tvd" or w_p < smallest_p or not 1 / 1024 <= w_q <= largest_q:
        return 0.0
    if divergence == "jsd":
        return 0.8 * -(w_p * math.log(w_p) + w_q * math.log(w_q))
    return 0.8 * -math.log(w_p if divergence == "skew_forward_kl" else w_q)


def _far_unit(divergence: str, w_p: float, w_q: float, temperature: float) -> float:
    if divergence == "reverse_kl":
        return 1 / temperature
    if divergence == "skew_forward_kl":
        return w_q / w_p
    return w_q * math.log(2) if divergence == "jsd" else math.log(2)


def _far_offset(divergence: str, w_q: float) -> float:
    if divergence == "jsd":
        return -math.log2(w_q)
    return -math.log2(w_q) - math.log2(math.e) if divergence == "skew_reverse_kl" else 0.0


def _cap(scale: float, cap: float) -> Cap:
    return Cap(scale, cap, scale / cap if cap else 0.0)


def make_task(objective: Objective, want_terms: bool, classes: int | None = None) -> Task:
    """`classes`: V, where the objective counts the columns of a shard."""
    divergence, classes = objective.divergence, classes or objective.vocab_size
    w_p, w_q = _weights(divergence, objective.beta)
    T, T_lo = _split(objective.temperature)
    rate, rate_lo = _split(math.log2(math.e) / objective.temperature)
    grad_distill, grad_distill_lo = _split(objective.distill_weight / objective.temperature)
    grad_hard, grad_hard_lo = _split(objective.hard_weight)
    smoothing, smoothing_lo = _split(objective.label_smoothing / max(classes, 1))
    return Task(
        power=objective.temperature if objective.temperature in (1, 2, 3, 4) else 0.0,
        main=1.0,
        others=0.0,
        want_terms=float(want_terms),
        classes=float(classes),
        rate=rate,
        rate_lo=rate_lo,
        temperature=T,
        temperature_lo=T_lo,
        inv_temperature=1 / objective.temperature,
        w_p=w_p,
        w_q=w_q,
        far_from=1 / 24 if divergence == "jsd" else 1 / 12,
        far_limit=_far_limit(divergence, w_p, w_q),
        far_unit=_far_unit(divergence, w_p, w_q, objective.temperature),
        far_offset=_far_offset(divergence, w_q),
        grad_distill=grad_distill,
        grad_distill_lo=grad_distill_lo,
        grad_hard=grad_hard,
        grad_hard_lo=grad_hard_lo,
        distill_weight=objective.distill_weight,
        hard_weight=objective.hard_weight,
        distill_scale=objective.distill_scale,
        label_smoothing=objective.label_smoothing,
        smoothing=smoothing,
        smoothing_lo=smoothing_lo,
        smoothed_label=objective.label_smoothing * (1 - 1 / max(classes, 1)),
        student_cap=_cap(objective.student_scale, objective.student_cap),
        teacher_cap=_cap(objective.teacher_scale, objective.teacher_cap),
    )
