"""A teacher that knows some classes of each row: forward and gradient of rows in one launch.

From memory comes the student, once, and the gradient goes there once. A sweep sums
e^{(s − max)/T} and e^{s − max} over all classes that are neither kept nor the label; a second one
writes their gradient, which for all of them is the same multiple of these exponentials. The others,
K + 1 of them, are taken out of both sweeps and computed one by one, by every program of the row:
the mass of the rest is a sum of what is in it and not 1 less what is not.

Ids ascend, so that a tile's are met one after the other: with K of them in V columns, a column is
compared with K · tile / V of them, one or two.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import (
    INFINITY,
    LOG2E,
    LOG2E_LO,
    TwoFloats,
    add,
    anchor,
    cap_slope,
    capped,
    divide,
    exp_exact,
    exp_pair,
    expm1_gap,
    log1p_of,
    log_of,
    log_pair,
    log_ratio,
    multiply,
    row_max,
    row_sum,
    row_sum_pairs,
    two_diff,
    two_product,
    two_sum,
)
from .distill import Sizes, Strides, fill_columns, float16_prescale, rows_at, store_losses
from .divergence import FORWARD_KL, TVD, Element, contribution
from .gradient import sum_of_offsets
from .statistics import Kind, columns_from, inside, load_side, stride_of
from .team import FIELDS, Team, field_of, meet, pair_of, publish, publish_pair, team_max


class Known(NamedTuple):
    """The row's kept classes, (1, 1, K2) each, and the rest."""

    ids: tl.tensor  # int64 *: of the row, ascending
    count: tl.tensor  # how many places it has
    column: tl.tensor  # int32; at least V where there is no class
    here: tl.tensor  # there is a class
    s: tl.tensor  # its logit, −inf where there is none
    log_p: TwoFloats
    log_p_t: TwoFloats  # T log p
    log_rest: TwoFloats
    apart: tl.tensor  # the label is not among them


@triton.jit
def known_of(task, row, ids, log_p, log_p_t, log_rest, count, sizes, KEPT: tl.constexpr, kind):
    place = tl.arange(0, KEPT)[None, None, :]
    first = row.index * count
    total = tl.cast(sizes.rows, tl.int64)
    there = tl.where(row.read, place < count, False)
    column = tl.load(ids + first + place, mask=there, other=1 << 40)
    here = column < sizes.columns
    s = tl.load(row.student + column, mask=here, other=-INFINITY).to(tl.float32)
    if kind.PROJECTED:
        s = tl.where(here, capped(s, task.student_cap), -INFINITY)
    at = log_p + first + place
    at_t = log_p_t + first + place
    rest = log_rest + row.index
    lo = total * count
    column = tl.where(here, column, 1 << 30).to(tl.int32)
    apart = row.read & ~row.read
    if kind.HARD:
        apart = (row.label >= 0) & (tl.max((column == row.label).to(tl.int32)) == 0)
    return Known(
        ids + first,
        count,
        column,
        here,
        s,
        TwoFloats(
            tl.load(at, mask=there, other=-INFINITY), tl.load(at + lo, mask=there, other=0.0)
        ),
        TwoFloats(
            tl.load(at_t, mask=there, other=-INFINITY), tl.load(at_t + lo, mask=there, other=0.0)
        ),
        TwoFloats(
            tl.load(rest, mask=row.read, other=0.0), tl.load(rest + total, mask=row.read, other=0.0)
        ),
        apart,
    )


@triton.jit
def without_known(s, column, known, following, end):
    """A tile without the kept classes below `end`, and the place of the first one from there on."""
    id = tl.load(known.ids + following, mask=following < known.count, other=1 << 40)
    while id < end:
        s = tl.where(column == id.to(tl.int32), -INFINITY, s)
        following += 1
        id = tl.load(known.ids + following, mask=following < known.count, other=1 << 40)
    return s, following


# ---- Sweep 1 -------------------------------------------------------------------------------------


class Others(NamedTuple):
    """Sums over the classes that are neither kept nor the label."""

    max: tl.tensor
    z: tl.tensor  # Σ e^{(s − max)/T}
    z_hard: tl.tensor  # Σ e^{s − max}


