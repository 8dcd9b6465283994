"""The dense distillation loss: forward and gradient of rows in one launch.

  p = softmax(t/T), q = softmax(s/T)
  row loss = distill_weight · D(p, q) + hard_weight · CE(s, y)
  gradient = weight / denominator · ∂(row loss)/∂s

A program takes R rows of a tile each, or a part of one row that it shares with others; what an
element's gradient needs of the other columns is a handful of sums (statistics.py), so that a second
sweep over the row can write it. Short rows stay in registers between the two; of long ones so many
programs share a row that the second sweep finds it in the L2 cache.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import INFINITY, TwoFloats, capped, log1p_of, log_ratio, multiply, some
from .divergence import (
    FAR_SLOPE,
    FORWARD_KL,
    NEAR_KL,
    REVERSE_KL,
    TVD,
)
from .gradient import (
    Slope,
    cross_entropy,
    far_mean_slope,
    hard_normaliser,
    make_frame,
    mean_slope,
    normaliser_difference,
    shares_of,
    sweep,
)
from .statistics import Kind, Row, columns_from, load_tile, starts_of, statistics, stride_of
from .team import FIELDS, Team, team_max, team_sum


@triton.jit
def float16_prescale(task, scale, peak):
    """The power of 2 at which a float16 row is kept: the largest that leaves its largest entry,
    peak times the scale, what float16 holds. Divided by the number of tokens and spread over the
    vocabulary, most of it would be below the smallest float16 before a loss scale arrives in the
    backward pass. Of a shard far below the row's maximum the peak is so small that the weight of a
    term would not be a float."""
    least = tl.maximum(tl.abs(task.grad_distill), tl.abs(task.grad_hard)) * 8.077935669463161e-28
    peak = tl.where(peak > 0.0, tl.abs(scale) * tl.maximum(peak, least), peak)
    exponent = ((65408.0 / peak).to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.minimum(tl.maximum(exponent, -120), 120)
    power = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where((peak > 0.0) & (peak < INFINITY), power, 1.0)


@triton.jit
def write_gradient(task, row, sums, frame, slope, far, fill, scale, team, NEAR: tl.constexpr, kind):
    """The gradient, for float16 at each row's own scale -> D of a near forward KL, that scale."""
    prescale = fill * 0.0 + 1.0
    if kind.HALF:
        shares = shares_of(task, row, sums, TwoFloats(prescale, prescale - 1.0), kind)
        swept = sweep(task, row, sums, frame, slope, shares, far, fill, NEAR, False, kind)
        peak, team = team_max(swept.peak, team, kind)
        prescale = tl.where(fill == 1.0, float16_prescale(task, scale.hi, peak), 1.0)
        scale = TwoFloats(scale.hi * prescale, scale.lo * prescale)
    shares = shares_of(task, row, sums, scale, kind)
    swept = sweep(task, row, sums, frame, slope, shares, far, fill, NEAR, True, kind)
    return swept.value, prescale, team


@triton.jit
def compared(task, row, sums, ok, team, kind):
    """log(z_s / z_t), the forward KL as it suits rows that are far apart, and from where on they
    are."""
    log = log_ratio(sums.z_s, sums.z_t)
    # The forward KL; for the reverse one that itself. Infinite or NaN where a side rules a class
    # out that the other one does not.
    if kind.DIVERGENCE == REVERSE_KL:
        kl = (0.0 - log.hi - sums.gap / (task.temperature * sums.z_s)) - log.lo
    else:
        kl = (log.hi - sums.gap / (task.temperature * sums.z_t)) + log.lo
    far_from = (1.0 + tl.abs(log.hi)) * task.far_from
    close = ok & (kl < NEAR_KL)
    if some(close, kind.ROWS):
        difference, team = normaliser_difference(task, row, sums, team, kind)
        log = TwoFloats(
            tl.where(close, log1p_of(difference / sums.z_t), log.hi),
            tl.where(close, 0.0, log.lo),
        )
    return log, kl, far_from, team


