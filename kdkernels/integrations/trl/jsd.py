"""The generalised JSD of logits, as `GKDTrainer` and `GOLDTrainer` call it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...functional import kd_loss
from ...objective import check_choice, number

IGNORED = -100  # TRL's label of tokens that do not count
REDUCTIONS = ("batchmean", "sum", "mean", "none")


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | float | None = None,
    logits_are_probs: bool = False,
) -> Tensor:
    """`GKDTrainer.generalized_jsd_loss`, and with `logits_are_probs` `GOLDTrainer`'s.

    Args:
        student_logits: (..., V), any dtype that `kd_loss` takes.
        teacher_logits: (..., V). Where they require grad they get one, as in TRL.
        labels: (...), of which only matters where they are −100: these tokens do not count.
        beta: in [0, 1].
        temperature: T, of both sides.
        reduction: "batchmean": the mean of the tokens that count, but without labels Σ / size(0),
            which is Σ / B; "sum"; "mean", over the tokens that count and classes; "none", what each
            class adds, (..., V), or (tokens that count, V) with labels.
        num_items_in_batch: Σ is divided by this instead, whatever the reduction.
        logits_are_probs: both are probabilities, of some of the classes perhaps, and are not
            normalised; those under 1e-8 count as 1e-8, and there is no T.

    Returns:
        What TRL returns, in the dtype that TRL returns it in: that of the logits, or float32 under
        autocast. Where no token counts it is 0, also for "mean", of which TRL's is NaN. "none"
        without `num_items_in_batch`, probabilities, and a teacher that requires grad are computed
        as TRL does, in float32: logits are copied.

    Raises:
        TypeError, ValueError: as `kd_loss`, and for an unknown reduction.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    beta = number("beta", beta, 0, 1)
    counts = None if labels is None else labels != IGNORED
    divisor = num_items_in_batch
    if divisor is None and reduction in ("batchmean", "mean"):
        divisor = _divisor(student_logits, counts, reduction)
    per_class = reduction == "none" and num_items_in_batch is None
    if per_class or logits_are_probs or teacher_logits.requires_grad:
        log_q, log_p = (
            _log_probabilities(x, temperature, logits_are_probs)
            for x in (student_logits, teacher_logits)
        )
        loss = _per_class(log_q, log_p, beta)
        loss = loss if counts is None else loss[counts]
        if not per_class:
            loss = loss.sum() if divisor is None else loss.sum() / divisor
    else:
        loss = kd_loss(
            student_logits,
            teacher_logits,
            None if counts is None else torch.where(counts, 0, IGNORED),
            divergence="jsd",
            beta=beta,
            temperature=temperature,
            alpha=1.0,
            t_squared=False,
            ignore_index=IGNORED,
            reduction="sum" if divisor is None else "mean",
            num_items=divisor,
        )
    result: Tensor = loss.to(_result_dtype(student_logits, teacher_logits))
    return result


def gold_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """`GOLDTrainer.generalized_jsd_loss`: `generalized_jsd_loss` in another order."""
    options = labels, beta, temperature, reduction, num_items_in_batch, logits_are_probs
    return generalized_jsd_loss(student_logits, teacher_logits, *options)


def _divisor(logits: Tensor, counts: Tensor | None, reduction: str) -> Tensor | int:
    """What TRL divides Σ by: logits (..., V), counts (...) -> () or a number."""
    if counts is not None:
        tokens = counts.sum().clamp(min=1)
        return tokens * logits.shape[-1] if reduction == "mean" else tokens
    return max(logits.numel() if reduction == "mean" else logits.shape[0], 1)


def _log_probabilities(x: Tensor, temperature: float, are_probs: bool) -> Tensor:
    """Logits or probabilities (..., V) -> log p (..., V), at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.clamp(min=1e-8).log() if are_probs else (x / temperature).log_softmax(-1)


def _per_class(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """What each class adds: `kd_loss` only has sums of it, over distributions.

    log_q, log_p: (..., V), of the student and the teacher.
    """
    if beta in (0, 1):
        return _kl_terms(log_q, log_p) if beta else _kl_terms(log_p, log_q)
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    return beta * _kl_terms(log_p, log_m) + (1 - beta) * _kl_terms(log_q, log_m)


def _kl_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    return F.kl_div(log_b, log_a, reduction="none", log_target=True)


def _result_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    autocast = torch.is_autocast_enabled(student.device.type)
    return torch.promote_types(dtype, torch.float32) if autocast else dtype
