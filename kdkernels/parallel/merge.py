"""Rows whose columns lie on several devices: from the statistics of shards to those of whole rows,
and to the losses.

KL(p‖q) = Σ_r P_r KL(p_r‖q_r) + KL(P‖Q), with P_r and Q_r the shares of shard r in p and q and p_r
and q_r the softmaxes over its columns (the chain rule; Cover and Thomas 2006, Elements of
Information Theory, theorem 2.5.3). So what each shard finds of its own columns is all that the
forward KL takes, and nothing cancels where q is near p. Everything here is float64, a few numbers a
row, in the order of the shards: the same bits wherever it is computed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..backends.eager_shards import kept_normalisers
from ..objective import Objective

INF = float("inf")
Fields = dict[str, Tensor]


BLOCK = 2**18  # rows of all shards that are merged at a time: it takes several times their memory


class Whole(NamedTuple):
    """What is known of whole rows, (L) or (B, L) each."""

    merged: Tensor  # (fields + 1, …): what the operators take; its last field is 0
    kl: Tensor  # the forward KL
    cross_entropy: Tensor
    distill_ok: Tensor  # a row of NaN, of +inf or of nothing but −inf has no softmax
    hard_ok: Tensor


def merge(
    parts: Tensor, columns: Sequence[int], log_rest: Tensor | None, objective: Objective
) -> Whole:
    """Statistics (R, F, …) of all shards -> `Whole`.

    columns: how many each shard has. log_rest: (…), a sparse teacher's log-probability of the
    classes that are not kept, or None.
    """
    lead, rows = parts.shape[2:], max(BLOCK // len(parts), 1)
    blocks = parts.flatten(2).split(rows, 2)
    rests = [None] * len(blocks) if log_rest is None else log_rest.flatten().split(rows)
    found = [_merge(*block, columns, objective) for block in zip(blocks, rests, strict=True)]
    return Whole(*(torch.cat(x, -1).unflatten(-1, lead) for x in zip(*found, strict=True)))


def _merge(
    parts: Tensor, log_rest: Tensor | None, columns: Sequence[int], objective: Objective
) -> Whole:
    if log_rest is None:
        fields = _merge_dense(parts, columns, objective.temperature)
        highest, rest = fields["max_s"], fields["z_rest"]
        distill_ok = (fields["z_s"] > 0) & (fields["z_t"] > 0)
        names: tuple[str, ...] = ops.SHARD_FIELDS
        kl = fields["kl"]
    else:
        fields = _merge_kept(parts, columns, objective.temperature)
        highest = fields["highest"]
        rest = fields["kept_z_hard"] + fields["z_hard"] * (fields["others"] - highest).exp()
        log_z, log_z_rest = kept_normalisers(fields, objective.temperature)
        distill_ok = log_z > -INF
        names = ops.KEPT_SHARD_FIELDS
        kl = _kept_kl(fields, log_z, log_z_rest - log_z, log_rest)
    x_label = fields["label"] - highest
    hard_ok = rest + x_label.exp() > 0
    cross_entropy = _cross_entropy(fields, rest, x_label, sum(columns), objective.label_smoothing)
    merged = torch.stack([*(fields[name] for name in names), torch.zeros_like(kl)])
    return Whole(merged, kl, cross_entropy, distill_ok, hard_ok)


def _drop(maxima: Tensor, highest: Tensor) -> Tensor:
    """maxima (R, …) less the highest (…): −inf for what has none."""
    return torch.where(maxima == -INF, -INF, maxima - highest)


def _anchor(maximum: Tensor) -> Tensor:
    return maximum.masked_fill(maximum == -INF, 0.0)


def normaliser_parts(x: Tensor, T: float) -> Tensor:
    """Of logits x (…, n) of a shard: the maximum and Σ e^{(x − max)/T}, float64 (2, …)."""
    if not x.shape[-1]:
        return torch.stack([x.new_full(x.shape[:-1], y, dtype=torch.float64) for y in (-INF, 0.0)])
    maximum = x.amax(-1)
    z = (x - _anchor(maximum)[..., None]).div_(T).exp_().sum(-1, dtype=torch.float64)
    return torch.stack([maximum.double(), z])


def normalisers(parts: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Such parts (R, 2, …) of all shards -> the maximum and log Σ e^{(x − max)/T} of whole rows."""
    maxima, z = parts.unbind(1)
    maximum = maxima.amax(0)
    return maximum, (z * (_drop(maxima, maximum) / T).exp()).sum(0).log()


def _expm1_gap(d: Tensor) -> Tensor:
    """e^d − 1 − d"""
    return torch.where(d.abs() < 1e-3, d * d * (0.5 + d * (1 / 6 + d / 24)), d.expm1() - d)


def _merge_offset(
    offset: Tensor, maxima: Tensor, highest: Tensor, columns: Sequence[int]
) -> Tensor:
    """Σ (s − highest) of Σ (s − maximum), of shards (R, …) with so many columns."""
    moved = _anchor(maxima) - _anchor(highest)
    total: Tensor = sum(x + count * y for x, y, count in zip(offset, moved, columns, strict=True))
    return total