@triton.jit
def raised(task, others, maximum, TWO: tl.constexpr):
    seen = (maximum > others.max) & (others.max > -INFINITY)
    drop = two_diff(tl.where(seen, others.max, 0.0), tl.where(seen, maximum, 0.0))
    z = others.z * exp_exact(drop.hi, drop.lo, task.rate, task.rate_lo)
    z_hard = z
    if TWO:
        z_hard = others.z_hard * exp_exact(drop.hi, drop.lo, LOG2E, LOG2E_LO)
    return Others(maximum, z, z_hard)


@triton.jit
def merge_others(task, others, TWO: tl.constexpr):
    maximum = row_max(others.max, 1)
    others = raised(task, others, maximum, TWO)
    return Others(maximum, row_sum(others.z, 1), row_sum(others.z_hard, 1))


@triton.jit
def sum_others(task, row, known, team, TWO: tl.constexpr, kind):
    lanes = tl.zeros((1, kind.CHUNKS, 1), tl.float32)
    others = Others(lanes - INFINITY, lanes, lanes)
    following = tl.sum((known.column < row.begin).to(tl.int32))
    for start in range(row.begin, row.end, kind.CHUNKS * 8):
        column = columns_from(start, kind.CHUNKS)
        s = load_side(row.student, task.student_cap, row.read, column, row.end, kind)
        s, following = without_known(s, column, known, following, start + kind.CHUNKS * 8)
        if kind.HARD:
            s = tl.where(column == row.label, -INFINITY, s)
        maximum = tl.maximum(others.max, tl.max(s, 2, keep_dims=True))
        others = raised(task, others, maximum, TWO)
        x = two_diff(s, anchor(maximum))
        e = exp_exact(x.hi, x.lo, task.rate, task.rate_lo)
        z = others.z + tl.sum(e, 2, keep_dims=True)
        z_hard = z
        if TWO:
            e = exp_exact(x.hi, x.lo, LOG2E, LOG2E_LO)
            z_hard = others.z_hard + tl.sum(e, 2, keep_dims=True)
        others = Others(maximum, z, z_hard)
    others = merge_others(task, others, TWO)
    if kind.PROGRAMS > 1:
        publish(team, 0, others.max, kind)
        publish(team, 1, others.z, kind)
        publish(team, 2, others.z_hard, kind)
        team, board = meet(team, kind)
        parts = Others(field_of(board, 0), field_of(board, 1), field_of(board, 2))
        others = merge_others(task, parts, TWO)
    return others, team


# ---- The classes one by one ----------------------------------------------------------------------


class Parts(NamedTuple):
    """D and the cross-entropy; their gradients before any scale but that of the terms."""

    distill: tl.tensor
    hard: tl.tensor
    known: tl.tensor  # (1, 1, K2): the gradient by the kept classes
    label: tl.tensor  # by a label that is not kept
    of_distill: tl.tensor  # what e^{(s − max)/T} of all others is multiplied by
    of_hard: tl.tensor  # what e^{s − max} is


@triton.jit
def exp_t(task, x):
    return exp_exact(x.hi, x.lo, task.rate, task.rate_lo)


@triton.jit
def exp_1(x):
    return exp_exact(x.hi, x.lo, LOG2E, LOG2E_LO)


@triton.jit
def element_of(p, q, gap, low, inv_temperature):
    """`Element` of d = log q − log p in two parts, in units of the logits."""
    d = (gap + tl.where(low == low, low, 0.0)) * inv_temperature
    d = tl.where(d == d, d, 0.0)
    difference = tl.where(tl.abs(d) < 0.5, p * (d + d * d * expm1_gap(d)), q - p)
    return Element(p, q, d, difference)


class Rest(NamedTuple):
    """All classes that are not kept, as one."""

    top: tl.tensor  # the highest logit among them
    z: tl.tensor  # Σ e^{(s − top)/T}
    of_label: tl.tensor  # e^{(s − top)/T} of a label that is not kept, 0 of one that is
    of_others: tl.tensor  # that of the highest of the others


