"""The operators for shards in PyTorch: what every other backend's are compared with.

Of each row a device has the columns of its shard. `shard_statistics` finds what the other devices
have to know of them. Merged over all of them (parallel/merge.py), it is what `shard_gradient_`
writes its part of the gradient from, and what `shard_terms` needs for the share that these columns
have in D and in its slope. Everything is computed in float64.

Every divergence is a sum of F(log p_i, log q_i) over the classes. With F' = ∂F/∂log q, which
PyTorch derives, its gradient by the student's logits is (F'_i − q_i Σ F') / T.
"""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..objective import Objective
from .eager import DIVERGENCE

INF = float("inf")
Fields = dict[str, Tensor]
OUT_OF_RANGE = -2  # csrc/common/args.h: kOutOfRange


def shard_statistics(
    student: Tensor,
    teacher: list[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    want_terms: bool,
    *options: Any,
) -> Tensor:
    """Float64 (F, L) or (F, B, L): of the columns in student and teacher, with ops.py's fields."""
    rows = Rows(student, teacher, labels, weights, want_terms, Objective(*options))
    fields = rows.kept_statistics() if rows.kept else rows.dense_statistics()
    fields["label"] = rows.s.masked_fill(~rows.is_label, -INF).amax(-1)
    result = torch.stack([fields[name] for name in ops.shard_fields(teacher)])
    if labels is not None:
        result.masked_fill_(labels == OUT_OF_RANGE, float("nan"))
    return torch.where(rows.read, result, 0.0)


def shard_terms(
    student: Tensor,
    teacher: list[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    merged: Tensor,
    want_terms: bool,
    leads: bool,
    *options: Any,
) -> Tensor:
    """Float64 (3, L) or (3, B, L): what these columns add to D, Σ q and Σ F'."""
    rows = Rows(student, teacher, labels, weights, want_terms, Objective(*options))
    log_p, log_q = rows.pairs(merged)
    if rows.kept and not leads:
        log_p, log_q = log_p[..., :-1], log_q[..., :-1]
    value, slopes = rows.divergence(log_p, log_q)
    terms = torch.stack([value, log_q.exp().sum(-1), slopes.sum(-1)])
    return torch.where(rows.read, terms, 0.0)


def shard_gradient_(
    student: Tensor,
    teacher: list[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    merged: Tensor,
    grad: Tensor,
    classes: int,
    *options: Any,
) -> Tensor:
    """The gradient by these columns' logits into grad (…, V) -> 1, which is left to multiply by."""
    objective = Objective(*options)
    rows = Rows(student, teacher, labels, weights, False, objective)
    result = torch.zeros_like(rows.s)
    if objective.distill_weight:
        result += objective.distill_weight / objective.temperature * rows.distill_gradient(merged)
    if objective.hard_weight:
        result += objective.hard_weight * rows.hard_gradient(merged, classes)
    if num_items is not None:
        result /= num_items
    if weights is not None:
        result *= weights[..., None]
    result *= cap_slope(student[..., : objective.vocab_size].double(), objective)
    result = torch.where(rows.read[..., None], result, 0.0)
    unscale = ops.new_unscale(student).fill_(1)
    if student.dtype == torch.float16:
        prescale = float16_prescale(result.abs().amax(-1))
        result *= prescale[..., None]
        unscale = prescale.reciprocal().float()
    grad.zero_()
    grad[..., : objective.vocab_size] = result
    return unscale


def float16_prescale(peak: Tensor) -> Tensor:
    """The power of 2 at which a row is kept whose largest entry is peak (…): csrc/cpu/task.h."""
    exponent = (65408 / peak).log2().floor().clamp(-120, 120)
    return torch.where((peak > 0) & (peak < INF), exponent, 0.0).exp2()


def scale_rows_(
    grad: Tensor,
    upstream: Tensor,
    unscale: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    ignore_index: int,
    vocab_size: int,
) -> None:
    """grad (…, V) times upstream · unscale, but for rows that do not count."""
    counts = torch.ones(grad.shape[:-1], dtype=torch.bool, device=grad.device)
    if labels is not None:
        counts &= labels != ignore_index
    if weights is not None:
        counts &= weights != 0
    factor = torch.where(counts, upstream.double() * unscale, 1.0)
    grad[..., :vocab_size] *= factor[..., None]


class Rows:
    """The columns of a shard, as logits: s and t (…, n), of 0 in rows that are not read."""

    def __init__(
        self,
        student: Tensor,
        teacher: list[Tensor],
        labels: Tensor | None,
        weights: Tensor | None,
        want_terms: bool,
        objective: Objective,
    ) -> None:
        self.objective, self.T = objective, objective.temperature
        read = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
        if labels is not None:
            read &= labels != objective.ignore_index
        if weights is not None and not want_terms:
            read &= weights != 0
        self.read = read
        self.s = self._logits(student, objective.student_scale, objective.student_cap)
        self.is_label = torch.zeros_like(self.s, dtype=torch.bool)
        if labels is not None:
            columns = torch.arange(objective.vocab_size, device=student.device)
            self.is_label = columns == labels[..., None]
        self.t: Any = None
        self.kept: Any = None
        if len(teacher) > 1:
            self.kept = teacher
            ids = teacher[0]
            columns = self.s.new_zeros((*read.shape, objective.vocab_size + 1), dtype=torch.bool)
            self.is_kept = columns.scatter(-1, ids, True)[..., :-1]
        elif objective.distill_weight or want_terms:
            self.t = self._logits(teacher[0], objective.teacher_scale, objective.teacher_cap)

    def _logits(self, x: Tensor, scale: float, cap: float) -> Tensor:
        x = capped(x[..., : self.objective.vocab_size].double(), scale, cap)
        return torch.where(self.read[..., None], x, 0.0)

    def _normaliser(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The maximum, what x is less than it, and Σ e^{(x − max)/T}."""
        maximum = x.amax(-1)
        x = x - maximum.masked_fill(maximum == -INF, 0.0)[..., None]
        return maximum, x, (x / self.T).exp().sum(-1)

    def dense_statistics(self) -> Fields:
        max_s, x, z_s = self._normaliser(self.s)
        z_rest = x.masked_fill(self.is_label, -INF).exp().sum(-1)
        zero = torch.zeros_like(z_s)
        fields = dict(max_s=max_s, z_s=z_s, z_rest=z_rest, offset=x.sum(-1))
        fields |= dict(max_t=zero - INF, z_t=zero, log_ratio=zero, kl=zero)
        if self.t is None:
            return fields
        fields["max_t"], _, fields["z_t"] = self._normaliser(self.t)
        # Of nothing but −inf on a side there is neither: its share says all of it.
        nothing = (z_s == 0) | (fields["z_t"] == 0)
        log_ratio = z_s.log() - fields["z_t"].log()
        fields["log_ratio"] = log_ratio.masked_fill(nothing, 0.0)
        if self.objective.divergence == "forward_kl":
            log_p, log_q = self._log_probabilities(fields)
            kl = DIVERGENCE["forward_kl"](log_p, log_q, self.objective.beta)
            fields["kl"] = kl.masked_fill(nothing, 0.0)
        return fields

    def kept_statistics(self) -> Fields:
        _, log_p, _ = self.kept
        apart = self.is_label & ~self.is_kept
        others, x, z = self._normaliser(self.s.masked_fill(self.is_kept | apart, -INF))
        fields = dict(others=others, z=z, z_hard=x.exp().sum(-1))
        fields["apart"] = apart.any(-1).double()
        highest, x, _ = self._normaliser(self.s)
        fields |= dict(highest=highest, offset=x.sum(-1))
        fields["kept_z"] = (x.masked_fill(~self.is_kept, -INF) / self.T).exp().sum(-1)
        kept_z_hard = x.masked_fill(~self.is_kept | self.is_label, -INF).exp().sum(-1)
        fields["kept_z_hard"] = kept_z_hard
        p = log_p.exp()
        cross = torch.where(p == 0, p, p * (log_p - self._at_kept(x) / self.T))
        return fields | dict(share=p.sum(-1), cross=cross.sum(-1))

    def _at_kept(self, x: Tensor) -> Tensor:
        """x (…, n) at the kept classes (…, K), −inf where there is none."""
        ids, columns = self.kept[0], x.shape[-1]
        return x.gather(-1, ids.clamp(max=columns - 1)).masked_fill(ids >= columns, -INF)

    def _log_probabilities(self, fields: Fields) -> tuple[Tensor, Tensor]:
        """log p and log q (…, n)."""
        log_q = (self.s - fields["max_s"][..., None]) / self.T - fields["z_s"].log()[..., None]
        log_p = (self.t - fields["max_t"][..., None]) / self.T - fields["z_t"].log()[..., None]
        return log_p, log_q

    def pairs(self, merged: Tensor) -> tuple[Tensor, Tensor]:
        """log p and log q of the classes that D is a sum over; the last one is a sparse teacher's
        rest."""
        if not self.kept:
            return self._log_probabilities(dict(zip(ops.SHARD_FIELDS, merged, strict=False)))
        fields = dict(zip(ops.KEPT_SHARD_FIELDS, merged, strict=False))
        _, log_p, log_rest = self.kept
        log_z, log_z_rest = kept_normalisers(fields, self.T)
        log_q = (self._at_kept(self.s) - fields["highest"][..., None]) / self.T - log_z[..., None]
        pairs = (log_p, log_rest), (log_q, log_z_rest - log_z)
        of_p, of_q = (torch.cat([x, rest[..., None]], -1) for x, rest in pairs)
        return of_p, of_q

    def divergence(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Σ F (…) and F' (…, n)."""
        with torch.enable_grad():
            log_q = log_q.detach().requires_grad_()
            value = DIVERGENCE[self.objective.divergence](log_p, log_q, self.objective.beta)
            (slopes,) = torch.autograd.grad(value.sum(), log_q)
        return value.detach(), slopes

    def distill_gradient(self, merged: Tensor) -> Tensor:
        """F' − q Σ F' (…, n)."""
        log_p, log_q = self.pairs(merged)
        _, slopes = self.divergence(log_p, log_q)
        mean = merged[-1]
        if self.objective.divergence == "forward_kl":
            mean = torch.full_like(mean, -1.0)  # Σ −p
        parts = slopes - log_q.exp() * mean[..., None]
        if not self.kept:
            return parts
        # A class that is not kept has its share of the rest's.
        fields = dict(zip(ops.KEPT_SHARD_FIELDS, merged, strict=False))
        _, log_z_rest = kept_normalisers(fields, self.T)
        shares = (self.s - fields["highest"][..., None]) / self.T - log_z_rest[..., None]
        rest = torch.where(self.is_kept, 0.0, shares.exp() * parts[..., -1:])
        rest = torch.cat([rest, rest[..., :1]], -1)  # where a row has fewer classes
        return rest.scatter(-1, self.kept[0], parts[..., :-1])[..., :-1]

    def hard_gradient(self, merged: Tensor, classes: int) -> Tensor:
        """q − target (…, n) at T = 1, that of the label not as a difference."""
        if self.kept:
            fields = dict(zip(ops.KEPT_SHARD_FIELDS, merged, strict=False))
            highest = fields["highest"]
            others = (fields["others"] - highest).exp() * fields["z_hard"]
            rest = fields["kept_z_hard"] + others
        else:
            fields = dict(zip(ops.SHARD_FIELDS, merged, strict=False))
            highest, rest = fields["max_s"], fields["z_rest"]
        z = (rest + (fields["label"] - highest).exp())[..., None]
        q = (self.s - highest[..., None]).exp() / z
        smoothing = self.objective.label_smoothing
        hard = torch.where(self.is_label, smoothing - rest[..., None] / z, q)
        return hard - smoothing / classes


def kept_normalisers(fields: Fields, T: float) -> tuple[Tensor, Tensor]:
    """log Σ e^{(s − highest)/T} (…) of all classes, and of those that are not kept."""
    others = (fields["others"] - fields["highest"]) / T + fields["z"].log()
    apart = (fields["label"] - fields["highest"]) / T + fields["apart"].log()
    rest = torch.logaddexp(others, apart)
    return torch.logaddexp(rest, fields["kept_z"].log()), rest


def capped(x: Tensor, scale: float, cap: float) -> Tensor:
    """Logits of what may be projections: csrc/common/cap.h."""
    return cap * (x * scale / cap).tanh() if cap else x * scale


def cap_slope(x: Tensor, objective: Objective) -> Tensor:
    scale, cap = objective.student_scale, objective.student_cap
    return scale * (1 - (x * scale / cap).tanh().square()) if cap else torch.full_like(x, scale)


OPERATORS: ops.Kernels = {
    "shard_statistics": shard_statistics,
    "shard_terms": shard_terms,
    "shard_gradient_": shard_gradient_,
    "scale_rows_": scale_rows_,
}
ops.register("eager", {"CompositeExplicitAutograd": OPERATORS})