@triton.jit
def distill_term(task, row, sums, ok, fill, scale, team, kind):
    """D, and with it the gradient of both terms -> D, the scale of float16 rows."""
    log, kl, far_from, team = compared(task, row, sums, ok, team, kind)
    far = ok & (kl >= far_from) & (kl < INFINITY)
    frame = make_frame(task, sums, log)
    value = kl
    none = scale.hi * 0.0
    slope = Slope(kl, none, none)
    near = ok & ~far
    if kind.DIVERGENCE != FORWARD_KL:
        if kind.DIVERGENCE != TVD and not kind.HALF:
            candidate = far & (far_from < task.far_limit)
            if kind.DIVERGENCE == REVERSE_KL:
                candidate = candidate & (kl + tl.abs(log.hi) < FAR_SLOPE)
            far = candidate
            if some(candidate, kind.ROWS):
                slope, team = far_mean_slope(task, row, sums, log, kl, team, kind)
                far = candidate & (slope.value >= far_from) & (slope.value < task.far_limit)
        else:
            far = ok & ~ok
        near = ok & ~far
        if some(near, kind.ROWS):
            careful, team = mean_slope(task, row, frame, team, kind)
            slope = Slope(
                tl.where(far, slope.value, careful.value),
                tl.where(far, slope.mean, careful.mean),
                tl.where(far, slope.mean_lo, careful.mean_lo),
            )
        value = slope.value
        # The reverse KL where the teacher rules a class out: infinite, without a gradient.
        fill = tl.where((fill == 1.0) & (tl.abs(value) == INFINITY), float("nan"), fill)
    swept = value
    prescale = none + 1.0
    if kind.GRADIENT:
        # float16 shows more of a gradient's bits than the far form has.
        if kind.HALF or some(near, kind.ROWS):
            swept, prescale, team = write_gradient(
                task, row, sums, frame, slope, far, fill, scale, team, True, kind
            )
        else:
            swept, prescale, team = write_gradient(
                task, row, sums, frame, slope, far, fill, scale, team, False, kind
            )
    elif kind.DIVERGENCE == FORWARD_KL:
        if some(near, kind.ROWS):
            shares = shares_of(task, row, sums, scale, kind)
            swept = sweep(task, row, sums, frame, slope, shares, far, fill, True, False, kind).value
    if kind.DIVERGENCE == FORWARD_KL:
        if some(near, kind.ROWS):
            swept, team = team_sum(swept, team, kind)
            value = tl.where(far, kl, swept)
    return value, prescale, team


@triton.jit
def fill_columns(row, fill, begin, end, step, kind):
    """The same into every column from begin to end."""
    for start in range(begin, end, step):
        column = columns_from(start, kind.CHUNKS)
        values = tl.zeros((kind.ROWS, kind.CHUNKS, 8), tl.float32) + fill
        tl.store(row.grad + column, values, mask=tl.where(row.inside, column < end, False))


@triton.jit
def index_from(first, ROWS: tl.constexpr):
    """The R rows from the first one on."""
    if ROWS == 1:
        return tl.cast(first, tl.int64)
    else:
        return first + tl.arange(0, ROWS).to(tl.int64)[:, None, None]


@triton.jit
def weight_of(weights, index, inside):
    weight = (index * 0 + 1).to(tl.float32)
    if weights is not None:
        weight = tl.load(weights + index, mask=inside, other=0.0)
    return weight


@triton.jit
def rows_at(
    task, sizes, strides, student, teacher, grad, labels, weights, first, begin, end, empty, kind
):
    """`Row`, with what is wanted of it: everything, one term, or nothing at all."""
    index = index_from(first, kind.ROWS)
    inside = index < sizes.rows
    label = index * 0 - 1
    counts = inside
    bad = inside & ~inside
    if labels is not None:
        label = tl.load(labels + index, mask=inside, other=0)
        counts = inside & (label != sizes.ignore_index)
        bad = counts & ((label < 0) | (label >= sizes.columns))
        label = tl.where(bad, -1, label)
    weight = weight_of(weights, index, inside)
    main = tl.where((task.main != 0.0) & ~empty, counts & (weight != 0.0), False)
    read = ~bad & tl.where(task.want_terms != 0.0, counts, main)
    of = index, inside, bad, main, read, weight
    return row_at(task, sizes, strides, student, teacher, grad, of, label, read, begin, end, kind)


