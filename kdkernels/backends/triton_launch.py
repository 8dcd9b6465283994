"""What every launch of a Triton kernel takes: how rows are shared out over programs, the memory
these meet in, what the kernel is compiled for."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..objective import DIVERGENCES, Objective
from . import bad_labels
from .triton import interpreting
from .triton_task import NO_CAP, Task

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


def device_of(device: torch.device) -> Device:
    # The interpreter runs one program after the other: none may wait for another.
    return Device(0, 0, 0) if interpreting() else _gpu(device)


@functools.cache
def _gpu(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(32, 0, 0)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.warp_size,
        properties.multi_processor_count,
        properties.L2_cache_size,
        not torch.version.hip,
    )


def make_plan(device: Device, rows: int, columns: int, row_bytes: int) -> Plan:
    """`row_bytes`: what a row takes up, student, teacher and gradient."""
    if device.lanes == 0:
        return _interpreted(rows, columns)
    table = TABLES[device.lanes]
    width = power_of_2(max(columns, 8))
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


def options_of(device: Device, plan: Plan) -> dict[str, Any]:
    """How Triton compiles and launches a kernel of a plan."""
    options = dict(num_warps=plan.warps, enable_fp_fusion=True)
    if plan.programs > 1:
        options["launch_cooperative_grid"] = True
    if device.nvidia:
        # All that a multiprocessor has for this many warps; by itself ptxas spills to stay below.
        options["maxnreg"] = min(255, 2048 // plan.warps)
    return options


def _interpreted(rows: int, columns: int) -> Plan:
    """Small enough that short rows take several tiles, and few calls of NumPy for many rows; few
    and long ones by themselves, as on a GPU."""
    held = columns <= 64
    tile = power_of_2(max(columns, 8)) if held else power_of_2(max(64, columns // 3))
    together = 1
    if columns <= 8192 or rows > 8:
        together = max(2, min(power_of_2(max(rows, 1)), 2**15 // tile))
    return Plan(together, tile // 8, held, 1, -(-rows // together), 1)


def power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()


# ---- A launch ------------------------------------------------------------------------------------


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current stream of the current device: that of x."""
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    current: contextlib.AbstractContextManager[Any] = torch.get_device_module(x.device).device_of(x)
    return current


@contextlib.contextmanager
def rounded(grad: Tensor | None) -> Iterator[Tensor | None]:
    """What the kernels write a gradient to: `grad` itself, or floats that are rounded to it
    afterwards, because Triton's interpreter truncates to bfloat16 where GPUs round."""
    if grad is None or grad.dtype != torch.bfloat16 or not interpreting():
        yield grad
        return
    wide = grad.float()
    yield wide
    grad.copy_(wide)


def strides_of(*tensors: Tensor) -> tuple[bool, list[int]]:
    """Whether no row begins or ends within a chunk of 8 columns, and their strides, in chunks if
    so."""
    strides = [stride for x in tensors for stride in ops.strides(x)]
    whole = all(x % 8 == 0 for x in (*strides, *(x.shape[-1] for x in tensors)))
    return whole, [x // 8 for x in strides] if whole else strides


def plan_of(student: Tensor, teacher: Tensor | None, columns: int) -> Plan:
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


def label_flag(device: torch.device) -> Tensor:
    """int64 (): for 1 + a row whose label is out of range."""
    if device.type == "cpu":
        return torch.zeros((), dtype=torch.int64)
    return bad_labels.raise_earlier(device)


def prepare(
    student: Tensor,
    plan: Plan,
    of_mean: tuple[Tensor | None, ...],
    ignore_index: int,
    is_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """mean, arrivals of two launches and board: see distill_rows. `of_mean`: labels, weights and
    num_items."""
    from . import triton_kernels as kernels

    labels, weights, num_items = of_mean
    batch, length, _ = ops.sizes(student)
    mean = student.new_empty(3, dtype=torch.float32)
    arrivals = student.new_empty((2, MAX_TEAMS), dtype=torch.int32)
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
        MEAN=is_mean,
        COUNT=arrivals.numel(),
    )
    return mean, arrivals, board


def compiled_for(
    objective: Objective, task: Task, hard: bool, plan: Plan, device: torch.device
) -> dict[str, Any]:
    """What distill_rows and distill_kept_rows have in common."""
    return dict(
        DIVERGENCE=DIVERGENCES.index(objective.divergence),
        HARD=hard,
        CHUNKS=plan.chunks,
        PROGRAMS=plan.programs,
        PROJECTED=task.student_cap != NO_CAP or task.teacher_cap != NO_CAP,
        **options_of(device_of(device), plan),
    )


def kept_in_pairs(
    fields: list[Tensor], temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What distill_kept_rows takes of a sparse teacher: ids, and in pairs of floats log p, T log p
    and the log-probability of the rest."""
    ids, log_p, log_rest = fields
    return ids, pairs(log_p), pairs(log_p * temperature), pairs(log_rest)


def pairs(x: Tensor) -> Tensor:
    """float64 (...) as two floats: float32 (2, ...)."""
    hi = x.float()
    return torch.stack([hi, (x - hi).float().nan_to_num_(nan=0.0)])
