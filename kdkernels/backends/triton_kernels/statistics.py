"""A row's logits, tile by tile, and its statistics: maxima, Σ e^{(s − max)/T}, Σ e^{(t − max)/T},
Σ_{j≠y} e^{s − max}, and what a far forward or reverse KL follows from.

A lane is 8 neighbouring columns of a row; it raises the maxima that its sums are relative to as it
goes, so that nothing is exchanged between lanes before the end.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import (
    INFINITY,
    LOG2E,
    LOG2E_LO,
    anchor,
    capped,
    exp_exact,
    exp_of,
    row_max,
    row_sum,
    some,
    two_diff,
)
from .divergence import REVERSE_KL
from .team import field_of, meet, publish

# Below this Σ_{j≠y} e^{s_j − max_s}, e^-8, what a float loses of s − max_s and of its product with
# log2(e) / T shows in the loss and in the label's gradient (hazards.md, N1 and N6).
CONFIDENT = tl.constexpr(3.4e-4)


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    DIVERGENCE: tl.constexpr
    DISTILL: tl.constexpr  # the terms
    HARD: tl.constexpr
    GRADIENT: tl.constexpr
    HALF: tl.constexpr  # the student's logits are float16
    ROWS: tl.constexpr  # of a tile: R
    CHUNKS: tl.constexpr  # of a tile: C
    # No row of any tensor begins or ends within a chunk: padding is read and zeroed with columns.
    WHOLE: tl.constexpr
    HELD: tl.constexpr  # one tile holds all of a row, which is read once
    PROGRAMS: tl.constexpr  # that share a row
    PROJECTED: tl.constexpr  # logits come as projections that Cap makes logits of


class Row(NamedTuple):
    """The R rows in hand."""

    index: tl.tensor
    inside: tl.tensor  # there are as many rows
    bad: tl.tensor  # its label is out of range
    main: tl.tensor  # it has a share in loss and gradient
    read: tl.tensor  # something is wanted of its logits
    weight: tl.tensor
    student: tl.tensor  # where column 0 lies
    teacher: tl.tensor
    grad: tl.tensor
    label: tl.tensor  # its column
    s_label: tl.tensor
    t_label: tl.tensor
    begin: tl.tensor  # this program's columns
    end: tl.tensor
    s: tl.tensor  # the logits where a tile holds them all
    t: tl.tensor


@triton.jit
def stride_of(stride, WHOLE: tl.constexpr):
    """In elements."""
    if WHOLE:
        return stride.to(tl.int64) * 8
    else:
        return stride.to(tl.int64)


@triton.jit
def starts_of(data, stride_b, stride_l, index, length):
    """Where column 0 of each row lies."""
    return data + (index // length) * stride_b + (index % length) * stride_l


@triton.jit
def columns_from(start, CHUNKS: tl.constexpr):
    """(1, C, 8)"""
    chunk = tl.arange(0, CHUNKS)[None, :, None]
    return start + chunk * 8 + tl.arange(0, 8)[None, None, :]


@triton.jit
def inside(column, end, WHOLE: tl.constexpr):
    """Which of the columns (1, C, 8) are loaded and stored."""
    if WHOLE:
        chunk = tl.min(column, 2, keep_dims=True)
        return tl.broadcast_to(chunk < end, column.shape)
    else:
        return column < end


@triton.jit
def load_side(start, cap, read, column, end, kind):
    """Logits (R, C, 8) of one side, −inf beyond the columns and in rows that are not read."""
    mask = tl.where(read, inside(column, end, kind.WHOLE), False)
    x = tl.load(start + column, mask=mask, other=-INFINITY).to(tl.float32)
    if kind.PROJECTED:
        x = tl.where(mask, capped(x, cap), -INFINITY)
    if kind.WHOLE:
        x = tl.where(column < end, x, -INFINITY)
    return x


@triton.jit
def load_tile(task, student, teacher, read, column, end, kind):
    s = load_side(student, task.student_cap, read, column, end, kind)
    t = tl.full(s.shape, -INFINITY, tl.float32)
    if kind.DISTILL:
        t = load_side(teacher, task.teacher_cap, read, column, end, kind)
    return s, t


@triton.jit
def logits(task, row, column, kind):
    if kind.HELD:
        return row.s, row.t
    else:
        return load_tile(task, row.student, row.teacher, row.read, column, row.end, kind)


class Sums(NamedTuple):
    max_s: tl.tensor
    max_t: tl.tensor
    z_s: tl.tensor  # Σ e^{(s − max_s)/T}
    z_t: tl.tensor  # Σ e^{(t − max_t)/T}
    # Σ e^{(t − max_t)/T} ((s − max_s) − (t − max_t)); reverse KL: s and t swapped
    gap: tl.tensor
    z_rest: tl.tensor  # Σ_{j≠y} e^{s_j − max_s}


@triton.jit
def raise_maxima(task, sums, max_s, max_t, kind):
    """The sums as they would be had the maxima been known from the beginning."""
    seen_s = (max_s > sums.max_s) & (sums.max_s > -INFINITY)
    seen_t = (max_t > sums.max_t) & (sums.max_t > -INFINITY)
    d_s = tl.where(seen_s, sums.max_s - max_s, 0.0)
    d_t = tl.where(seen_t, sums.max_t - max_t, 0.0)
    z_s = sums.z_s
    z_t = sums.z_t
    gap = sums.gap
    z_rest = sums.z_rest
    if kind.DISTILL:
        factor_s = exp_of(d_s, task.rate)
        factor_t = exp_of(d_t, task.rate)
        if kind.DIVERGENCE == REVERSE_KL:
            gap = factor_s * (gap + z_s * (d_t - d_s))
        else:
            gap = factor_t * (gap + z_t * (d_s - d_t))
        z_s *= factor_s
        z_t *= factor_t
    if kind.HARD:
        # As exact as the loss of a confident row, which this factor is a factor of.
        d = two_diff(tl.where(seen_s, sums.max_s, 0.0), tl.where(seen_s, max_s, 0.0))
        z_rest *= exp_exact(d.hi, d.lo, LOG2E, LOG2E_LO)
    return Sums(max_s, max_t, z_s, z_t, gap, z_rest)


@triton.jit
def hard_exponentials(task, x, x_lo, e_s, EXACT: tl.constexpr, kind):
    """e^{s − max_s}; where T is a small integer a power of e_s = e^{(s − max_s)/T}."""
    if kind.DISTILL:
        if task.power > 0.0:
            e = e_s
            for _ in range(1, tl.cast(task.power, tl.int32)):
                e = e * e_s
        else:
            e = exp_unit(x, x_lo, EXACT)
    else:
        e = exp_unit(x, x_lo, EXACT)
    return e


@triton.jit
def exp_unit(x, x_lo, EXACT: tl.constexpr):
    if EXACT:
        return exp_exact(x, x_lo, LOG2E, LOG2E_LO)
    else:
        return exp_of(x, LOG2E)


@triton.jit
def scan(task, row, max_s, max_t, EXACT: tl.constexpr, kind):
    """The sums of each lane, the label's column left out. EXACT: with what a float loses of
    s − max_s, and the maxima (R) are those of the row."""
    lanes = tl.zeros((kind.ROWS, kind.CHUNKS, 1), tl.float32)
    lane_s = lanes + max_s
    lane_t = lanes + max_t
    sums = Sums(lane_s, lane_t, lanes, lanes, lanes, lanes)
    # While one tile is computed the next ones are on their way.
    STAGES: tl.constexpr = 1 if EXACT else 3
    for start in tl.range(row.begin, row.end, kind.CHUNKS * 8, num_stages=STAGES):
        column = columns_from(start, kind.CHUNKS)
        s, t = logits(task, row, column, kind)
        if kind.HARD:
            label = column == row.label
            s = tl.where(label, -INFINITY, s)
            t = tl.where(label, -INFINITY, t)
        if not EXACT:
            lane_s = tl.maximum(sums.max_s, tl.max(s, 2, keep_dims=True))
            lane_t = tl.maximum(sums.max_t, tl.max(t, 2, keep_dims=True))
            sums = raise_maxima(task, sums, lane_s, lane_t, kind)
        from_s = two_diff(s, anchor(lane_s))
        e_s = from_s.hi
        z_s = sums.z_s
        z_t = sums.z_t
        gap = sums.gap
        z_rest = sums.z_rest
        if kind.DISTILL:
            x = from_s.hi
            y = t - anchor(lane_t)
            if EXACT:
                e_s = exp_exact(x, from_s.lo, task.rate, task.rate_lo)
            else:
                e_s = exp_of(x, task.rate)
            e_t = exp_of(y, task.rate)
            if kind.DIVERGENCE == REVERSE_KL:
                terms = tl.where(x > -INFINITY, e_s * (y - x), 0.0)
            else:
                terms = tl.where(y > -INFINITY, e_t * (x - y), 0.0)
            z_s += tl.sum(e_s, 2, keep_dims=True)
            z_t += tl.sum(e_t, 2, keep_dims=True)
            gap += tl.sum(terms, 2, keep_dims=True)
        if kind.HARD:
            e = hard_exponentials(task, from_s.hi, from_s.lo, e_s, EXACT, kind)
            z_rest += tl.sum(e, 2, keep_dims=True)
        sums = Sums(lane_s, lane_t, z_s, z_t, gap, z_rest)
    return sums


@triton.jit
def merge_lanes(task, sums, EXACT: tl.constexpr, kind):
    """The sums of the row. EXACT: the lanes have its maxima."""
    max_s = row_max(sums.max_s, kind.ROWS)
    max_t = row_max(sums.max_t, kind.ROWS)
    if not EXACT:
        sums = raise_maxima(task, sums, max_s, max_t, kind)
    return Sums(
        max_s,
        max_t,
        row_sum(sums.z_s, kind.ROWS),
        row_sum(sums.z_t, kind.ROWS),
        row_sum(sums.gap, kind.ROWS),
        row_sum(sums.z_rest, kind.ROWS),
    )


@triton.jit
def add_label(task, row, sums, kind):
    max_s = tl.maximum(sums.max_s, row.s_label)
    max_t = tl.maximum(sums.max_t, row.t_label)
    sums = raise_maxima(task, sums, max_s, max_t, kind)
    if kind.DISTILL:
        x = row.s_label - anchor(max_s)
        y = row.t_label - anchor(max_t)
        e_s = exp_of(x, task.rate)
        e_t = exp_of(y, task.rate)
        if kind.DIVERGENCE == REVERSE_KL:
            gap = tl.where(x > -INFINITY, e_s * (y - x), 0.0)
        else:
            gap = tl.where(y > -INFINITY, e_t * (x - y), 0.0)
        sums = Sums(max_s, max_t, sums.z_s + e_s, sums.z_t + e_t, sums.gap + gap, sums.z_rest)
    return sums


@triton.jit
def merge(task, row, sums, team, EXACT: tl.constexpr, kind):
    sums = merge_lanes(task, sums, EXACT, kind)
    if kind.PROGRAMS > 1:
        publish(team, 0, sums.max_s, kind)
        publish(team, 1, sums.max_t, kind)
        publish(team, 2, sums.z_s, kind)
        publish(team, 3, sums.z_t, kind)
        publish(team, 4, sums.gap, kind)
        publish(team, 5, sums.z_rest, kind)
        team, board = meet(team, kind)
        parts = Sums(
            field_of(board, 0),
            field_of(board, 1),
            field_of(board, 2),
            field_of(board, 3),
            field_of(board, 4),
            field_of(board, 5),
        )
        sums = merge_lanes(task, parts, EXACT, kind)
    if kind.HARD:
        sums = add_label(task, row, sums, kind)
    return sums, team


@triton.jit
def statistics(task, row, team, kind):
    sums = scan(task, row, -INFINITY, -INFINITY, False, kind)
    sums, team = merge(task, row, sums, team, False, kind)
    if kind.HARD:
        confident = row.read & (sums.z_rest < CONFIDENT)
        if some(confident, kind.ROWS):
            exact = scan(task, row, sums.max_s, sums.max_t, True, kind)
            exact, team = merge(task, row, exact, team, True, kind)
            sums = Sums(
                sums.max_s,
                sums.max_t,
                tl.where(confident, exact.z_s, sums.z_s),
                tl.where(confident, exact.z_t, sums.z_t),
                tl.where(confident, exact.gap, sums.gap),
                tl.where(confident, exact.z_rest, sums.z_rest),
            )
    return sums, team
