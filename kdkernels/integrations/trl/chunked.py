"""The divergence of hidden states and heads, as `DistillationTrainer` calls it."""

import contextlib
import importlib
import math
from typing import Any

import torch
from torch import Tensor

from ...functional import kd_loss
from ...objective import Reduction
from ...sources import LinearHead


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | float | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_chunked_divergence_loss`, the loss of `DistillationTrainer`.

    The loss and its gradients take four products with a head, the entropy, which they do not know,
    a fifth; TRL takes six, and eight where 0 < beta < 1. No logits exist in full.

    Args:
        student_hidden_states, teacher_hidden_states: (B, K, H), each of its own width.
        student_lm_head_weight, teacher_lm_head_weight: (V, H), any dtype: the products are in that
            of the hidden states, or in autocast's. The teacher's get no gradient, as in TRL.
        completion_mask: (B, K), 0 for tokens that do not count; they are not projected.
        beta: in [0, 1].
        num_items_in_batch: what the sum is divided by; None: the number of tokens that count.
        student_lm_head_bias, teacher_lm_head_bias: (V,), or None.
        student_logit_scale, teacher_logit_scale, student_final_logit_softcapping,
            teacher_final_logit_softcapping: as `logit_scale` and `softcap` of `LinearHead`.
        temperature: T, of both sides and of the entropy.

    Returns:
        loss: (), float32 (float64 of float64 hidden states).
        entropy_sum: (), of this dtype: Σ over these tokens of the entropy of softmax(student / T),
            in nats, without gradient.
        n_valid: (), int64, the number of these tokens.

    Raises:
        TypeError, ValueError: as `kd_loss`.
    """
    valid = completion_mask.reshape(-1) != 0
    heads = student_lm_head_weight, student_lm_head_bias
    with _gathered(*heads, teacher_lm_head_weight, teacher_lm_head_bias):
        student = _head(
            student_hidden_states.flatten(0, -2)[valid],
            *heads,
            student_logit_scale,
            student_final_logit_softcapping,
        )
        teacher = _frozen_head(
            teacher_hidden_states.flatten(0, -2)[valid],
            teacher_lm_head_weight,
            teacher_lm_head_bias,
            teacher_logit_scale,
            teacher_final_logit_softcapping,
        )
        loss = _divergence(student, teacher, beta, temperature, "mean", num_items_in_batch)
        entropy = _entropy(student, temperature)
    return loss, entropy.sum(), valid.sum()


class ChunkedDivergenceFunction:
    """TRL's `ChunkedDivergenceFunction`, for who calls it directly.

    The weight of a row in the gradients is known in the backward pass, which therefore projects
    both sides again: `chunked_divergence_loss` takes two products less.
    """

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (N, H), weights (V, H), biases (V,) or None, all else as in
        `chunked_divergence_loss` -> every token's divergence (N,) and, without gradient, the
        entropy of softmax(student / T) (N,), float32 (float64 of float64 hidden states).

        Raises:
            TypeError, ValueError: as `kd_loss`.
            RuntimeError: a weight that ZeRO-3 has sharded, which the backward pass could not read.
        """
        if _sharded_by_zero(student_weight, student_bias, teacher_weight, teacher_bias):
            raise RuntimeError(
                "ChunkedDivergenceFunction reads the heads in the backward pass too, where ZeRO-3 "
                "has sharded them again; call chunked_divergence_loss"
            )
        student_options = student_logit_scale, student_final_logit_softcapping
        student = _head(student_hidden, student_weight, student_bias, *student_options)
        teacher_options = teacher_logit_scale, teacher_final_logit_softcapping
        teacher = _frozen_head(teacher_hidden, teacher_weight, teacher_bias, *teacher_options)
        divergence = _divergence(student, teacher, beta, temperature, "none")
        return divergence, _entropy(student, temperature)


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> LinearHead:
    """hidden (..., H), weight (V, H), bias (V,), in the dtype of the products."""
    kind, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    bias = None if bias is None else bias.to(dtype)
    return LinearHead(hidden.to(dtype), weight.to(dtype), bias, logit_scale, softcap)


def _frozen_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> LinearHead:
    bias = None if bias is None else bias.detach()
    return _head(hidden.detach(), weight.detach(), bias, logit_scale, softcap)


def _divergence(
    student: LinearHead,
    teacher: LinearHead,
    beta: float,
    temperature: float,
    reduction: Reduction,
    num_items: Tensor | float | None = None,
) -> Tensor:
    loss: Tensor = kd_loss(
        student,
        teacher,
        divergence="jsd",
        beta=beta,
        temperature=temperature,
        t_squared=False,
        reduction=reduction,
        num_items=num_items,
    )
    return loss


@torch.no_grad()
def _entropy(student: LinearHead, temperature: float) -> Tensor:
    """Of softmax(student / T), in nats (...): log V − KL(q‖u), u the uniform distribution."""
    columns = student.weight.shape[0]
    # One row for all, of which there are no copies.
    uniform = student.hidden.new_zeros(columns).expand(*student.hidden.shape[:-1], columns)
    kl: Tensor = kd_loss(
        student,
        uniform,
        divergence="reverse_kl",
        temperature=temperature,
        t_squared=False,
        reduction="none",
    )
    return math.log(columns) - kl


def _sharded_by_zero(*parameters: Tensor | None) -> list[Tensor]:
    return [x for x in parameters if x is not None and hasattr(x, "ds_status")]


def _gathered(*parameters: Tensor | None) -> contextlib.AbstractContextManager[Any]:
    """While this is open, what ZeRO-3 has sharded of these is whole."""
    sharded = _sharded_by_zero(*parameters)
    if not sharded:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = importlib.import_module(
        "trl.trainer.utils"
    ).maybe_gather_lm_head_ctx(*sharded)
    return context
