"""Liger's distillation losses under Liger's names: a changed import is the migration.

    from kdkernels.integrations.liger import LigerFusedLinearJSDLoss  # liger_kernel.chunked_loss
    from kdkernels.integrations.liger import LigerJSD, LigerKLDIVLoss  # liger_kernel.transformers

Arguments, their order and defaults, attributes, values and gradients are those of liger-kernel
0.8.5, which need not be installed; every device that `kd_loss` runs on will do. What is not the
same:

| | Liger | here |
|---|---|---|
| hidden states (B, L, H) | cut along B: mostly not at all | cut into rows, `chunk_size` at a time |
| T² | never | never by default, `t_squared=True` |
| soft cap, logit scale | ignored | `student_softcap=`, `student_logit_scale=`, `teacher_…` |
| teacher of more classes | the student gets logits of 0 | an error, or `vocab_size=` |
| float16, bfloat16 | soft loss and sums of gradients in them | in float32, as is the loss |
| ignored rows that hold NaN | NaN | 0 |
| labels outside of [0, V) | an error where there is a cross-entropy | an error |
| `LigerJSD`, `LigerKLDIVLoss` of logits | a number | an error, on a GPU NaN |
| soft and hard loss, returned | take part in backward, gradient 0 | detached |
| `compiled`, `eps` | | kept, without effect: there is nothing to compile, 0 · log 0 = 0 |

Not here: `LigerTVDLoss` (its gradient divides by probabilities, which may have become 0: pass
logits to `kd_loss(divergence="tvd")`), `LigerFusedCETVDLoss` (two losses of a token, each with a
gradient of its own), `LigerFusedLinearCosineSimilarityLoss` (no divergence of distributions) and
the functional forms, two of which share a name.
"""

from typing import Any

import torch
from torch import nn

from ..functional import kd_loss
from ..modules import KDLoss
from ..objective import number
from ..sources import LinearHead

MAX_WEIGHT = 2.0**60
# How far from 0 the log of a sum of probabilities may be: they are rounded, or have a floor.
TOLERANCE = {torch.bfloat16: 0.1}
DEFAULT_TOLERANCE = 0.02