@triton.jit
def row_at(task, sizes, strides, student, teacher, grad, of, label, here, begin, end, kind):
    """`Row` of its first six fields; here: its label is a column to be read."""
    index, inside, bad, main, read, weight = of
    # Rows that are not there are neither read nor written.
    place = tl.minimum(index, sizes.rows - 1)
    from_student = starts_of(student, strides.student_b, strides.student_l, place, sizes.length)
    from_teacher = starts_of(teacher, strides.teacher_b, strides.teacher_l, place, sizes.length)
    to_grad = from_student
    if kind.GRADIENT:
        to_grad = starts_of(grad, strides.grad_b, strides.grad_l, place, sizes.length)
    s_label = weight * 0.0 - INFINITY
    t_label = s_label
    if kind.HARD:
        s_label = tl.load(from_student + label, mask=here, other=-INFINITY).to(tl.float32)
        if kind.DISTILL:
            t_label = tl.load(from_teacher + label, mask=here, other=-INFINITY).to(tl.float32)
        if kind.PROJECTED:
            s_label = tl.where(here, capped(s_label, task.student_cap), -INFINITY)
            t_label = tl.where(here, capped(t_label, task.teacher_cap), -INFINITY)
    s = s_label
    t = t_label
    if kind.HELD:
        column = columns_from(begin, kind.CHUNKS)
        s, t = load_tile(task, from_student, from_teacher, read, column, end, kind)
    return Row(
        index,
        inside,
        bad,
        main,
        read,
        weight,
        from_student,
        from_teacher,
        to_grad,
        label.to(tl.int32),
        s_label,
        t_label,
        begin,
        end,
        s,
        t,
    )


@triton.jit
def evaluate(task, sizes, row, inverse, team, kind):
    """Distillation term, cross-entropy, and the scale of float16 rows; writes the gradient."""
    zero = (row.index * 0).to(tl.float32)
    distill = zero
    hard = zero
    prescale = zero + 1.0
    fill = tl.where(row.bad, float("nan"), tl.where(row.main, 1.0, 0.0))
    if some(row.read, kind.ROWS):
        scale = multiply(TwoFloats(row.weight, zero), inverse)
        sums, team = statistics(task, row, team, kind)
        # A NaN or +inf among the logits, or nothing but −inf, leaves no positive sum.
        ok = row.read
        if kind.DISTILL:
            ok = ok & (sums.z_s > 0.0) & (sums.z_t > 0.0)
        if kind.HARD:
            hard_ok = hard_normaliser(row, sums) > 0.0
            ok = ok & hard_ok
            hard, team = cross_entropy(task, row, sums, team, kind)
            hard = tl.where(row.read, tl.where(hard_ok, hard, float("nan")), 0.0)
        fill = tl.where(row.main & ~ok, float("nan"), fill)
        if kind.DISTILL:
            distill, prescale, team = distill_term(task, row, sums, ok, fill, scale, team, kind)
            distill = tl.where(row.read, tl.where(ok, distill, float("nan")), 0.0)
        elif kind.GRADIENT:
            frame = make_frame(task, sums, TwoFloats(zero, zero))
            slope = Slope(zero, zero, zero)
            _, prescale, team = write_gradient(
                task, row, sums, frame, slope, ok, fill, scale, team, kind.HALF, kind
            )
    elif kind.GRADIENT:
        fill_columns(row, fill, row.begin, row.end, kind.CHUNKS * 8, kind)
    if kind.GRADIENT:
        tile: tl.constexpr = kind.CHUNKS * 8
        padding = sizes.columns + team.rank * tile
        fill_columns(row, 0.0, padding, sizes.width, kind.PROGRAMS * tile, kind)
    distill = tl.where(row.bad, float("nan"), distill)
    hard = tl.where(row.bad, float("nan"), hard)
    return distill, hard, prescale, team


class Sizes(NamedTuple):
    rows: tl.tensor  # N = B · L
    length: tl.tensor  # L
    width: tl.tensor  # V_s
    columns: tl.tensor  # V
    ignore_index: tl.tensor


class Strides(NamedTuple):
    student_b: tl.tensor
    student_l: tl.tensor
    teacher_b: tl.tensor
    teacher_l: tl.tensor
    grad_b: tl.tensor
    grad_l: tl.tensor


