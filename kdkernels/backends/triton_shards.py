"""The Triton operators for shards: see kdkernels/parallel/ and eager_shards.py.

The kernels write and read pairs of floats, and add up to float64 here, as does what there is only
one of for a row, or K: a sparse teacher's sums over the kept classes, which D of a student that
nearly equals its teacher is a small difference of, and the normalisers of the whole row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..objective import Objective
from . import triton_launch as launch
from .eager_shards import capped, kept_normalisers
from .triton_task import Task, make_task

STATISTICS, TERMS, GRADIENT = range(3)  # csrc/common/args.h: Phase
INF = float("inf")


class Call(NamedTuple):
    """What the phases are given alike."""

    student: Tensor
    teacher: list[Tensor]
    labels: Tensor | None
    weights: Tensor | None
    objective: Objective
    task: Task


def _shard_statistics(
    student: Tensor,
    teacher: list[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    want_terms: bool,
    *options: Any,
) -> Tensor:
    objective = Objective(*options)
    call = Call(student, teacher, labels, weights, objective, make_task(objective, want_terms))
    out = _pairs_for(student, ops.shard_fields(teacher))
    distill = objective.distill_weight != 0 or want_terms
    hard = labels is not None and (objective.hard_weight != 0 or want_terms)
    _run(STATISTICS, call, distill, hard, out=out)
    out = _add_up(out)
    return out if len(teacher) == 1 else _with_kept_sums(call, out, want_terms)


def _shard_terms(
    student: Tensor,
    teacher: list[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    merged: Tensor,
    want_terms: bool,
    leads: bool,
    *options: Any,
) -> Tensor:
    objective = Objective(*options)
    call = Call(student, teacher, labels, weights, objective, make_task(objective, want_terms))
    out = _pairs_for(student, ops.TERM_FIELDS)
    _run(TERMS, call, True, False, merged=merged, out=out, leads=leads)
    return _add_up(out)


def _shard_gradient_(
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
    objective = Objective(*options)
    task = make_task(objective, False, classes)
    call = Call(student, teacher, labels, weights, objective, task)
    unscale = ops.new_unscale(student)
    distill, hard = objective.distill_weight != 0, objective.hard_weight != 0
    with launch.rounded(grad) as written:
        mean = _run(
            GRADIENT,
            call,
            distill,
            hard,
            merged=merged,
            num_items=num_items,
            grad=written,
            unscale=unscale,
        )
    if student.dtype != torch.float16:
        unscale.copy_(1 - mean[2])
    return unscale


def _pairs_for(student: Tensor, fields: Sequence[str]) -> Tensor:
    return student.new_empty((2, len(fields), *student.shape[:-1]), dtype=torch.float32)


def _add_up(pairs: Tensor) -> Tensor:
    hi, lo = pairs.double().unbind()
    return hi + lo


def _run(
    phase: int,
    call: Call,
    distill: bool,
    hard: bool,
    merged: Tensor | None = None,
    num_items: Tensor | None = None,
    grad: Tensor | None = None,
    out: Tensor | None = None,
    unscale: Tensor | None = None,
    leads: bool = False,
) -> Tensor:
    """Launches a phase -> what it has taken for the mean: see distill_rows."""
    from . import triton_kernels as kernels

    student, teacher, labels, weights, objective, task = call
    ignore_index, columns = objective.ignore_index, objective.vocab_size
    logits: Any = teacher[0] if len(teacher) == 1 else None
    kept = teacher if logits is None else None
    written = student if grad is None else grad
    batch, length, width = ops.sizes(student)
    with launch.on(student):
        plan = launch.plan_of(student, logits, columns)
        if kept is not None and phase == TERMS:
            # There are K classes to share out, not the columns.
            plan = plan._replace(programs=1, teams=batch * length)
        of_mean = None, None, num_items
        mean, arrivals, board = launch.prepare(
            student, plan, of_mean, ignore_index, num_items is not None
        )
        inputs: tuple[Any, ...]
        if kept is None:
            whole, strides = launch.strides_of(student, logits, written)
            kernel, inputs = kernels.shard_rows, (task, student, logits)
            compiled_for = dict(DISTILL=distill, ROWS=plan.rows, HELD=plan.held)
        else:
            whole, strides = launch.strides_of(student, written)
            count = kept[0].shape[-1]
            strides = [count, int(leads), *strides]
            # The label is by itself wherever there is one, and the same in all phases.
            hard = labels is not None
            kernel = kernels.shard_kept_rows
            inputs = task, student, *launch.kept_in_pairs(kept, objective.temperature)
            merged = None if merged is None else _frame(merged, objective, hard)
            compiled_for = dict(
                DISTILL=distill,
                TWO=hard and objective.temperature != 1,
                KEPT=max(8, launch.power_of_2(count)),
            )
        kernel[(plan.teams * plan.programs,)](
            *inputs,
            grad,
            labels,
            weights,
            mean,
            None if merged is None else launch.pairs(merged),
            out,
            unscale,
            launch.label_flag(student.device),
            board,
            arrivals[0],
            batch * length,
            length,
            width,
            columns,
            ignore_index,
            *strides,
            PHASE=phase,
            WHOLE=whole,
            **compiled_for,
            **launch.compiled_for(objective, task, hard, plan, student.device),
        )
    return mean


def _with_kept_sums(call: Call, out: Tensor, want_terms: bool) -> Tensor:
    """The statistics with their sums over the kept classes."""
    student, (ids, log_p, _), labels, weights, objective, _ = call
    fields = dict(zip(ops.KEPT_SHARD_FIELDS, out, strict=True))
    here = ids < objective.vocab_size
    s = student.gather(-1, ids.clamp(max=objective.vocab_size - 1)).double()
    s = capped(s, objective.student_scale, objective.student_cap)
    highest = fields["highest"]
    x = s - highest.masked_fill(highest == -INF, 0.0)[..., None]
    e = torch.where(here, (x / objective.temperature).exp(), 0.0)
    e_hard = torch.where(here, x.exp(), 0.0)
    if labels is not None:
        e_hard = e_hard.masked_fill(ids == labels[..., None], 0.0)
    p = log_p.exp()
    x = x.masked_fill(~here, -INF)
    cross = torch.where(p == 0, p, p * (log_p - x / objective.temperature))
    sums = dict(kept_z=e, kept_z_hard=e_hard, share=p, cross=cross)
    read = torch.ones_like(ids[..., 0], dtype=torch.bool)
    if labels is not None:
        read &= labels != objective.ignore_index
    if weights is not None and not want_terms:
        read &= weights != 0
    for name, terms in sums.items():
        # `out` is 0 so far, or NaN.
        fields[name] += torch.where(read, terms.sum(-1), 0.0)
    return out


def _frame(merged: Tensor, objective: Objective, has_labels: bool) -> Tensor:
    """What shard_kept_rows takes of the whole row: float64 (FRAME, …), as kept_shards.py says."""
    f = dict(zip(ops.KEPT_SHARD_FIELDS, merged, strict=False))
    T, mean = objective.temperature, merged[-1]
    log_z, log_rest = kept_normalisers(f, T)
    others, label = f["others"] - f["highest"], f["label"] - f["highest"]
    alone = torch.where(f["apart"] > 0, label, -INF)
    empty = log_rest == -INF
    of_others = (others / T - log_rest).exp().masked_fill(empty, 0.0)
    of_label = (alone / T - log_rest).exp().masked_fill(empty, 0.0)
    z_hard = torch.ones_like(mean)
    other = torch.zeros_like(mean)
    if has_labels and objective.hard_weight:
        other = f["kept_z_hard"] + others.exp() * f["z_hard"]
        z_hard = other + label.exp()
        mean = torch.where(z_hard > 0, mean, float("nan"))
    if objective.distill_weight:
        mean = torch.where(log_z > -INF, mean, float("nan"))
    frame = dict(
        highest=f["highest"],
        z=log_z.exp(),
        t_log_z=log_z * T,
        log_q_rest=log_rest - log_z,
        q_rest=(log_rest - log_z).exp(),
        of_others=of_others,
        of_label=of_label,
        z_hard=z_hard,
        others_hard=others.exp() / z_hard,
        other_hard=other / z_hard,
        others=f["others"],
        mean=mean,
    )
    return torch.stack(tuple(frame.values()))


OPERATORS: ops.Kernels = dict(
    shard_statistics=_shard_statistics,
    shard_terms=_shard_terms,
    shard_gradient_=_shard_gradient_,
)
