"""The row operators in Triton, for GPUs without compiled kernels: NVIDIA, AMD, Intel.

This file chooses a plan, works out a row's constants and launches; the kernels are in
`triton_kernels/`, imported by the first call. With TRITON_INTERPRET=1 they run on CPU tensors, for
tests and debugging.
"""

import contextlib
import functools
import importlib.util
import math
import os
import struct
from typing import NamedTuple

import torch

from .. import ops
from ..objective import DIVERGENCES, Objective
from . import bad_labels, marks

DEVICE_TYPES = ("cuda", "xpu")
INSTALLED = importlib.util.find_spec("triton") is not None


def unavailable(device_type):
    """Why this backend cannot take tensors of a device type, or None."""
    if not INSTALLED:
        return "triton is not installed"
    if device_type == "cpu":
        if _interpreting():
            return None
        return "Triton compiles for GPUs (TRITON_INTERPRET=1 runs it on CPU tensors, slowly)"
    if device_type not in DEVICE_TYPES:
        return "Triton compiles for NVIDIA, AMD and Intel GPUs"
    if not torch.get_device_module(device_type).is_available():
        return f"torch sees no {device_type} device"
    if device_type == "cuda" and not torch.version.hip and _capability() < (7, 0):
        return "Triton compiles for NVIDIA GPUs of compute capability 7.0 or newer"
    return None


def _interpreting():
    return os.environ.get("TRITON_INTERPRET") == "1"


@marks.constant
def _capability():
    return torch.cuda.get_device_capability()


# ---- The table -----------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How rows are shared out over programs."""

    rows: int  # of a program at a time, R
    chunks: int  # of 8 columns, of a tile
    held: bool  # a tile holds all of a row, which is read once
    programs: int  # that share a row
    teams: int  # of programs, in the grid
    warps: int


class Table(NamedTuple):
    held: int  # columns up to which a row stays in registers
    tile: int  # columns of a tile of longer rows
    short: int  # elements of a tile of several short rows
    warp_elements: int  # of a tile, for each warp


TABLES = {
    32: Table(held=4096, tile=2048, short=1024, warp_elements=256),  # lanes of a warp
    64: Table(held=4096, tile=4096, short=2048, warp_elements=512),
}
MAX_WARPS = 16
MAX_PROGRAMS = 64
MAX_TEAMS = 512
MAX_COLUMNS = 2**30  # they and their tiles count in 32 bits
PROGRAMS_PER_MULTIPROCESSOR = 1


class Device(NamedTuple):
    """What the plan depends on."""

    lanes: int  # of a warp
    multiprocessors: int  # 0: programs cannot wait for each other
    l2_bytes: int
    nvidia: bool = False


def device_of(device):
    # The interpreter runs one program after the other: none may wait for another.
    return Device(0, 0, 0) if _interpreting() else _gpu(device)


@functools.cache
def _gpu(device):
    if device.type != "cuda":
        return Device(32, 0, 0)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.warp_size,
        properties.multi_processor_count,
        properties.L2_cache_size,
        not torch.version.hip,
    )