@triton.jit
def rest_of(task, row, known, others):
    alone = tl.where(known.apart, row.s_label, -INFINITY)
    top = anchor(tl.maximum(others.max, alone))
    e_others = tl.where(others.max > -INFINITY, exp_t(task, two_diff(others.max, top)), 0.0)
    e_label = tl.where(alone > -INFINITY, exp_t(task, two_diff(alone, top)), 0.0)
    e_others = tl.where(others.max == others.max, e_others, others.max)
    e_label = tl.where(alone == alone, e_label, alone)
    return Rest(top, others.z * e_others + e_label, e_label, e_others)


@triton.jit
def exact_z(task, row, known, rest, team, kind):
    """Rest.z again, as a sum of pairs of floats."""
    zero = (row.index * 0).to(tl.float32)
    z = TwoFloats(zero, zero)
    following = tl.sum((known.column < row.begin).to(tl.int32))
    for start in range(row.begin, row.end, kind.CHUNKS * 8):
        column = columns_from(start, kind.CHUNKS)
        s = load_side(row.student, task.student_cap, row.read, column, row.end, kind)
        s, following = without_known(s, column, known, following, start + kind.CHUNKS * 8)
        x = two_diff(s, rest.top)
        e = exp_pair(x.hi, x.lo, task.rate, task.rate_lo)
        z = add(z, row_sum_pairs(e, kind.CHUNKS * 8, 1))
    if kind.PROGRAMS > 1:
        publish_pair(team, 0, z, kind)
        team, board = meet(team, kind)
        z = pair_of(board, 0, kind)
    return z, team


@triton.jit
def kept_element(task, known, x, e, z, t_log_z):
    """`Element` of the kept classes: x is s − highest, e is e^{x/T}, z what these sum to."""
    gap = two_diff(x.hi, known.log_p_t.hi)
    low = gap.lo + ((x.lo - known.log_p_t.lo) - t_log_z.lo)
    gap = two_diff(gap.hi, t_log_z.hi)
    p = exp_1(known.log_p)
    return element_of(p, e / z, gap.hi, gap.lo + low, task.inv_temperature)


@triton.jit
def rest_element(known, log_q, low, q):
    """`Element` of the rest, of log q in two floats and `low`."""
    gap = two_diff(log_q.hi, known.log_rest.hi)
    low = gap.lo + (log_q.lo + (low - known.log_rest.lo))
    return element_of(exp_1(known.log_rest), q, gap.hi, low, 1.0)


@triton.jit
def distill_parts(
    task, known, rest, z_rest, highest, EXACT: tl.constexpr, KEPT: tl.constexpr, kind
):
    """D, and its gradient in units of distill_weight / T: by the kept classes, and by the rest."""
    x = two_diff(known.s, highest)
    e = tl.where(known.here, exp_t(task, x), 0.0)
    down = two_diff(rest.top, highest)
    z = rest.z * exp_t(task, down) + tl.sum(e)
    if EXACT:
        pairs = exp_pair(x.hi, x.lo, task.rate, task.rate_lo)
        pairs = TwoFloats(tl.where(known.here, pairs.hi, 0.0), tl.where(known.here, pairs.lo, 0.0))
        of_rest = multiply(z_rest, exp_pair(down.hi, down.lo, task.rate, task.rate_lo))
        log_z = log_pair(add(of_rest, row_sum_pairs(pairs, KEPT, 1)))
        log_rest = log_pair(z_rest)
    else:
        one = tl.zeros_like(z) + 1.0
        log_z = log_ratio(z, one)
        log_rest = log_ratio(z_rest.hi, one)

    t_log_z = multiply(log_z, TwoFloats(task.temperature, task.temperature_lo))
    kept = kept_element(task, known, x, e, z, t_log_z)
    of = contribution(kept, task.w_p, task.w_q, kind.DIVERGENCE)

    log_q = two_sum(down.hi * task.inv_temperature, log_rest.hi)
    low = log_q.lo + ((log_rest.lo - log_z.lo) + down.lo * task.inv_temperature)
    log_q = two_diff(tl.where(rest.z == 0.0, -INFINITY, log_q.hi), log_z.hi)
    q_rest = rest.z * exp_t(task, down) / z
    of_rest = rest_element(known, log_q, low, q_rest)
    p_rest = of_rest.p
    q_rest = of_rest.q
    difference = of_rest.difference
    of_rest = contribution(of_rest, task.w_p, task.w_q, kind.DIVERGENCE)

    value = tl.sum(tl.where(known.here, of.term, 0.0)) + of_rest.term
    value += (tl.sum(kept.p) + p_rest) * 0.0  # NaN of what no comparison sees
    if kind.DIVERGENCE == FORWARD_KL:
        part = kept.difference
        push = difference
    else:
        zero = tl.zeros_like(e)
        slope = row_sum_pairs(two_product(kept.q, of.slope), KEPT, 1)
        slope = add(slope, two_product(q_rest, of_rest.slope))
        mass = row_sum_pairs(TwoFloats(kept.q, zero), KEPT, 1)
        mass = add(mass, TwoFloats(q_rest, tl.zeros_like(q_rest)))
        mean = divide(slope, mass)
        part = kept.q * ((of.slope - mean.hi) - mean.lo)
        push = q_rest * ((of_rest.slope - mean.hi) - mean.lo)
    return value, part, push


