"""The readable definition of the loss in PyTorch: what every other backend is compared with.

Runs on any device in any floating dtype, in at least float32, and is differentiable twice. It
takes many passes over the logits; the other backends exist to take one.
"""

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kept import Kept
from ..objective import Objective
from ..ops import check_labels, transformed
from ..sources import Dense, Ensemble, LinearHead

INF = float("inf")


def distill(
    student: Dense,
    teacher: Any,
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    objective: Objective,
    want_terms: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, in PyTorch's own autograd.

    Args:
        student: logits (L, V_s) or (B, L, V_s), any floating dtype, or `LinearHead`, whose logits
            exist here.
        teacher: logits (L, V_t) or (B, L, V_t), `LinearHead`, `Kept`, or `Ensemble` of those.
        labels: class ids, int64, a value for every row, or None; rows of `ignore_index` are 0 in
            every output.
        weights: a weight for every row, or None for 1.
        num_items: () float64, what a mean divides by, or None for Σ weights over rows that count.
        objective: `Objective`.
        want_terms: compute both terms even where their weight is 0.

    Returns:
        loss: () or, for reduction "none", a value for every row; float32 (float64 for float64).
        rows: (3, L) or (3, B, L), weight · loss and, detached, the distillation term (times
            `distill_scale`) and the cross-entropy.
    """
    if labels is not None:
        labels = check_labels(labels, objective.ignore_index, objective.vocab_size)
    if objective.reduction != "mean":
        rows = distill_rows(student, teacher, labels, weights, objective, want_terms)
        return rows[0] if objective.reduction == "none" else add_up(rows[0]), rows
    if weights is None:
        leading = student.hidden if isinstance(student, LinearHead) else student
        weights = leading.new_ones(leading.shape[:-1], dtype=torch.float64)
    if num_items is None:
        counted = weights
        if labels is not None:
            counted = weights.masked_fill(labels == objective.ignore_index, 0)
        num_items = counted.sum(dtype=torch.float64)
    # Divided by 0, no row counts: 0 times what it holds could still be NaN.
    weights = weights.masked_fill(num_items == 0, 0)
    rows = distill_rows(student, teacher, labels, weights, objective, want_terms)
    scale = torch.where(num_items == 0, 0.0, num_items.reciprocal())
    return add_up(rows[0], scale), rows


def add_up(losses: Tensor, scale: Tensor | None = None) -> Tensor:
    """losses (L) or (B, L) -> their sum, in float64 until it is rounded."""
    loss = losses.sum(dtype=torch.float64)
    return (loss if scale is None else loss * scale).to(losses.dtype)


def distill_rows(
    student: Dense,
    teacher: Any,
    labels: Tensor | None,
    weights: Tensor | None,
    objective: Objective,
    want_terms: bool,
) -> Tensor:
    """The rows of `distill`."""
    s = logits(student, objective.vocab_size)
    zero = s.new_zeros(s.shape[:-1])

    # Rows that don't count are replaced, not multiplied by 0: nothing in them, NaN included, can
    # reach the loss, and `where` gives them the gradient +0 whatever the upstream gradient is.
    counts = None
    if labels is not None:
        counts = labels != objective.ignore_index
        s = torch.where(counts[..., None], s, 0.0)
        labels = torch.where(counts, labels, 0)
    if weights is not None:
        weights = weights.to(s.dtype)
        weighs = weights != 0
        s = torch.where(weighs[..., None], s, s.detach())

    distill = hard = zero
    loss = zero
    if objective.distill_weight or want_terms:
        divergence = row_divergence(s, teacher, counts, objective)
        distill = divergence.detach() * objective.distill_scale
        if objective.distill_weight:
            loss = loss + objective.distill_weight * divergence
    if labels is not None and (objective.hard_weight or want_terms):
        cross_entropy = row_cross_entropy(s, labels, objective.label_smoothing)
        hard = cross_entropy.detach()
        if objective.hard_weight:
            loss = loss + objective.hard_weight * cross_entropy
    if weights is not None:
        loss = torch.where(weighs, weights * loss, zero)
    if counts is not None:
        loss, distill, hard = (torch.where(counts, x, zero) for x in (loss, distill, hard))
    return torch.stack((loss, distill, hard))


def row_cross_entropy(s: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """(1 − ε) (lse(s) − s_y) + ε mean_i (lse(s) − s_i): s (B, L, V), labels (B, L) -> (B, L)."""
    log_q = log_softmax(s, 1.0)
    if label_smoothing == 1:
        return -log_q.mean(-1)
    loss = -log_q.gather(-1, labels[..., None]).squeeze(-1)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_q.mean(-1)
    return loss


def log_softmax(x: Tensor, temperature: float) -> Tensor:
    """log softmax(x / T), the maximum subtracted before the division: no T overflows it."""
    if not x.numel():
        return x
    return F.log_softmax((x - x.detach().amax(-1, keepdim=True)) / temperature, -1)


def row_divergence(s: Tensor, teacher: Any, counts: Tensor | None, objective: Objective) -> Tensor:
    """D(p, softmax(s/T)): s (B, L, V), counts (B, L) or None -> (B, L)."""
    log_q = log_softmax(s, objective.temperature)
    if isinstance(teacher, Kept):
        log_p, log_q = over_kept_classes(teacher, log_q)
    else:
        log_p = log_probabilities(teacher, counts, objective, s.dtype)
    return DIVERGENCE[objective.divergence](log_p, log_q, objective.beta)


# ---- Sources -------------------------------------------------------------------------------------


def logits(source: Dense, columns: int) -> Tensor:
    """The logits (B, L, columns) of a tensor or `LinearHead`, in at least float32."""
    if isinstance(source, torch.Tensor):
        return source[..., :columns].to(torch.promote_types(source.dtype, torch.float32))
    bias = None if source.bias is None else source.bias[:columns]
    with _without_autocast(source.hidden.device.type):  # in the dtype of `hidden`
        x = F.linear(source.hidden, source.weight[:columns], bias)
    x = x.to(torch.promote_types(x.dtype, torch.float32)) * source.logit_scale
    return x if source.softcap is None else source.softcap * (x / source.softcap).tanh()


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    if device_type == "meta":  # which has none
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def log_probabilities(
    teacher: Any, counts: Tensor | None, objective: Objective, dtype: torch.dtype
) -> Tensor:
    """log p (B, L, V) of a teacher; of anything where `counts` (B, L) is False."""
    if isinstance(teacher, Kept):
        return teacher.dense(objective.vocab_size, dtype)
    if not isinstance(teacher, Ensemble):
        t = logits(teacher, objective.vocab_size)
        if counts is not None:
            t = torch.where(counts[..., None], t, 0.0)
        return log_softmax(t, objective.temperature)
    members = (log_probabilities(x, counts, objective, dtype) for x in teacher.teachers)
    total = mean_of(teacher, members)
    return log_softmax(total, 1.0) if teacher.mean == "geometric" else total


def mean_of(ensemble: Ensemble, members: Iterable[Tensor]) -> Tensor:
    """Of the members' log p (B, L, V), which are overwritten, that of their mean; of the geometric
    one less the log of its normaliser."""
    total: Any = None  # one member beside it at a time
    for log_p, share in zip(members, ensemble.shares(), strict=True):
        if not share:
            continue
        if ensemble.mean == "geometric":
            log_p *= share
            total = log_p if total is None else total.add_(log_p)
        else:
            log_p += math.log(share)
            out = None if transformed() else total  # vmap has no rule for `out`
            total = log_p if total is None else torch.logaddexp(total, log_p, out=out)
    mean: Tensor = total
    return mean


def over_kept_classes(kept: Kept, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log q (B, L, K + 1) over the kept classes and the one that holds all others.

    A teacher that gives the others no probability needs no more: a class without p adds to every
    divergence in proportion to its q.
    """
    columns = log_q.shape[-1]
    is_kept = torch.zeros(
        (*kept.ids.shape[:-1], columns + 1), dtype=torch.bool, device=log_q.device
    )
    is_kept = is_kept.scatter(-1, kept.ids, True)[..., :columns]
    others = log_q.masked_fill(is_kept, -INF)
    none = (others == -INF).all(-1, keepdim=True)  # a log 0 has no derivative to give
    rest = torch.where(none, 0.0, others).logsumexp(-1, keepdim=True).masked_fill(none, -INF)
    present = kept.ids < columns
    rest = torch.where(present.any(-1, keepdim=True), rest, 0.0)  # all of it, exactly
    log_q = log_q.gather(-1, kept.ids.clamp(max=columns - 1)).masked_fill(~present, -INF)
    log_p = torch.cat([kept.log_p, kept.log_rest[..., None]], -1).to(log_q.dtype)
    return log_p, torch.cat([log_q, rest], -1)


# ---- Divergences ---------------------------------------------------------------------------------

# Each takes the teacher's log p and the student's log q (B, L, V), and beta.


def forward_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return kl(log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    # Where the teacher rules a class out and the student does not, the divergence is +inf and has
    # no gradient: the row is computed from NaN and only its value replaced.
    infinite = ((log_p == -INF) & (log_q > -INF)).any(-1)
    log_q = log_q * torch.where(infinite, float("nan"), 1.0)[..., None].to(log_q.dtype)
    return torch.where(infinite, INF, kl(log_q, log_p))


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    log_m = log_mixture(log_p, log_q, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return kl(log_p, log_mixture(log_p, log_q, beta))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return kl(log_q, log_mixture(log_q, log_p, beta))


def tvd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    difference = log_q.exp() - log_p.exp()
    sign = torch.where(difference.isnan(), difference, difference.sign()).detach()
    return 0.5 * (difference * sign).sum(-1)  # |x| with a derivative of NaN at NaN


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Σ a (log a − log b), 0 where a = 0 (the limit of x log x)."""
    absent = log_a == -INF
    a = log_a.exp()
    terms = a * (torch.where(absent, 0.0, log_a) - torch.where(absent, 0.0, log_b))
    # Infinite even where a is so small that its exponential is 0.
    return torch.where((log_b == -INF) & (a == 0) & ~absent, INF, terms).sum(-1)


def log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(w a + (1 − w) b), exactly log a where b = a; −inf where both are 0."""
    if weight == 1:
        both = log_a + log_b  # of a row that holds NaN, in value and gradient
        return torch.where(both.isnan(), both, log_a)
    absent = (log_a == -INF) & (log_b == -INF)  # log 0 has no derivative to give
    log_a, log_b = log_a.masked_fill(absent, 0.0), log_b.masked_fill(absent, 0.0)
    a_high = log_a >= log_b
    high, low = torch.where(a_high, log_a, log_b), torch.where(a_high, log_b, log_a)
    low_weight = torch.full_like(low, weight).masked_fill(a_high, 1 - weight)
    # Far apart the sum itself: 1 − w e^{…} would lose a small weight of the greater one.
    far = low - high < -1
    near = torch.log1p(low_weight * torch.expm1(torch.where(far, -1.0, low - high)))
    sums = torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))
    return torch.where(far, sums, high + near).masked_fill(absent, -INF)


DIVERGENCE = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
}