class LigerFusedLinearJSDLoss(nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearJSDLoss`: heads in, no logits in between.

    With n the rows whose label is not `ignore_index` (1 if there is none), over these rows

        loss = weight_hard_loss · Σ CE / n + weight_soft_loss · Σ JSD_beta(p, q) / n

    p and q at `temperature`, the cross-entropy at 1. JSD_beta is `kd_loss`'s "jsd": at beta 0 the
    forward KL, at 1 the reverse KL.

    Args:
        weight_hard_loss, weight_soft_loss: numbers, not negative; they need not sum to 1.
        beta, ignore_index, temperature: as in `kd_loss`.
        compiled: kept, without effect.
        chunk_size: rows of logits that exist at a time, at most.
        return_soft_hard_loss: return (loss, soft loss, hard loss), the latter two unweighted and
            detached.
        t_squared: multiply the divergence by T².
        vocab_size, student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale: as
            in `kd_loss` and `LinearHead`.

    Raises:
        TypeError, ValueError: as `kd_loss`; a weight that is negative.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        *,
        t_squared: bool = False,
        vocab_size: int | None = None,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss
        self.t_squared = t_squared
        self.vocab_size = vocab_size
        self.student_softcap = student_softcap
        self.teacher_softcap = teacher_softcap
        self.student_logit_scale = student_logit_scale
        self.teacher_logit_scale = teacher_logit_scale
        KDLoss(**self._options()[1])  # checks them

    def _options(self) -> tuple[float, dict[str, Any]]:
        """The sum of the weights, and the keywords of `kd_loss` for a sum of 1: anew at each call,
        because attributes may be set."""
        hard = number("weight_hard_loss", self.weight_hard_loss, 0, MAX_WEIGHT)
        soft = number("weight_soft_loss", self.weight_soft_loss, 0, MAX_WEIGHT)
        total = hard + soft
        return total, dict(
            divergence="jsd",
            beta=self.beta,
            alpha=soft / total if total else 0.0,
            temperature=self.temperature,
            t_squared=self.t_squared,
            ignore_index=self.ignore_index,
            vocab_size=self.vocab_size,
            return_terms=self.return_soft_hard_loss,
        )

    def forward(
        self,
        student_input: torch.Tensor,  # (..., H_s)
        student_weight: torch.Tensor,  # (V, H_s)
        teacher_input: torch.Tensor,  # (..., H_t)
        teacher_weight: torch.Tensor,  # (V, H_t)
        true_labels: torch.Tensor,  # (...), or flat
        student_bias: torch.Tensor | None = None,  # (V,)
        teacher_bias: torch.Tensor | None = None,  # (V,)
        *,
        num_items: float | torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss, float32, or (loss, soft loss, hard loss).

        num_items: divide the loss by this instead of n: the tokens of a whole step, where this
        batch is a part of it.
        """
        if not isinstance(true_labels, torch.Tensor):
            raise TypeError(f"true_labels must be a tensor, got {type(true_labels).__name__}")
        total, options = self._options()
        student = _head(
            (student_input, student_weight, student_bias),
            logit_scale=self.student_logit_scale,
            softcap=self.student_softcap,
            chunk_rows=self.chunk_size,
        )
        teacher = _head(
            _detached(teacher_input, teacher_weight, teacher_bias),
            logit_scale=self.teacher_logit_scale,
            softcap=self.teacher_softcap,
        )
        labels = _per_row(true_labels, student_input)
        result = kd_loss(student, teacher, labels, num_items=num_items, **options)
        if self.return_soft_hard_loss:
            return result.loss * total, result.distill, result.hard
        loss: torch.Tensor = result * total
        return loss


class LigerFusedLinearJSD(nn.Module):
    """`liger_kernel.transformers.LigerFusedLinearJSD`: the divergence alone, of heads.

    The mean of JSD_beta(p, q), p and q at `temperature`, over the rows whose label is not
    `ignore_index`; without labels over all rows.

    Args:
        jsd_beta, ignore_index, temperature: as in `kd_loss`.
        accum_dtype: what the gradient of the weight is added up in, `LinearHead.grad_dtype`; None
            is float32, in Liger the weight's dtype.
        t_squared, vocab_size, student_softcap, teacher_softcap, student_logit_scale,
            teacher_logit_scale: as in `LigerFusedLinearJSDLoss`.

    Raises:
        TypeError, ValueError: as `kd_loss`.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
        *,
        t_squared: bool = False,
        vocab_size: int | None = None,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.jsd_beta = jsd_beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype
        self.t_squared = t_squared
        self.vocab_size = vocab_size
        self.student_softcap = student_softcap
        self.teacher_softcap = teacher_softcap
        self.student_logit_scale = student_logit_scale
        self.teacher_logit_scale = teacher_logit_scale
        KDLoss(**self._options())  # checks them

    def _options(self) -> dict[str, Any]:
        return dict(
            divergence="jsd",
            beta=self.jsd_beta,
            alpha=1.0,
            temperature=self.temperature,
            t_squared=self.t_squared,
            ignore_index=self.ignore_index,
            vocab_size=self.vocab_size,
        )

    def forward(
        self,
        student_input: torch.Tensor,  # (..., H_s)
        student_weight: torch.Tensor,  # (V, H_s)
        teacher_input: torch.Tensor,  # (..., H_t)
        teacher_weight: torch.Tensor,  # (V, H_t)
        shift_labels: torch.Tensor | None,  # (...), or flat
    ) -> torch.Tensor:
        """The loss, float32."""
        student = _head(
            (student_input, student_weight, None),
            logit_scale=self.student_logit_scale,
            softcap=self.student_softcap,
            grad_dtype=self.accum_dtype,
        )
        teacher = _head(
            _detached(teacher_input, teacher_weight, None),
            logit_scale=self.teacher_logit_scale,
            softcap=self.teacher_softcap,
        )
        labels = _per_row(shift_labels, student_input)
        loss: torch.Tensor = kd_loss(student, teacher, labels, **self._options())
        return loss


class LigerFusedLinearKLDivLoss(nn.Module):
    """`liger_kernel.transformers.LigerFusedLinearKLDivLoss`: a teacher's probabilities, a head.

    Σ p (log p − log q) over all classes of the rows whose label is not `ignore_index`, q at
    `temperature` and p as it is; "batchmean" divides by these rows, "mean" by them times V. A
    teacher that is `LinearHead`, `TopK` or `Sampled` takes less memory, with `kd_loss`.

    Args:
        reduction: "batchmean", "mean" or "sum".
        ignore_index, temperature: as in `kd_loss`.
        eps: kept, without effect.
        accum_dtype: as in `LigerFusedLinearJSD`.
        t_squared, student_softcap, student_logit_scale: as in `LigerFusedLinearJSDLoss`.

    Raises:
        TypeError, ValueError: as `kd_loss`.
    """

    def __init__(
        self,
        reduction: str | None = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
        *,
        t_squared: bool = False,
        student_softcap: float | None = None,
        student_logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.eps = eps
        self.accum_dtype = accum_dtype
        self.t_squared = t_squared
        self.student_softcap = student_softcap
        self.student_logit_scale = student_logit_scale
        KDLoss(temperature=temperature, ignore_index=ignore_index)  # checks them

    def forward(
        self,
        student_input: torch.Tensor,  # (..., H)
        student_weight: torch.Tensor,  # (V, H)
        target: torch.Tensor,  # (..., V)
        shift_labels: torch.Tensor | None = None,  # (...), or flat
    ) -> torch.Tensor:
        """The loss, float32. Rows of the target count as much as they sum to."""
        student = _head(
            (student_input, student_weight, None),
            logit_scale=self.student_logit_scale,
            softcap=self.student_softcap,
            grad_dtype=self.accum_dtype,
        )
        labels = _per_row(shift_labels, student_input)
        log_p, mass = _logs(target)
        loss: torch.Tensor = kd_loss(
            student,
            log_p.mul_(self.temperature),
            labels,
            alpha=1.0,
            temperature=self.temperature,
            t_squared=False,
            ignore_index=self.ignore_index,
            token_weights=mass,
            reduction="sum",
        )
        rows: int | torch.Tensor = max(mass.numel(), 1)
        if labels is not None:
            mass = torch.where(labels != self.ignore_index, mass, 0.0)
            rows = (labels != self.ignore_index).sum().clamp(min=1)
        loss = loss + torch.special.xlogy(mass, mass).sum()
        if self.t_squared:
            loss = loss * self.temperature**2
        return loss / _divisor(self.reduction, rows, target.shape[-1])

    def extra_repr(self) -> str:
        names = "reduction", "ignore_index", "temperature", "eps", "accum_dtype"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class LigerJSD(nn.Module):
    """`liger_kernel.transformers.LigerJSD`: the generalised JSD of log-probabilities.

    The mean of `kd_loss`'s "jsd" over the rows whose label is not `ignore_index`; without labels
    over all rows. Whoever has logits passes those to `kd_loss`, which needs no log_softmax.

    Raises:
        TypeError, ValueError: as `kd_loss`; rows that are no log-probabilities (on a GPU the loss
            is NaN).
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index
        KDLoss(divergence="jsd", beta=beta, ignore_index=ignore_index)  # checks them

    def forward(
        self,
        log_q: torch.Tensor,  # (..., V), the student's
        log_p: torch.Tensor,  # (..., V), the teacher's
        shift_labels: torch.Tensor | None = None,  # (...)
    ) -> torch.Tensor:
        """The loss, float32; its gradient is for each log-probability by itself, as Liger's."""
        (log_p,) = _detached(log_p)
        options: dict[str, Any] = dict(alpha=1.0, ignore_index=self.ignore_index)
        inputs = log_p, shift_labels
        loss: torch.Tensor = kd_loss(log_q, *inputs, divergence="jsd", beta=self.beta, **options)
        count = torch.ones(log_q.shape[:-1], dtype=loss.dtype, device=log_q.device)
        if shift_labels is not None:
            count = (shift_labels != self.ignore_index).to(loss.dtype)
        loss = _checked(loss, dict(log_q=log_q, log_p=log_p), count)
        if not (log_q.requires_grad and torch.is_grad_enabled()):
            return loss
        # Σ ∂/∂ log q of a row: KL(p‖q) falls by ε where all of log q grows by ε, and so on.
        options.update(divergence="skew_reverse_kl", beta=1 - self.beta, reduction="none")
        if self.beta == 0:
            share = -count
        else:
            rows = kd_loss(log_q.detach(), *inputs, **options)  # KL(q‖m), m = p at beta 1
            share = count + rows if self.beta == 1 else (1 - self.beta) * rows
        return loss + _free(log_q, share / count.sum().clamp(min=1))


class LigerKLDIVLoss(nn.KLDivLoss):
    """`liger_kernel.transformers.LigerKLDIVLoss`: KL(p‖q) of a student's log-probabilities.

    Σ p (log p − log q) over all classes of all rows. "batchmean" divides by the rows. "mean", which
    is the default here as in PyTorch, divides by rows times classes: with V = 151936 the loss and
    its gradient are 150 thousand times smaller than a mean over tokens.

    Args:
        eps: kept, without effect.
        *args, **kwargs: as `torch.nn.KLDivLoss`: reduction "mean", "batchmean", "sum" or "none",
            log_target.

    Raises:
        TypeError, ValueError: as `kd_loss`; rows of `y_pred` that are no log-probabilities (on a
            GPU the loss is NaN).
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: torch.Tensor, y_true: torch.Tensor) -> torch.Tensor:
        """y_pred (N, V) log q; y_true (N, V) p, or log p with `log_target` -> the loss, float32.

        Rows of p count as much as they sum to: one of zeros does not count. With "none", PyTorch's
        summands (N, V).
        """
        if self.reduction == "none":
            wide = torch.promote_types(y_pred.dtype, torch.float32)
            return super().forward(y_pred.to(wide), y_true.detach().to(wide))
        if y_pred.dim() != 2:
            raise ValueError(f"y_pred must have shape (N, V), got {tuple(y_pred.shape)}")
        log_p, mass = _logs(y_true, self.log_target)
        loss: torch.Tensor = kd_loss(y_pred, log_p, token_weights=mass, reduction="sum")
        loss = _checked(loss, dict(y_pred=y_pred), mass)
        loss = loss + torch.special.xlogy(mass, mass).sum() + _free(y_pred, -mass)
        return loss / _divisor(self.reduction, max(y_pred.shape[0], 1), y_pred.shape[1])


def _logs(target: torch.Tensor, log_target: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """log p (..., V), and what its rows p sum to (...)."""
    target = target.detach()
    wide = torch.promote_types(target.dtype, torch.float32)
    if log_target:
        return target, target.logsumexp(-1).to(wide).exp()
    return target.to(wide).log(), target.sum(-1, dtype=wide)


def _divisor(reduction: str | None, rows: int | torch.Tensor, classes: int) -> int | torch.Tensor:
    divisors = dict(batchmean=rows, mean=rows * classes, sum=1)
    if reduction not in divisors:
        raise ValueError(f"unknown reduction {reduction!r}; known: {', '.join(divisors)}")
    return divisors[reduction]


def _free(log_q: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """0, whose gradient is share · q: log_q (..., V), share (...) -> ()

    `kd_loss` differentiates along distributions. What takes log-probabilities may also be asked
    for the derivative by one of them while the others stay: their sum over a row is the share. A
    log_softmax behind, or whatever else makes distributions, takes it out again.
    """
    zero: torch.Tensor = _Free.apply(log_q, share)  # type: ignore[no-untyped-call]
    return zero


class _Free(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_q: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(log_q, share)
        return share.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        log_q, share = ctx.saved_tensors
        factor = (share * upstream).unsqueeze(-1)
        grad = torch.where(factor != 0, log_q.to(factor.dtype).exp() * factor, 0.0)
        return grad.to(log_q.dtype), None


def _checked(
    loss: torch.Tensor, inputs: dict[str, torch.Tensor], count: torch.Tensor
) -> torch.Tensor:
    """The loss, where the rows that count (...) of inputs (..., V) are log-probabilities."""
    for name, x in inputs.items():
        total = x.detach().logsumexp(-1)
        wrong = (total.abs() > TOLERANCE.get(x.dtype, DEFAULT_TOLERANCE)) & (count != 0)
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and wrong.any():
            raise ValueError(
                f"{name} must be log-probabilities, as log_softmax makes them, but the "
                f"probabilities of a row sum to {total[wrong][0].exp().item():.3g}; logits go to "
                "kd_loss"
            )
        loss = loss.masked_fill(wrong.any(), torch.nan)
    return loss


def _head(tensors: Any, **options: Any) -> LinearHead:
    """(hidden, weight, bias), as a product under autocast would have them, and the bias as an
    addition to it in place."""
    hidden, weight, bias = (_cast(x) for x in tensors)
    if isinstance(bias, torch.Tensor) and isinstance(weight, torch.Tensor):
        bias = bias.to(weight.dtype)
    return LinearHead(hidden, weight, bias, **options)


def _cast(x: Any) -> Any:
    if not isinstance(x, torch.Tensor) or not torch.is_autocast_enabled(x.device.type):
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


def _detached(*tensors: Any) -> tuple[Any, ...]:
    """A teacher's tensors may require grad in Liger, and get none."""
    return tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in tensors)


def _per_row(labels: Any, hidden: torch.Tensor) -> Any:
    """Labels (...), which may be flat where hidden states (..., H) are not."""
    rows = hidden.shape[:-1]
    if labels is None or labels.dim() != 1 or labels.numel() != rows.numel():
        return labels
    return labels.view(rows)