@triton.jit
def hard_parts(task, row, known, others, highest, team, kind):
    """The cross-entropy, and its gradient in units of hard_weight."""
    x = two_diff(known.s, highest)
    is_label = known.column == row.label
    e = tl.where(known.here, exp_1(x), 0.0)
    y = two_diff(row.s_label, highest)
    e_others = tl.where(others.max > -INFINITY, exp_1(two_diff(others.max, highest)), 0.0)
    e_others = tl.where(others.max == others.max, e_others, others.max)
    other = others.z_hard * e_others + tl.sum(tl.where(is_label, 0.0, e))
    z = other + exp_1(y)
    log_z = log_of(z)
    loss = tl.where(y.hi == 0.0, log1p_of(other), log_z - y.hi)
    if task.label_smoothing != 0.0:
        offset, team = sum_of_offsets(task, row, highest, team, kind)
        uniform = log_z - offset / task.classes
        smoothing = task.label_smoothing
        loss = tl.where(smoothing < 1.0, (1.0 - smoothing) * loss, 0.0) + smoothing * uniform
    loss = tl.where(z > 0.0, loss, float("nan"))
    label = task.smoothed_label - other / z
    part = tl.where(is_label, label, e / z - task.smoothing)
    return loss, part, label, e_others / z, team


# ---- Sweep 2 -------------------------------------------------------------------------------------


@triton.jit
def write_others(
    task, row, known, others, shares, fill, STORE: tl.constexpr, TWO: tl.constexpr, kind
):
    """The gradient of all classes as if none were kept; without STORE only the largest |entry| of
    those that are not."""
    peak = tl.zeros((1, kind.CHUNKS, 1), tl.float32)
    following = tl.sum((known.column < row.begin).to(tl.int32))
    for start in tl.range(row.begin, row.end, kind.CHUNKS * 8):
        column = columns_from(start, kind.CHUNKS)
        s = load_side(row.student, task.student_cap, row.read, column, row.end, kind)
        x = s - anchor(others.max)
        part = shares.distill * exp_exact(x, 0.0, task.rate, task.rate_lo) - shares.smoothing
        if TWO:
            part += shares.hard * exp_exact(x, 0.0, LOG2E, LOG2E_LO)
        if kind.PROJECTED:
            mask = tl.where(row.read, inside(column, row.end, kind.WHOLE), False)
            raw = tl.load(row.student + column, mask=mask, other=0.0).to(tl.float32)
            part *= cap_slope(raw, task.student_cap)
        part = tl.where(column < row.end, tl.where(fill == 1.0, part, fill), 0.0)
        if STORE:
            mask = tl.where(row.inside, inside(column, row.end, kind.WHOLE), False)
            tl.store(row.grad + column, part, mask=mask)
        else:
            end = start + kind.CHUNKS * 8
            part, following = without_known(part, column, known, following, end)
            size = tl.where(column == row.label, 0.0, tl.abs(part))
            size = tl.where(size < INFINITY, size, 0.0)  # the kept ones are −inf
            peak = tl.maximum(peak, tl.max(size, 2, keep_dims=True))
    return row_max(peak, 1)