@triton.jit
def store_losses(
    task, row, row_losses, unscale, bad_label, count, distill, hard, remaining, team, kind
):
    """The row's losses, by the first of its programs; remaining: 1 / the scale of a float16 row."""
    writes = tl.where(team.rank == 0, row.inside, False)
    place = row_losses + row.index
    if task.main != 0.0:
        loss = tl.zeros_like(distill)
        if kind.DISTILL:
            loss += task.distill_weight * distill
        if kind.HARD:
            loss += task.hard_weight * hard
        loss = tl.where(row.main, row.weight * loss, 0.0)
        tl.store(place, tl.where(row.bad, float("nan"), loss), mask=writes)
        if kind.HALF:
            tl.store(unscale + row.index, remaining, mask=writes)
    if kind.DISTILL or task.others == 0.0:
        tl.store(place + count, distill * task.distill_scale, mask=writes)
    if kind.HARD or task.others == 0.0:
        tl.store(place + 2 * count, hard, mask=writes)
    tl.store(bad_label + row.index * 0, row.index + 1, mask=writes & row.bad)


@triton.jit(do_not_specialize=[*Sizes._fields, *Strides._fields])
def distill_rows(
    task,  # triton_task.py: Task; no integers, which would compile anew for some values
    student,  # (B, L, V_s)
    teacher,  # (B, L, V_t)
    grad,  # (B, L, V_s) or None, may be the student's memory
    labels,  # int64 (N) or None
    weights,  # float32 (N) or None
    mean,  # float32 (3): 1 / denominator in two floats, whether nothing counts
    row_losses,  # float32 (3, N): weight · loss, distillation term, cross-entropy
    unscale,  # float32 (N) for a float16 student, or None
    bad_label,  # int64 (): 1 + a row whose label is out of range
    board,  # float32 (TEAMS, 2, PROGRAMS, FIELDS): see team.py
    arrivals,  # int32 (TEAMS)
    rows,  # Sizes
    length,
    width,
    columns,
    ignore_index,
    student_b,  # Strides, in chunks if WHOLE: so the compiler knows what they are multiples of
    student_l,
    teacher_b,
    teacher_l,
    grad_b,
    grad_l,
    DIVERGENCE: tl.constexpr,
    DISTILL: tl.constexpr,
    HARD: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    HELD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PROJECTED: tl.constexpr,
):
    GRADIENT: tl.constexpr = grad is not None
    HALF: tl.constexpr = student.dtype.element_ty == tl.float16
    kind: tl.constexpr = Kind(
        DIVERGENCE,
        DISTILL,
        HARD,
        GRADIENT,
        HALF,
        ROWS,
        CHUNKS,
        WHOLE,
        HELD,
        PROGRAMS,
        PROJECTED,
    )
    sizes = Sizes(rows, length, width, columns, ignore_index)
    strides = Strides(
        stride_of(student_b, WHOLE),
        stride_of(student_l, WHOLE),
        stride_of(teacher_b, WHOLE),
        stride_of(teacher_l, WHOLE),
        stride_of(grad_b, WHOLE),
        stride_of(grad_l, WHOLE),
    )
    rank = tl.program_id(0) % PROGRAMS
    number = tl.program_id(0) // PROGRAMS
    teams = tl.num_programs(0) // PROGRAMS
    board += number * (2 * PROGRAMS * FIELDS)
    team = Team(board, arrivals + number, rank, rank * 0)
    inverse = TwoFloats(tl.load(mean), tl.load(mean + 1))
    empty = tl.load(mean + 2) != 0.0
    # In chunks, so that the compiler knows what begins at 16 bytes.
    share = tl.cdiv(columns, PROGRAMS * 8) * 8
    begin = rank * share
    end = tl.minimum(begin + share, columns)

    count = tl.cast(rows, tl.int64)
    for first in range(number * ROWS, rows, teams * ROWS):
        row = rows_at(
            task,
            sizes,
            strides,
            student,
            teacher,
            grad,
            labels,
            weights,
            first,
            begin,
            end,
            empty,
            kind,
        )
        distill, hard, prescale, team = evaluate(task, sizes, row, inverse, team, kind)
        remaining = tl.where(empty, 0.0, tl.div_rn(1.0, prescale))
        store_losses(
            task, row, row_losses, unscale, bad_label, count, distill, hard, remaining, team, kind
        )
