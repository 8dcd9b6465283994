"""A teacher that knows some classes of each row, where a device has some of the columns: shards.py
and kept.py in one.

The sweeps over the columns are here, and what there is one of for each kept class. What the whole
row is made of comes worked out in float64 (triton_shards.py), as do the sums over the kept classes.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import (
    INFINITY,
    TwoFloats,
    add,
    anchor,
    exp_of,
    exp_pair,
    log_of,
    multiply,
    row_sum_pairs,
    two_diff,
    two_product,
)
from .distill import Sizes, Strides, fill_columns
from .divergence import FORWARD_KL, contribution
from .gradient import sum_of_offsets
from .kept import (
    Others,
    Parts,
    exp_1,
    exp_t,
    kept_element,
    known_of,
    rest_element,
    sum_others,
    without_known,
    write_gradient,
)
from .shards import (
    GRADIENT,
    STATISTICS,
    TERM_COUNT,
    TERMS,
    finish_gradient,
    put,
    put_nothing,
    report_label,
    shard_rows_at,
    take,
)
from .statistics import Kind, columns_from, load_side, stride_of
from .team import FIELDS, Team, meet, pair_of, publish_pair

COUNT = tl.constexpr(11)  # of statistics: ops.py
FRAME = tl.constexpr(12)
# From this D on it does not show what z loses as a sum of floats (csrc/common/kept.h:
# needs_exact_rest).
FAR = tl.constexpr(0.25)


# ---- Statistics ----------------------------------------------------------------------------------


@triton.jit
def kept_distance(task, known):
    """Σ p log(p / q) over the kept classes here, each side as shares of what it has of them, times
    what the teacher has: D, if a KL, is no less."""
    x = known.s - anchor(tl.max(known.s))
    e = tl.where(known.here, exp_of(x, task.rate), 0.0)
    p = exp_1(known.log_p)
    share = tl.sum(p)
    gap = tl.where(p > 0.0, p * (known.log_p.hi - x * task.inv_temperature), 0.0)
    return tl.sum(gap) + share * (log_of(tl.sum(e)) - log_of(share))


@triton.jit
def exact_others(task, row, known, maximum, team, kind):
    """Others.z again, as a sum of pairs of floats."""
    zero = (row.index * 0).to(tl.float32)
    z = TwoFloats(zero, zero)
    following = tl.sum((known.column < row.begin).to(tl.int32))
    for start in range(row.begin, row.end, kind.CHUNKS * 8):
        column = columns_from(start, kind.CHUNKS)
        s = load_side(row.student, task.student_cap, row.read, column, row.end, kind)
        s, following = without_known(s, column, known, following, start + kind.CHUNKS * 8)
        if kind.HARD:
            s = tl.where(column == row.label, -INFINITY, s)
        x = two_diff(s, anchor(maximum))
        e = exp_pair(x.hi, x.lo, task.rate, task.rate_lo)
        z = add(z, row_sum_pairs(e, kind.CHUNKS * 8, 1))
    if kind.PROGRAMS > 1:
        publish_pair(team, 0, z, kind)
        team, board = meet(team, kind)
        z = pair_of(board, 0, kind)
    return z, team


@triton.jit
def write_statistics(task, sizes, row, known, out, team, TWO: tl.constexpr, kind):
    zero = (row.index * 0).to(tl.float32)
    others, team = sum_others(task, row, known, team, TWO, kind)
    z = TwoFloats(others.z, zero)
    far = kept_distance(task, known) >= FAR
    if row.read & ~far:
        z, team = exact_others(task, row, known, others.max, team, kind)
    # NaN of a label that is that or infinite and not kept: no sum sees it.
    z_hi = tl.where(tl.abs(row.s_label) == INFINITY, z.hi, z.hi + row.s_label * 0.0)
    z_hi = tl.where(row.s_label == INFINITY, float("nan"), z_hi)
    highest = tl.maximum(tl.maximum(others.max, tl.max(known.s)), row.s_label)
    offset = zero
    if kind.HARD:
        if task.label_smoothing != 0.0:
            offset, team = sum_of_offsets(task, row, anchor(highest), team, kind)
    rows = sizes.rows
    put(out, 0, COUNT, rows, row, others.max, zero, team)
    put(out, 1, COUNT, rows, row, z_hi, z.lo, team)
    put(out, 2, COUNT, rows, row, others.z_hard, zero, team)
    put(out, 3, COUNT, rows, row, row.s_label, zero, team)
    put(out, 4, COUNT, rows, row, offset, zero, team)
    put(out, 5, COUNT, rows, row, highest, zero, team)
    put(out, 6, COUNT, rows, row, zero, zero, team)  # the sums over the kept classes
    put(out, 7, COUNT, rows, row, zero, zero, team)
    put(out, 8, COUNT, rows, row, zero, zero, team)
    put(out, 9, COUNT, rows, row, zero, zero, team)
    put(out, 10, COUNT, rows, row, tl.where(known.apart, 1.0, zero), zero, team)
    return team


# ---- Merged over all devices ---------------------------------------------------------------------


class Whole(NamedTuple):
    """Of the whole row; logits are less the highest."""

    highest: tl.tensor
    z: tl.tensor  # Σ e^{s/T}
    t_log_z: TwoFloats  # T log z
    log_q_rest: TwoFloats  # of the classes that are not kept
    q_rest: tl.tensor
    of_others: tl.tensor  # e^{others/T} as a share of the rest
    of_label: tl.tensor  # that of a label that is not kept
    z_hard: tl.tensor  # Σ e^s
    others_hard: tl.tensor  # e^{others} as a share of it
    other_hard: tl.tensor  # what the label does not have of it
    others: tl.tensor  # the highest logit of the others, as it is
    mean: TwoFloats  # Σ q φ; NaN of a row that is that


@triton.jit
def whole_of(merged, rows, row):
    return Whole(
        take(merged, 0, FRAME, rows, row).hi,
        take(merged, 1, FRAME, rows, row).hi,
        take(merged, 2, FRAME, rows, row),
        take(merged, 3, FRAME, rows, row),
        take(merged, 4, FRAME, rows, row).hi,
        take(merged, 5, FRAME, rows, row).hi,
        take(merged, 6, FRAME, rows, row).hi,
        take(merged, 7, FRAME, rows, row).hi,
        take(merged, 8, FRAME, rows, row).hi,
        take(merged, 9, FRAME, rows, row).hi,
        take(merged, 10, FRAME, rows, row).hi,
        take(merged, 11, FRAME, rows, row),
    )


@triton.jit
def elements_of(task, known, whole):
    """`Element` of the kept classes here, and of the rest."""
    x = two_diff(known.s, whole.highest)
    e = tl.where(known.here, exp_t(task, x), 0.0)
    kept = kept_element(task, known, x, e, whole.z, whole.t_log_z)
    rest = rest_element(known, whole.log_q_rest, whole.q_rest * 0.0, whole.q_rest)
    return kept, rest


@triton.jit
def write_terms(task, sizes, row, known, merged, leads, out, team, KEPT: tl.constexpr, kind):
    """What the kept classes here, and the rest where this device leads, add to D, Σ q and Σ q φ."""
    whole = whole_of(merged, sizes.rows, row)
    kept, rest = elements_of(task, known, whole)
    of = contribution(kept, task.w_p, task.w_q, kind.DIVERGENCE)
    of_rest = contribution(rest, task.w_p, task.w_q, kind.DIVERGENCE)
    here = known.here
    value = tl.sum(tl.where(here, of.term, 0.0))
    q = tl.where(here, kept.q, 0.0)
    mass = row_sum_pairs(TwoFloats(q, tl.zeros_like(q)), KEPT, 1)
    slope = row_sum_pairs(two_product(q, tl.where(here, of.slope, 0.0)), KEPT, 1)
    zero = tl.zeros_like(rest.q)
    if leads != 0:
        value += of_rest.term
        mass = add(mass, TwoFloats(rest.q, zero))
        slope = add(slope, two_product(rest.q, of_rest.slope))
    value += (tl.sum(tl.where(here, kept.p, 0.0)) + rest.p + whole.z) * 0.0  # NaN of these
    put(out, 0, TERM_COUNT, sizes.rows, row, value, zero, team)
    put(out, 1, TERM_COUNT, sizes.rows, row, mass.hi, mass.lo, team)
    put(out, 2, TERM_COUNT, sizes.rows, row, slope.hi, slope.lo, team)


@triton.jit
def write_shard_gradient(
    task, sizes, row, known, merged, inverse, team, TWO: tl.constexpr, KEPT: tl.constexpr, kind
):
    zero = (row.index * 0).to(tl.float32)
    whole = whole_of(merged, sizes.rows, row)
    fill = tl.where(row.read & (tl.abs(whole.mean.hi) < INFINITY), 1.0, float("nan"))
    part = tl.zeros_like(known.s)
    push = zero
    if kind.DISTILL:
        kept, rest = elements_of(task, known, whole)
        if kind.DIVERGENCE == FORWARD_KL:
            part = kept.difference
            push = rest.difference
        else:
            mean = whole.mean
            of = contribution(kept, task.w_p, task.w_q, kind.DIVERGENCE)
            of_rest = contribution(rest, task.w_p, task.w_q, kind.DIVERGENCE)
            part = kept.q * ((of.slope - mean.hi) - mean.lo)
            push = rest.q * ((of_rest.slope - mean.hi) - mean.lo)
    hard_known = tl.zeros_like(known.s)
    hard_label = zero
    of_hard = zero
    if kind.HARD:
        e = tl.where(known.here, exp_1(two_diff(known.s, whole.highest)), 0.0)
        hard_label = task.smoothed_label - whole.other_hard
        of_class = e / whole.z_hard - task.smoothing
        hard_known = tl.where(known.column == row.label, hard_label, of_class)
        of_hard = whole.others_hard
    parts = Parts(zero, zero, part, push * whole.of_label, push * whole.of_others, of_hard)
    others = Others(whole.others, zero, zero)
    scale = multiply(TwoFloats(row.weight, zero), inverse)
    return write_gradient(
        task, row, known, others, parts, hard_known, hard_label, fill, scale, team, TWO, kind
    )


@triton.jit(
    do_not_specialize=[
        *Sizes._fields,
        "count",
        "leads",
        "student_b",
        "student_l",
        "grad_b",
        "grad_l",
    ]
)
def shard_kept_rows(
    task,  # as in shards.py and kept.py, where nothing else is said
    student,
    ids,  # columns here, at least `columns` where there is no class
    log_p,
    log_p_t,
    log_rest,
    grad,
    labels,
    weights,
    mean,
    merged,  # float32 (2, FRAME, N): Whole
    out,
    unscale,
    bad_label,
    board,
    arrivals,
    rows,
    length,
    width,
    columns,
    ignore_index,
    count,
    leads,  # this device adds the rest to the terms
    student_b,
    student_l,
    grad_b,
    grad_l,
    PHASE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    DISTILL: tl.constexpr,
    HARD: tl.constexpr,  # there are labels, which are in no sum over the others
    TWO: tl.constexpr,
    KEPT: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PROJECTED: tl.constexpr,
):
    HALF: tl.constexpr = student.dtype.element_ty == tl.float16
    kind: tl.constexpr = Kind(
        DIVERGENCE,
        DISTILL,
        HARD,
        PHASE == GRADIENT,
        HALF,
        1,
        CHUNKS,
        WHOLE,
        False,
        PROGRAMS,
        PROJECTED,
    )
    sizes = Sizes(rows, length, width, columns, ignore_index)
    stride_b = stride_of(student_b, WHOLE)
    stride_l = stride_of(student_l, WHOLE)
    grad_b = stride_of(grad_b, WHOLE)
    grad_l = stride_of(grad_l, WHOLE)
    # The teacher's place is asked for too, and not used.
    strides = Strides(stride_b, stride_l, stride_b, stride_l, grad_b, grad_l)
    rank = tl.program_id(0) % PROGRAMS
    number = tl.program_id(0) // PROGRAMS
    teams = tl.num_programs(0) // PROGRAMS
    board += number * (2 * PROGRAMS * FIELDS)
    team = Team(board, arrivals + number, rank, rank * 0)
    inverse = TwoFloats(tl.load(mean), tl.load(mean + 1))
    empty = tl.load(mean + 2) != 0.0
    share = tl.cdiv(columns, PROGRAMS * 8) * 8
    begin = rank * share
    end = tl.minimum(begin + share, columns)
    for first in range(number, rows, teams):
        row = shard_rows_at(
            task,
            sizes,
            strides,
            student,
            student,
            grad,
            labels,
            weights,
            first,
            begin,
            end,
            empty,
            kind,
        )
        prescale = (row.index * 0 + 1).to(tl.float32)
        if row.read:
            known = known_of(task, row, ids, log_p, log_p_t, log_rest, count, sizes, KEPT, kind)
            if PHASE == STATISTICS:
                team = write_statistics(task, sizes, row, known, out, team, TWO, kind)
            elif PHASE == TERMS:
                write_terms(task, sizes, row, known, merged, leads, out, team, KEPT, kind)
            else:
                prescale, team = write_shard_gradient(
                    task, sizes, row, known, merged, inverse, team, TWO, KEPT, kind
                )
        elif PHASE == STATISTICS:
            put_nothing(out, COUNT, rows, row, team)
        elif PHASE == TERMS:
            put_nothing(out, TERM_COUNT, rows, row, team)
        else:
            fill = tl.where(row.main, float("nan"), prescale * 0.0)
            fill_columns(row, fill, begin, end, CHUNKS * 8, kind)
        if PHASE == STATISTICS:
            report_label(bad_label, row, team)
        if PHASE == GRADIENT:
            finish_gradient(sizes, row, unscale, empty, prescale, team, kind)