class Shares(NamedTuple):
    distill: tl.tensor  # of e^{(s − max)/T}; with e^{s − max} where that is the same
    hard: tl.tensor
    smoothing: tl.tensor
    known: tl.tensor  # the gradient by the kept classes
    label: tl.tensor  # and by a label that is not


@triton.jit
def shares_of(task, parts, hard_known, hard_label, scale, slope, label_slope, TWO, kind):
    distill = multiply(scale, TwoFloats(task.grad_distill, task.grad_distill_lo)).hi
    of_distill = distill * parts.of_distill
    of_hard = tl.zeros_like(of_distill)
    smoothing = of_hard
    known = distill * parts.known
    label = distill * parts.label
    if kind.HARD:
        hard = multiply(scale, TwoFloats(task.grad_hard, task.grad_hard_lo)).hi
        of_hard = hard * parts.of_hard
        smoothing = hard * task.smoothing
        known += hard * hard_known
        label += hard * hard_label
        if not TWO:
            of_distill += of_hard
    return Shares(of_distill, of_hard, smoothing, known * slope, label * label_slope)


@triton.jit
def write_gradient(
    task, row, known, others, parts, hard_known, hard_label, fill, scale, team, TWO, kind
):
    """The gradient, for float16 at each row's own scale -> that scale."""
    slope = hard_known * 0.0 + 1.0
    label_slope = scale.hi * 0.0 + 1.0
    prescale = label_slope
    if kind.PROJECTED:
        raw = tl.load(row.student + known.column, mask=known.here, other=0.0).to(tl.float32)
        slope = cap_slope(raw, task.student_cap)
        there = row.read & (row.label >= 0)
        raw = tl.load(row.student + row.label, mask=there, other=0.0).to(tl.float32)
        label_slope = cap_slope(raw, task.student_cap)
    if kind.HALF:
        one = TwoFloats(prescale, prescale - 1.0)
        shares = shares_of(task, parts, hard_known, hard_label, one, slope, label_slope, TWO, kind)
        peak = write_others(task, row, known, others, shares, fill, False, TWO, kind)
        peak = tl.maximum(peak, tl.max(tl.where(known.here, tl.abs(shares.known), 0.0)))
        peak = tl.maximum(peak, tl.where(known.apart, tl.abs(shares.label), 0.0))
        peak, team = team_max(peak, team, kind)
        prescale = tl.where(fill == 1.0, float16_prescale(task, scale.hi, peak), 1.0)
        scale = TwoFloats(scale.hi * prescale, scale.lo * prescale)
    shares = shares_of(task, parts, hard_known, hard_label, scale, slope, label_slope, TWO, kind)
    write_others(task, row, known, others, shares, fill, True, TWO, kind)
    # Over what others have written there.
    tl.debug_barrier()
    mine = (known.column >= row.begin) & (known.column < row.end) & (fill == 1.0)
    tl.store(row.grad + known.column, shares.known, mask=known.here & mine)
    mine = known.apart & (row.label >= row.begin) & (row.label < row.end) & (fill == 1.0)
    tl.store(row.grad + row.label, shares.label, mask=mine)
    tl.debug_barrier()
    return prescale, team