def _merge_dense(parts: Tensor, columns: Sequence[int], T: float) -> Fields:
    part = dict(zip(ops.SHARD_FIELDS, parts.unbind(1), strict=True))
    max_s, max_t = part["max_s"].amax(0), part["max_t"].amax(0)
    d_s, d_t = _drop(part["max_s"], max_s), _drop(part["max_t"], max_t)
    mass_s, mass_t = part["z_s"] * (d_s / T).exp(), part["z_t"] * (d_t / T).exp()
    z_s, z_t = mass_s.sum(0), mass_t.sum(0)
    fields = dict(max_s=max_s, max_t=max_t, z_s=z_s, z_t=z_t, label=part["label"].amax(0))
    fields["z_rest"] = (part["z_rest"] * d_s.exp()).sum(0)
    fields["offset"] = _merge_offset(part["offset"], part["max_s"], max_s, columns)
    # log(z_s/z_t) of each shard, from the maxima of whole rows.
    p = mass_t / z_t
    present = p > 0
    ratio = part["log_ratio"] + (d_s - d_t) / T
    q_z = mass_s / z_t
    difference = torch.where(present & (ratio < 1), p * ratio.expm1(), q_z - p)
    log_ratio = difference.sum(0).log1p()
    d = ratio - log_ratio
    between = torch.where(
        present & (d.abs() < 0.5),
        p * _expm1_gap(d),
        mass_s / z_s - p - torch.where(present, p * d, 0.0),
    )
    # Infinite even where the share is so small that it is 0.
    infinite = (part["kl"] == INF) & (part["z_t"] > 0)
    within = torch.where(infinite, INF, torch.where(present, p * part["kl"], 0.0))
    return fields | dict(log_ratio=log_ratio, kl=(within + between).sum(0))


def _merge_kept(parts: Tensor, columns: Sequence[int], T: float) -> Fields:
    part = dict(zip(ops.KEPT_SHARD_FIELDS, parts.unbind(1), strict=True))
    others, highest = part["others"].amax(0), part["highest"].amax(0)
    d_others, d = _drop(part["others"], others), _drop(part["highest"], highest)
    fields = dict(others=others, highest=highest)
    fields["z"] = (part["z"] * (d_others / T).exp()).sum(0)
    fields["z_hard"] = (part["z_hard"] * d_others.exp()).sum(0)
    fields["kept_z"] = (part["kept_z"] * (d / T).exp()).sum(0)
    fields["kept_z_hard"] = (part["kept_z_hard"] * d.exp()).sum(0)
    fields["offset"] = _merge_offset(part["offset"], part["highest"], highest, columns)
    fields |= dict(label=part["label"].amax(0), apart=part["apart"].amax(0))
    fields["share"] = part["share"].sum(0)
    moved = torch.where(part["share"] > 0, part["share"] * d / T, 0.0)
    return fields | dict(cross=(part["cross"] - moved).sum(0))


def _kept_kl(fields: Fields, log_z: Tensor, log_q_rest: Tensor, log_rest: Tensor) -> Tensor:
    """Σ p (log p − log q) over the kept classes and the rest."""
    p_rest = log_rest.exp()
    rest = torch.where(p_rest > 0, p_rest * (log_rest - log_q_rest), 0.0)
    # Of equal ones the difference may be a rounding below 0.
    return (fields["cross"] + fields["share"] * log_z + rest).clamp(min=0)


def _cross_entropy(
    fields: Fields, rest: Tensor, x_label: Tensor, classes: int, smoothing: float
) -> Tensor:
    # Neither form subtracts what cancels: at the maximum the loss is the log of 1 + the rest,
    # elsewhere both summands are positive.
    log_z = (rest + x_label.exp()).log()
    loss = torch.where(x_label == 0, rest.log1p(), log_z - x_label)
    if smoothing == 0:
        return loss
    uniform = log_z - fields["offset"] / classes
    return (1 - smoothing) * loss + smoothing * uniform if smoothing < 1 else uniform


def add_terms(whole: Whole, terms: Tensor) -> tuple[Tensor, Tensor]:
    """Terms (R, 3, …) of all shards -> `Whole` with the mean slope, D (…)."""
    value, mass, slope = terms.sum(0)
    mean = torch.where(value.isinf(), float("nan"), slope / mass)  # infinite, without a gradient
    merged = torch.cat([whole.merged[:-1], mean[None]])
    return merged, value


def row_losses(
    whole: Whole,
    divergence: Tensor | None,
    labels: Tensor | None,
    weights: Tensor | None,
    objective: Objective,
    want_terms: bool,
) -> Tensor:
    """Float64 (3, …): weight · loss, the distillation term, the cross-entropy; 0 for rows that do
    not count.

    divergence: D (…), or None for none. labels, weights: (…) or None, as the operators take them.
    """
    nan = float("nan")
    zero = torch.zeros_like(whole.kl)
    distill = zero if divergence is None else torch.where(whole.distill_ok, divergence, nan)
    hard = zero
    if labels is not None and (objective.hard_weight or want_terms):
        hard = torch.where(whole.hard_ok, whole.cross_entropy, nan)
    loss = zero
    if objective.distill_weight:
        loss = loss + objective.distill_weight * distill
    if objective.hard_weight:
        loss = loss + objective.hard_weight * hard
    if weights is not None:
        loss = torch.where(weights != 0, weights * loss, 0.0)
    rows = torch.stack([loss, distill * objective.distill_scale, hard])
    return rows if labels is None else torch.where(labels == objective.ignore_index, 0.0, rows)
