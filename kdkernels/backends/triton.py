"""The row operators in Triton, for GPUs without compiled kernels: NVIDIA, AMD, Intel.

This file has the operators, triton_launch.py what a launch takes, triton_shards.py the operators
for shards; the kernels are in `triton_kernels/`, imported by the first call. With
TRITON_INTERPRET=1 they run on CPU tensors, for tests and debugging.
"""

import importlib.util

import torch

from .. import ops
from ..objective import Objective
from . import bad_labels, marks, triton_shards
from . import triton_launch as launch
from .triton_task import make_task

DEVICE_TYPES = ("cuda", "xpu")
INSTALLED = importlib.util.find_spec("triton") is not None


def unavailable(device_type):
    """Why this backend cannot take tensors of a device type, or None."""
    if not INSTALLED:
        return "triton is not installed"
    if device_type == "cpu":
        if launch.interpreting():
            return None
        return "Triton compiles for GPUs (TRITON_INTERPRET=1 runs it on CPU tensors, slowly)"
    if device_type not in DEVICE_TYPES:
        return "Triton compiles for NVIDIA, AMD and Intel GPUs"
    if not torch.get_device_module(device_type).is_available():
        return f"torch sees no {device_type} device"
    if device_type == "cuda" and not torch.version.hip and _capability() < (7, 0):
        return "Triton compiles for NVIDIA GPUs of compute capability 7.0 or newer"
    return None


@marks.constant
def _capability():
    return torch.cuda.get_device_capability()


# ---- The operators -------------------------------------------------------------------------------


def _launches(objective, has_labels, want_terms):
    """(task, distill, hard) of each launch a call takes: the term that is wanted but not part of
    the loss first, because the gradient may replace the logits."""
    task = make_task(objective, want_terms)
    distill, hard = objective.distill_weight != 0, objective.hard_weight != 0
    if want_terms and (not distill or (has_labels and not hard)):
        yield task._replace(main=0.0), not distill, not hard
        task = task._replace(others=1.0)
    yield task, distill, hard


def _compute(student, teacher, labels, weights, num_items, grad, want_terms, options):
    with launch.on(student), launch.rounded(grad) as grad:
        return _launch(student, teacher, labels, weights, num_items, grad, want_terms, options)


def _launch(student, teacher, labels, weights, num_items, grad, want_terms, options):
    from . import triton_kernels as kernels

    objective = Objective(*options)
    ignore_index, columns = objective.ignore_index, objective.vocab_size
    device, half = student.device, student.dtype == torch.float16
    flag = launch.label_flag(device)
    logits, kept = (teacher[0], None) if len(teacher) == 1 else (None, teacher)
    plan = launch.plan_of(student, logits, columns)
    batch, length, width = ops.sizes(student)
    loss, unscale, row_losses = losses = ops.new_losses(student)
    of_mean = labels, weights, num_items
    mean, arrivals, board = launch.prepare(
        student, plan, of_mean, ignore_index, objective.reduction == "mean"
    )
    launches = _launches(objective, labels is not None, want_terms)
    for number, (task, distill, hard) in enumerate(launches):
        rows = (
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
    if device.type == "cpu" and flag:
        row = flag.item() - 1
        raise IndexError(ops.bad_label_message(labels, row, ignore_index, columns))
    return losses


def _scale_rows_(grad, upstream, unscale, labels, weights, ignore_index, vocab_size):
    from . import triton_kernels as kernels

    if grad.device.type != "cpu":
        bad_labels.raise_earlier(grad.device)
    batch, length, _ = ops.sizes(grad)
    plan = launch.make_plan(launch.device_of(grad.device), batch * length, vocab_size, 0)
    whole, strides = launch.strides_of(grad)
    with launch.on(grad), launch.rounded(grad) as grad:
        kernels.scale_rows[(-(-batch * length // plan.rows),)](
            grad,
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
ops.register("triton", dict.fromkeys(("CPU", "CUDA", "XPU"), OPERATORS))
