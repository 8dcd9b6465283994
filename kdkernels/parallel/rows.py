"""The loss where the vocabulary is sharded over ranks: statistics → one exchange → gradient.

Each rank reads its columns of student and teacher once for a few numbers a row, gathers those of
all ranks, never logits, works out the losses from them, the same bits everywhere, and reads its
columns once more to write its own part of the gradient. The forward KL and the cross-entropy take
that one exchange; divergences whose gradient holds a sum that needs both normalisers first take
another one, of three numbers a row.

Rows of heads come in chunks: while the statistics of one are on their way, the next one is
projected, so that two chunks of logits exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import chunked, ops
from ..backends import eager
from ..kept import Kept
from ..objective import Objective
from ..sources import Dense, Ensemble, LinearHead
from . import groups, merge


@dataclass
class Part:
    """Rows on their way from statistics to gradient."""

    step: chunked.Step
    student: Tensor  # logits (L, V) or (B, L, V) of this rank
    teacher: Any  # likewise, or `Kept`, or None
    labels: Tensor | None
    weights: Tensor | None
    statistics: Any = None  # (R, F, …), once there is nothing to wait for
    work: Any = None


class Rows:
    """All rows of a call: the operators of a backend over the ranks of a group."""

    def __init__(
        self,
        group: groups.Group,
        teacher: Any,
        labels: Tensor | None,
        weights: Tensor | None,
        num_items: Tensor | None,
        want_terms: bool,
        objective: Objective,
        backend: str,
    ) -> None:
        self.group, self.objective, self.backend = group, objective, backend
        self.labels, self.weights, self.num_items = labels, weights, num_items
        self.want_terms, self.options = want_terms, objective.options()
        self.distill = bool(objective.distill_weight) or want_terms
        self.teacher = teacher if self.distill else None
        self.counts, self.classes = group.layout.counts(), group.layout.classes
        self.columns = objective.vocab_size

    def in_parts(
        self,
        students: Iterable[tuple[chunked.Step, Tensor]],
        teachers: Teacher | None,
        finish: Callable[[Part], None],
    ) -> None:
        """`finish(part)` for each of (step, logits) in `students`, of which two exist at a time:
        one is started before the other is finished."""
        before = None
        for step, student in students:
            x = None if teachers is None else teachers.rows(step)
            labels, weights = (
                x if x is None else x[step.index] for x in (self.labels, self.weights)
            )
            part = self._start(Part(step, student, x, labels, weights))
            if before is not None:
                finish(before)
            before = part
        if before is not None:
            finish(before)

    def _inputs(self, part: Part) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor | None]:
        return part.student, ops.as_list(part.teacher, part.student), part.labels, part.weights

    def _start(self, part: Part) -> Part:
        """Statistics, and their exchange."""
        found = self._statistics(part)
        if self.group.begun:
            gathered, part.work = self.group.gather(found.flatten(), wait=False)
        else:
            gathered = self.group.first_message(found.flatten())
        part.statistics = gathered.reshape(-1, *found.shape)
        return part

    def _statistics(self, part: Part) -> Tensor:
        inputs = self._inputs(part)
        if self.columns:
            operator = ops.get("shard_statistics", self.backend)
            found: Tensor = operator(*inputs, self.want_terms, *self.options)
            return found
        fields = ops.shard_fields(inputs[1])
        maxima = {"max_s", "max_t", "others", "highest", "label"}
        nothing = tuple(-merge.INF if name in maxima else 0.0 for name in fields)
        found = groups.constants(nothing, part.student.device)
        return found.view(-1, *(1,) * (part.student.dim() - 1)).expand(-1, *part.student.shape[:-1])

    def finish(self, part: Part, grad: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """-> rows (3, …) float64 and unscale; the gradient into `grad`, which may be the student's
        memory, or None."""
        if part.work is not None:
            part.work.wait()
        log_rest = part.teacher.log_rest if isinstance(part.teacher, Kept) else None
        whole = merge.merge(part.statistics, self.counts, log_rest, self.objective)
        merged, divergence = whole.merged, whole.kl if self.distill else None
        if self.distill and self.objective.divergence != "forward_kl":
            merged, divergence = merge.add_terms(whole, self._terms(part, merged))
        inputs = part.labels, part.weights, self.objective, self.want_terms
        rows = merge.row_losses(whole, divergence, *inputs)
        return rows, None if grad is None else self._gradient(part, merged, grad)

    def _terms(self, part: Part, merged: Tensor) -> Tensor:
        """(R, 3, …)"""
        found = ops.new_statistics(part.student, ops.TERM_FIELDS).zero_()
        if self.columns:
            operator = ops.get("shard_terms", self.backend)
            leads = not any(self.counts[: self.group.rank])  # the first that has columns
            found = operator(*self._inputs(part), merged, self.want_terms, leads, *self.options)
        gathered: Tensor = self.group.gather(found.flatten())
        return gathered.view(-1, *found.shape)

    def _gradient(self, part: Part, merged: Tensor, grad: Tensor) -> Tensor:
        if not self.columns:
            grad.zero_()
            return ops.new_unscale(part.student).fill_(1)
        operator = ops.get("shard_gradient_", self.backend)
        inputs = *self._inputs(part), self.num_items, merged, grad, self.classes
        unscale: Tensor = operator(*inputs, *self.options)
        return unscale


class Teacher(chunked.Teacher):
    """What the operators take of a teacher, of which this rank has some of the columns."""

    def __init__(self, teacher: Any, objective: Objective, rows: int, group: groups.Group) -> None:
        super().__init__(teacher, objective, rows, buffers=2)
        self.group = group

    def log_mean(self, ensemble: Ensemble) -> Tensor:
        # A member is normalised over all ranks, before they are added up; what is sparse is so.
        T, columns = self.objective.temperature, self.objective.vocab_size
        teachers: Sequence[Any] = ensemble.teachers
        dense = [x for x in teachers if not isinstance(x, Kept)]
        logits = [eager.logits(x, columns) for x in dense]
        dtype = logits[0].dtype if logits else torch.float32
        log_p = []
        if dense:
            parts = torch.stack([merge.normaliser_parts(x, T) for x in logits], 1)
            parts = self.group.gather(parts.flatten()).view(-1, *parts.shape)
            maxima, log_z = merge.normalisers(parts, T)
            for x, maximum, z in zip(logits, maxima, log_z, strict=True):
                x = (x - maximum[..., None].to(dtype)) / T
                log_p.append(x.sub_(z[..., None].to(dtype)))
        of_dense = iter(log_p)
        members = (
            x.dense(columns, dtype) if isinstance(x, Kept) else next(of_dense) for x in teachers
        )
        return eager.mean_of(ensemble, members)


def dense_losses(
    student: Tensor,
    want_grad: bool,
    inplace: bool,
    teacher: Any,
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    want_terms: bool,
    objective: Objective,
    backend: str,
    group: groups.Group,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `autograd.dense_losses`."""
    lead, chunks = student.shape[:-1], chunked.in_chunks(teacher)
    objective = chunked.with_heads(objective, student, teacher)
    grad = student.detach() if inplace else ops.new_grad(student, want_grad)
    losses = student.new_empty((3, *lead), dtype=torch.float64)
    unscale = ops.new_unscale(student).fill_(1)
    rows = Rows(group, teacher, labels, weights, num_items, want_terms, objective, backend)
    count = rows_of_chunk(student, teacher, group) if chunks else max(lead.numel(), 1)

    def finish(part: Part) -> None:
        index = part.step.index
        found, part_unscale = rows.finish(part, grad[index] if want_grad else None)
        losses[(slice(None), *index)] = found
        if part_unscale is not None and unscale.dim():
            unscale[index] = part_unscale

    students = ((step, student[step.index]) for step in chunked.steps(lead, count))
    rows.in_parts(students, Teacher(rows.teacher, objective, count, group), finish)
    wide = losses.to(torch.promote_types(student.dtype, torch.float32))
    return _reduced(losses[0], wide, num_items, objective), unscale, wide, grad