@triton.jit
def evaluate(
    task,
    sizes,
    row,
    known,
    inverse,
    team,
    KEPT: tl.constexpr,
    TWO: tl.constexpr,
    kind,
):
    """Distillation term, cross-entropy, and the scale of float16 rows; writes the gradient."""
    zero = (row.index * 0).to(tl.float32)
    distill = zero
    hard = zero
    prescale = zero + 1.0
    fill = tl.where(row.bad, float("nan"), tl.where(row.main, 1.0, 0.0))
    others, team = sum_others(task, row, known, team, TWO, kind)
    highest = anchor(tl.maximum(others.max, tl.max(known.s)))
    hard_known = tl.zeros_like(known.s)
    hard_label = zero
    of_hard = zero
    if kind.HARD:
        highest = tl.maximum(highest, row.s_label)
    rest = rest_of(task, row, known, others)
    z_rest = TwoFloats(rest.z, tl.zeros_like(rest.z))
    distill, part, push = distill_parts(task, known, rest, z_rest, highest, False, KEPT, kind)
    # csrc/common/kept.h: needs_exact_rest
    near = 6e-8 * tl.abs(push) > 2e-6 * tl.abs(distill)
    if kind.DIVERGENCE == TVD:  # which changes by what log_z loses, the others by its square
        near = near | (distill < 1e-2)
    if near:
        z_rest, team = exact_z(task, row, known, rest, team, kind)
        distill, part, push = distill_parts(task, known, rest, z_rest, highest, True, KEPT, kind)
    share = tl.where(rest.z == 0.0, 0.0, push / rest.z)
    label = share * rest.of_label
    of_distill = share * rest.of_others
    if kind.HARD:
        hard, hard_known, hard_label, of_hard, team = hard_parts(
            task, row, known, others, highest, team, kind
        )
    parts = Parts(distill, hard, part, label, of_distill, of_hard)
    wrong = (distill != distill) | (hard != hard)
    if kind.DIVERGENCE != FORWARD_KL:
        wrong = wrong | (tl.abs(distill) == INFINITY)
    fill = tl.where((fill == 1.0) & wrong, float("nan"), fill)
    if kind.GRADIENT:
        scale = multiply(TwoFloats(row.weight, zero), inverse)
        prescale, team = write_gradient(
            task, row, known, others, parts, hard_known, hard_label, fill, scale, team, TWO, kind
        )
    distill = tl.where(row.read, distill, tl.where(row.bad, float("nan"), 0.0))
    hard = tl.where(row.read, hard, tl.where(row.bad, float("nan"), 0.0))
    return distill, hard, prescale, team


@triton.jit(
    do_not_specialize=[*Sizes._fields, "count", "student_b", "student_l", "grad_b", "grad_l"]
)
def distill_kept_rows(
    task,  # as in distill.py, where nothing else is said
    student,
    ids,  # int64 (N, K): kept.py
    log_p,  # float32 (2, N, K): in two floats
    log_p_t,  # float32 (2, N, K): T log p
    log_rest,  # float32 (2, N)
    grad,
    labels,
    weights,
    mean,
    row_losses,
    unscale,
    bad_label,
    board,
    arrivals,
    rows,
    length,
    width,
    columns,
    ignore_index,
    count,  # K
    student_b,
    student_l,
    grad_b,
    grad_l,
    DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr,
    TWO: tl.constexpr,  # T is not 1, and the cross-entropy takes exponentials of its own
    KEPT: tl.constexpr,  # a power of 2 from K on
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PROJECTED: tl.constexpr,
):
    GRADIENT: tl.constexpr = grad is not None
    HALF: tl.constexpr = student.dtype.element_ty == tl.float16
    kind: tl.constexpr = Kind(
        DIVERGENCE, True, HARD, GRADIENT, HALF, 1, CHUNKS, WHOLE, False, PROGRAMS, PROJECTED
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
        row = rows_at(
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
        distill = (row.index * 0).to(tl.float32)
        hard = distill
        prescale = distill + 1.0
        if row.read:
            known = known_of(task, row, ids, log_p, log_p_t, log_rest, count, sizes, KEPT, kind)
            distill, hard, prescale, team = evaluate(
                task, sizes, row, known, inverse, team, KEPT, TWO, kind
            )
        else:
            distill = tl.where(row.bad, float("nan"), distill)
            hard = distill
            if GRADIENT:
                fill_columns(row, distill, begin, end, CHUNKS * 8, kind)
        if GRADIENT:
            padding = columns + rank * (CHUNKS * 8)
            fill_columns(row, 0.0, padding, width, PROGRAMS * CHUNKS * 8, kind)
        remaining = tl.where(empty, 0.0, tl.div_rn(1.0, prescale))
        total = tl.cast(rows, tl.int64)
        store_losses(
            task, row, row_losses, unscale, bad_label, total, distill, hard, remaining, team, kind
        )
