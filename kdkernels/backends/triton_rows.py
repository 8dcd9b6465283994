"""The Triton operators for whole rows: see triton.py."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..objective import Objective
from . import bad_labels, triton_shards
from . import triton_launch as launch
from .triton_task import Task, make_task


def _launches(
    objective: Objective, has_labels: bool, want_terms: bool
) -> Iterator[tuple[Task, bool, bool]]:
    """(task, distill, hard) of each launch a call takes: the term that is wanted but not part of
    the loss first, because the gradient may replace the logits."""
    task = make_task(objective, want_terms)
    distill, hard = objective.distill_weight != 0, objective.hard_weight != 0
    if want_terms and (not distill or (has_labels and not hard)):
        yield task._replace(main=0.0), not distill, not hard
        task = task._replace(others=1.0)
    yield task, distill, hard


def _compute(
    student: Tensor,
    teacher: list[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    grad: Tensor | None,
    want_terms: bool,
    options: tuple[Any, ...],
) -> ops.Losses:
    with launch.on(student), launch.rounded(grad) as grad:
        return _launch(student, teacher, labels, weights, num_items, grad, want_terms, options)


def _launch(
    student: Tensor,
    teacher: list[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    grad: Tensor | None,
    want_terms: bool,
    options: tuple[Any, ...],
) -> ops.Losses:
    from . import triton_kernels as kernels

    objective = Objective(*options)
    ignore_index, columns = objective.ignore_index, objective.vocab_size
    device, half = student.device, student.dtype == torch.float16
    flag = launch.label_flag(device)
    logits, kept = (teacher[0], None) if len(teacher) == 1 else (None, teacher)
    inputs: tuple[Any, ...]
    plan = launch.plan_of(student, logits, columns)
    batch, length, width = ops.sizes(student)
    loss, unscale, row_losses = losses = ops.new_losses(student)
    of_mean = labels, weights, num_items
    mean, arrivals, board = launch.prepare(
        student, plan, of_mean, ignore_index, objective.reduction == "mean"
    )
    launches = _launches(objective, labels is not None, want_terms)
    for number, (task, distill, hard) in enumerate(launches):
        rows: tuple[Any, ...] = (
            grad if task.main else None,
            labels,
            weights,
            mean,
            row_losses,
            unscale if half else None,
            flag,
            board,
            arrivals[number],
            batch * length,
            length,
            width,
            columns,
            ignore_index,
        )
        compiled_for = launch.compiled_for(objective, task, hard, plan, device)
        written = student if grad is None else grad
        grid = (plan.teams * plan.programs,)
        if kept is not None and distill:
            whole, strides = launch.strides_of(student, written)
            count = kept[0].shape[-1]
            kernel = kernels.distill_kept_rows[grid]
            inputs = task, student, *launch.kept_in_pairs(kept, objective.temperature)
            rows = *rows, count
            compiled_for |= dict(
                TWO=hard and objective.temperature != 1, KEPT=max(8, launch.power_of_2(count))
            )
        else:
            dense = student if logits is None else logits  # not read for the cross-entropy alone
            whole, strides = launch.strides_of(student, dense, written)
            kernel, inputs = kernels.distill_rows[grid], (task, student, dense)
            compiled_for |= dict(DISTILL=distill, ROWS=plan.rows, HELD=plan.held)
        kernel(*inputs, *rows, *strides, WHOLE=whole, **compiled_for)
    kernels.finish[(1,)](row_losses, mean, loss, None if half else unscale, batch * length)
    if device.type == "cpu" and labels is not None and flag:
        row = int(flag) - 1
        raise IndexError(ops.bad_label_message(labels, row, ignore_index, columns))
    return losses


def _scale_rows_(
    grad: Tensor,
    upstream: Tensor,
    unscale: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    ignore_index: int,
    vocab_size: int,
) -> None:
    from . import triton_kernels as kernels

    if grad.device.type != "cpu":
        bad_labels.raise_earlier(grad.device)
    batch, length, _ = ops.sizes(grad)
    plan = launch.make_plan(launch.device_of(grad.device), batch * length, vocab_size, 0)
    whole, strides = launch.strides_of(grad)
    with launch.on(grad), launch.rounded(grad) as written:
        kernels.scale_rows[(-(-batch * length // plan.rows),)](
            written,
            *strides,
            upstream,
            unscale,
            labels,
            weights,
            batch * length,
            length,
            vocab_size,
            ignore_index,
            PER_ROW=upstream.numel() > 1,
            ROWS=plan.rows,
            CHUNKS=plan.chunks,
            WHOLE=whole,
            num_warps=plan.warps,
        )


OPERATORS = ops.operators(_compute, _scale_rows_, triton_shards.OPERATORS)