def head_losses(
    head: LinearHead,
    wanted: Sequence[bool],
    teacher: Any,
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    want_terms: bool,
    objective: Objective,
    backend: str,
    group: groups.Group,
) -> tuple[Tensor, Tensor, chunked.HeadGradients]:
    """As `autograd.head_losses`: the gradient of the hidden states is that of all ranks."""
    lead, columns = head.hidden.shape[:-1], objective.vocab_size
    reduction = objective.reduction
    objective = replace(chunked.with_heads(objective, head, teacher), reduction="sum")
    losses = head.hidden.new_empty((3, *lead), dtype=torch.float64)
    count = rows_of_chunk(head, teacher, group)
    student = chunked.Projection(head, columns, count, buffers=2)
    steps = list(chunked.steps(lead, count))
    gradients = chunked.HeadGradients.empty(head, columns, wanted, len(steps))
    rows = Rows(group, teacher, labels, weights, None, want_terms, objective, backend)
    counts = chunked.counting(labels, weights, objective.ignore_index)
    counts = None if counts is None else counts.flatten()
    sums = []

    def finish(part: Part) -> None:
        step, logits = part.step, part.student
        losses[(slice(None), *step.index)], _ = rows.finish(part, logits if any(wanted) else None)
        if not any(wanted):
            return
        counted = None if counts is None else counts[step.begin : step.end]
        flat = logits.flatten(0, -2)
        gradients.add(student, step.begin, step.end, flat, counted)
        if gradients.hidden is not None:
            sums.append(group.add_up(gradients.hidden[step.begin : step.end]))

    students = ((x, student.logits(x.begin, x.end).view(*x.shape, columns)) for x in steps)
    rows.in_parts(students, Teacher(rows.teacher, objective, count, group), finish)
    for work in sums:
        work.wait()
    wide = losses.to(torch.promote_types(head.hidden.dtype, torch.float32))
    objective = replace(objective, reduction=reduction)
    return _reduced(losses[0], wide, num_items, objective), wide, gradients


def rows_of_chunk(student: Dense, teacher: Any, group: groups.Group) -> int:
    """Rows whose logits exist at a time, the same on every rank; there are two such chunks."""
    columns = max(group.layout.counts())
    rows = chunked.step_rows(student, teacher, 2 * columns)
    if isinstance(student, LinearHead):
        rows = min(rows, chunked.chunk_rows(student, 2 * columns))
    return rows


def _reduced(
    losses: Tensor, rows: Tensor, num_items: Tensor | None, objective: Objective
) -> Tensor:
    """losses (…) float64, rows (3, …) -> the loss."""
    if objective.reduction == "none":
        return rows[0].clone()
    return chunked.reduced(losses, num_items, objective.reduction, rows.dtype)