def make_plan(device, rows, columns, row_bytes):
    """`row_bytes`: what a row takes up, student, teacher and gradient."""
    if device.lanes == 0:
        return _interpreted(rows, columns)
    table = TABLES[device.lanes]
    width = _power_of_2(max(columns, 8))
    held = width <= table.held
    tile = width if held else table.tile
    together = max(1, table.short // tile) if held else 1
    warps = max(1, min(MAX_WARPS, together * tile // table.warp_elements))
    programs = 1
    if not held and device.multiprocessors:
        resident = device.multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
        # Half of the L2 cache holds all the rows in work.
        while (
            programs < MAX_PROGRAMS
            and resident // programs * row_bytes > device.l2_bytes // 2
            and 2 * programs <= resident
            and 2 * programs * tile <= columns
        ):
            programs *= 2
    teams = -(-rows // together)
    if programs > 1:
        teams = min(teams, resident // programs, MAX_TEAMS)
    return Plan(together, tile // 8, held, programs, teams, warps)


def options_of(device, plan):
    """How Triton compiles and launches a kernel of a plan."""
    options = dict(num_warps=plan.warps, enable_fp_fusion=True)
    if plan.programs > 1:
        options["launch_cooperative_grid"] = True
    if device.nvidia:
        # All that a multiprocessor has for this many warps; by itself ptxas spills to stay below.
        options["maxnreg"] = min(255, 2048 // plan.warps)
    return options


def _interpreted(rows, columns):
    """Small enough that short rows take several tiles, and few calls of NumPy for many rows; few
    and long ones by themselves, as on a GPU."""
    held = columns <= 64
    tile = _power_of_2(max(columns, 8)) if held else _power_of_2(max(64, columns // 3))
    together = 1
    if columns <= 8192 or rows > 8:
        together = max(2, min(_power_of_2(max(rows, 1)), 2**15 // tile))
    return Plan(together, tile // 8, held, 1, -(-rows // together), 1)


def _power_of_2(x):
    return 1 << (x - 1).bit_length()


# ---- A row's constants ---------------------------------------------------------------------------


class Cap(NamedTuple):
    """What makes logits of a projection: see arithmetic.py."""

    scale: float
    cap: float
    rate: float


NO_CAP = Cap(1.0, 0.0, 0.0)


class Task(NamedTuple):
    """csrc/cuda/task.h: RowTask. Pairs of floats for what one float is too short for.

    Floats all of them, because Triton compiles anew for some values of integers in tuples.
    """

    power: float  # T where e^s is taken as that power of e^{s/T}, else 0
    main: float  # this launch writes loss and gradient
    others: float  # and the one before has written the term that this one does not compute
    want_terms: float  # also of rows of weight 0
    classes: float  # V
    rate: float  # log2(e) / T
    rate_lo: float
    temperature: float
    temperature_lo: float
    inv_temperature: float
    w_p: float  # of the mixture m = w_p p + w_q q
    w_q: float
    far_from: float  # from which D on, in units of 1 + |log(z_s / z_t)|, a row can be far apart
    far_limit: float  # and up to which one
    far_unit: float  # of its slopes, and what the sums of them have too much
    far_offset: float
    grad_distill: float  # distill_weight / T
    grad_distill_lo: float
    grad_hard: float
    grad_hard_lo: float
    distill_weight: float
    hard_weight: float
    distill_scale: float
    label_smoothing: float
    smoothing: float  # ε / V
    smoothing_lo: float
    smoothed_label: float  # ε (1 − 1 / V)
    student_cap: Cap
    teacher_cap: Cap


def _split(x):
    hi = struct.unpack("f", struct.pack("f", x))[0]
    return hi, x - hi


def _weights(divergence, beta):
    """Of teacher and student in the mixture."""
    return (1 - beta, beta) if divergence == "skew_reverse_kl" else (beta, 1 - beta)


def _far_limit(divergence, w_p, w_q):
    """As in csrc/common/far.h."""
    if divergence in ("forward_kl", "reverse_kl"):
        return 1e30
    smallest_p = 1 / 6 if divergence == "jsd" else 1 / 1024
    largest_q = 0.5 if divergence == "skew_reverse_kl" else 1
    if divergence == "tvd" or w_p < smallest_p or not 1 / 1024 <= w_q <= largest_q:
        return 0.0
    if divergence == "jsd":
        return 0.8 * -(w_p * math.log(w_p) + w_q * math.log(w_q))
    return 0.8 * -math.log(w_p if divergence == "skew_forward_kl" else w_q)


def _far_unit(divergence, w_p, w_q, temperature):
    if divergence == "reverse_kl":
        return 1 / temperature
    if divergence == "skew_forward_kl":
        return w_q / w_p
    return w_q * math.log(2) if divergence == "jsd" else math.log(2)


def _far_offset(divergence, w_q):
    if divergence == "jsd":
        return -math.log2(w_q)
    return -math.log2(w_q) - math.log2(math.e) if divergence == "skew_reverse_kl" else 0.0


def _cap(scale, cap):
    return Cap(scale, cap, scale / cap if cap else 0.0)


def make_task(objective, want_terms):
    divergence, columns = objective.divergence, objective.vocab_size
    w_p, w_q = _weights(divergence, objective.beta)
    T, T_lo = _split(objective.temperature)
    rate, rate_lo = _split(math.log2(math.e) / objective.temperature)
    grad_distill, grad_distill_lo = _split(objective.distill_weight / objective.temperature)
    grad_hard, grad_hard_lo = _split(objective.hard_weight)
    smoothing, smoothing_lo = _split(objective.label_smoothing / max(columns, 1))
    return Task(
        power=objective.temperature if objective.temperature in (1, 2, 3, 4) else 0.0,
        main=1.0,
        others=0.0,
        want_terms=float(want_terms),
        classes=float(columns),
        rate=rate,
        rate_lo=rate_lo,
        temperature=T,
        temperature_lo=T_lo,
        inv_temperature=1 / objective.temperature,
        w_p=w_p,
        w_q=w_q,
        far_from=1 / 24 if divergence == "jsd" else 1 / 12,
        far_limit=_far_limit(divergence, w_p, w_q),
        far_unit=_far_unit(divergence, w_p, w_q, objective.temperature),
        far_offset=_far_offset(divergence, w_q),
        grad_distill=grad_distill,
        grad_distill_lo=grad_distill_lo,
        grad_hard=grad_hard,
        grad_hard_lo=grad_hard_lo,
        distill_weight=objective.distill_weight,
        hard_weight=objective.hard_weight,
        distill_scale=objective.distill_scale,
        label_smoothing=objective.label_smoothing,
        smoothing=smoothing,
        smoothing_lo=smoothing_lo,
        smoothed_label=objective.label_smoothing * (1 - 1 / max(columns, 1)),
        student_cap=_cap(objective.student_scale, objective.student_cap),
        teacher_cap=_cap(objective.teacher_scale, objective.teacher_cap),
    )


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


def _on(x):
    """Launches go to the current stream of the current device: that of x."""
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(x.device).device_of(x)


@contextlib.contextmanager
def _rounded(grad):
    """What the kernels write a gradient to: `grad` itself, or floats that are rounded to it
    afterwards, because Triton's interpreter truncates to bfloat16 where GPUs round."""
    if grad is None or grad.dtype != torch.bfloat16 or not _interpreting():
        yield grad
        return
    wide = grad.float()
    yield wide
    grad.copy_(wide)


def _strides(*tensors):
    """Whether no row begins or ends within a chunk of 8 columns, and their strides, in chunks if
    so."""
    strides = [stride for x in tensors for stride in ops.strides(x)]
    whole = all(x % 8 == 0 for x in (*strides, *(x.shape[-1] for x in tensors)))
    return whole, [x // 8 for x in strides] if whole else strides


def _compute(student, teacher, labels, weights, num_items, grad, want_terms, options):
    with _on(student), _rounded(grad) as grad:
        return _launch(student, teacher, labels, weights, num_items, grad, want_terms, options)


def _plan(student, teacher, columns):
    """`teacher`: logits, or None for what is sparse, of which a program takes a row at a time."""
    batch, length, width = ops.sizes(student)
    if width >= MAX_COLUMNS:
        raise ValueError(
            f"backend 'triton' takes less than 2^30 columns, got student logits of {width}"
        )
    rows = batch * length
    elements = [2 * student.element_size(), 0 if teacher is None else teacher.element_size()]
    plan = make_plan(device_of(student.device), rows, columns, columns * sum(elements))
    if teacher is not None:
        return plan
    return plan._replace(rows=1, held=False, teams=plan.teams if plan.programs > 1 else rows)


def _launch(student, teacher, labels, weights, num_items, grad, want_terms, options):
    from . import triton_kernels as kernels

    objective = Objective(*options)
    ignore_index, columns = objective.ignore_index, objective.vocab_size
    device, half = student.device, student.dtype == torch.float16
    on_cpu = device.type == "cpu"
    flag = torch.zeros((), dtype=torch.int64) if on_cpu else bad_labels.raise_earlier(device)
    logits, kept = (teacher[0], None) if len(teacher) == 1 else (None, teacher)
    plan = _plan(student, logits, columns)
    batch, length, width = ops.sizes(student)
    loss, unscale, row_losses = losses = ops.new_losses(student)
    mean = student.new_empty(3, dtype=torch.float32)
    arrivals = student.new_empty((2, MAX_TEAMS), dtype=torch.int32)  # a launch each
    teams = plan.teams if plan.programs > 1 else 1
    board = student.new_empty((teams, 2, plan.programs, kernels.FIELDS.value), dtype=torch.float32)
    kernels.prepare[(1,)](
        labels,
        weights,
        None if num_items is None else num_items.view(torch.int64),
        mean,
        arrivals,
        batch * length,
        ignore_index,
        MEAN=objective.reduction == "mean",
        COUNT=arrivals.numel(),
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
        compiled_for = dict(
            DIVERGENCE=DIVERGENCES.index(objective.divergence),
            HARD=hard,
            CHUNKS=plan.chunks,
            PROGRAMS=plan.programs,
            PROJECTED=task.student_cap != NO_CAP or task.teacher_cap != NO_CAP,
            **options_of(device_of(device), plan),
        )
        written = student if grad is None else grad
        grid = (plan.teams * plan.programs,)
        if kept is not None and distill:
            whole, strides = _strides(student, written)
            count = kept[0].shape[-1]
            kernel = kernels.distill_kept_rows[grid]
            inputs = task, student, *_kept(kept, objective.temperature)
            rows = *rows, count
            compiled_for |= dict(
                TWO=hard and objective.temperature != 1, KEPT=max(8, _power_of_2(count))
            )
        else:
            dense = student if logits is None else logits  # not read for the cross-entropy alone
            whole, strides = _strides(student, dense, written)
            kernel, inputs = kernels.distill_rows[grid], (task, student, dense)
            compiled_for |= dict(DISTILL=distill, ROWS=plan.rows, HELD=plan.held)
        kernel(*inputs, *rows, *strides, WHOLE=whole, **compiled_for)
    kernels.finish[(1,)](row_losses, mean, loss, None if half else unscale, batch * length)
    if on_cpu and flag:
        row = flag.item() - 1
        raise IndexError(ops.bad_label_message(labels, row, ignore_index, columns))
    return losses


def _kept(fields, temperature):
    """What distill_kept_rows takes of a sparse teacher: ids, and in pairs of floats log p, T log p
    and the log-probability of the rest."""
    ids, log_p, log_rest = fields
    return ids, _pairs(log_p), _pairs(log_p * temperature), _pairs(log_rest)


def _pairs(x):
    """float64 (...) as two floats: float32 (2, ...)."""
    hi = x.float()
    return torch.stack([hi, (x - hi).float().nan_to_num_(nan=0.0)])


def _scale_rows_(grad, upstream, unscale, labels, weights, ignore_index, vocab_size):
    from . import triton_kernels as kernels

    if grad.device.type != "cpu":
        bad_labels.raise_earlier(grad.device)
    batch, length, _ = ops.sizes(grad)
    plan = make_plan(device_of(grad.device), batch * length, vocab_size, 0)
    whole, strides = _strides(grad)
    with _on(grad), _rounded(grad) as grad:
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


ops.register("triton", dict.fromkeys(("CPU", "CUDA", "XPU"), ops.operators(_compute, _scale_rows_)))
