"""From the statistics of a row to its terms and its gradient, in as few sweeps as the row allows.

1. for divergences whose gradient holds a sum over the row: D and Σ q φ, once as it suits rows that
   are far apart (divergence.py), and again where they turn out not to be;
2. the gradient, and a near forward KL.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import (
    LOG2E,
    LOG2E_LO,
    TwoFloats,
    add,
    anchor,
    cap_slope,
    divide,
    exp_exact,
    exp_of,
    log1p_of,
    log_of,
    multiply,
    row_max,
    row_sum,
    row_sum_pairs,
    two_diff,
    two_product,
)
from .divergence import (
    FORWARD_KL,
    REVERSE_KL,
    Frame,
    contribution,
    element,
    far_slope,
    far_terms,
    far_value,
)
from .statistics import columns_from, hard_exponentials, inside, logits
from .team import team_sum, team_sums


@triton.jit
def hard_normaliser(row, sums):
    """Σ_j e^{s_j − max_s}, the label's column included."""
    x = two_diff(row.s_label, anchor(sums.max_s))
    return sums.z_rest + exp_exact(x.hi, x.lo, LOG2E, LOG2E_LO)


@triton.jit
def sum_of_offsets(task, row, maximum, team, kind):
    """Σ (s − max_s), where labels are smoothed."""
    lanes = tl.zeros((kind.ROWS, kind.CHUNKS, 1), tl.float32)
    for start in range(row.begin, row.end, kind.CHUNKS * 8):
        column = columns_from(start, kind.CHUNKS)
        s, _ = logits(task, row, column, kind)
        offset = tl.where(column < row.end, s - maximum, 0.0)
        lanes += tl.sum(offset, 2, keep_dims=True)
    return team_sum(row_sum(lanes, kind.ROWS), team, kind)


@triton.jit
def cross_entropy(task, row, sums, team, kind):
    """Neither form subtracts what cancels: at the maximum the loss is the log of 1 + the rest,
    elsewhere both summands are positive."""
    x_label = row.s_label - anchor(sums.max_s)
    log_z = log_of(hard_normaliser(row, sums))
    loss = tl.where(x_label == 0.0, log1p_of(sums.z_rest), log_z - x_label)
    if task.label_smoothing != 0.0:
        offset, team = sum_of_offsets(task, row, sums.max_s, team, kind)
        uniform = log_z - offset / task.classes
        smoothing = task.label_smoothing
        # All of it on the uniform target, the label's loss may be infinite and does not count.
        loss = tl.where(smoothing < 1.0, (1.0 - smoothing) * loss, 0.0) + smoothing * uniform
    return loss, team


@triton.jit
def make_frame(task, sums, log):
    log = multiply(log, TwoFloats(task.temperature, task.temperature_lo))
    return Frame(sums.max_s, sums.max_t, 1.0 / sums.z_s, 1.0 / sums.z_t, log.hi, log.lo)


@triton.jit
def element_of(task, s, t, frame):
    x = s - frame.max_s
    e_s = exp_exact(x, 0.0, task.rate, task.rate_lo)
    e_t = exp_exact(t - frame.max_t, 0.0, task.rate, task.rate_lo)
    return element(s, t, e_s, e_t, frame, task.inv_temperature)


@triton.jit
def normaliser_difference(task, row, sums, team, kind):
    """Σ (e^{(s − max_s)/T} − e^{(t − max_t)/T}), each difference taken before it is rounded."""
    frame = Frame(sums.max_s, sums.max_t, 1.0, 1.0, 0.0, 0.0)
    lanes = tl.zeros((kind.ROWS, kind.CHUNKS, 1), tl.float32)
    for start in range(row.begin, row.end, kind.CHUNKS * 8):
        s, t = logits(task, row, columns_from(start, kind.CHUNKS), kind)
        difference = element_of(task, s, t, frame).difference
        lanes += tl.sum(difference, 2, keep_dims=True)
    return team_sum(row_sum(lanes, kind.ROWS), team, kind)


class Slope(NamedTuple):
    value: tl.tensor  # D
    mean: tl.tensor  # Σ q φ / Σ q, of q and φ as they were rounded, in two floats
    mean_lo: tl.tensor


@triton.jit
def slope_sums(task, row, frame, team, kind):
    """D, Σ q and Σ q φ, of q and φ as they were rounded."""
    lanes = tl.zeros((kind.ROWS, kind.CHUNKS, 1), tl.float32)
    wide = tl.zeros((kind.ROWS, kind.CHUNKS, 8), tl.float32)
    mass = TwoFloats(wide, wide)
    slope = TwoFloats(wide, wide)
    for start in range(row.begin, row.end, kind.CHUNKS * 8):
        s, t = logits(task, row, columns_from(start, kind.CHUNKS), kind)
        x = element_of(task, s, t, frame)
        of = contribution(x, task.w_p, task.w_q, kind.DIVERGENCE)
        lanes += tl.sum(of.term, 2, keep_dims=True)
        mass = add(mass, TwoFloats(x.q, tl.zeros_like(x.q)))
        slope = add(slope, two_product(x.q, of.slope))
    value = row_sum(lanes, kind.ROWS)
    mass = row_sum_pairs(mass, kind.CHUNKS * 8, kind.ROWS)
    slope = row_sum_pairs(slope, kind.CHUNKS * 8, kind.ROWS)
    value, _, mass, slope, team = team_sums(value, value, mass, slope, team, kind)
    return value, mass, slope, team


@triton.jit
def mean_slope(task, row, frame, team, kind):
    value, mass, slope, team = slope_sums(task, row, frame, team, kind)
    mean = divide(slope, mass)
    return Slope(value, mean.hi, mean.lo), team


@triton.jit
def balance_of(task, sums):
    """See divergence.py."""
    return task.w_p * sums.z_s / (task.w_q * sums.z_t)


@triton.jit
def far_mean_slope(task, row, sums, log, kl, team, kind):
    """`mean_slope` where the row is far apart, in the units of `far_slope`; `kl` is the D of a
    reverse KL."""
    lanes = tl.zeros((kind.ROWS, kind.CHUNKS, 1), tl.float32)
    mass = TwoFloats(lanes, lanes)
    slope = TwoFloats(lanes, lanes)
    from_p = lanes
    from_q = lanes
    balance = balance_of(task, sums)
    for start in range(row.begin, row.end, kind.CHUNKS * 8):
        s, t = logits(task, row, columns_from(start, kind.CHUNKS), kind)
        x = s - sums.max_s
        y = t - sums.max_t
        # Beyond the columns, and where both sides rule a class out, x − y would be no number.
        x = tl.maximum(x, -1e30)
        y = tl.maximum(y, -1e30)
        terms = far_terms(x, y, task.rate, balance, task.w_q, kind.DIVERGENCE)
        from_p += tl.sum(terms.from_p, 2, keep_dims=True)
        from_q += tl.sum(terms.from_q, 2, keep_dims=True)
        mass = add(mass, TwoFloats(tl.sum(terms.mass, 2, keep_dims=True), lanes * 0.0))
        slope = add(slope, TwoFloats(tl.sum(terms.slope, 2, keep_dims=True), lanes * 0.0))
    from_p, from_q, mass, slope, team = team_sums(
        row_sum(from_p, kind.ROWS),
        row_sum(from_q, kind.ROWS),
        row_sum_pairs(mass, kind.CHUNKS, kind.ROWS),
        row_sum_pairs(slope, kind.CHUNKS, kind.ROWS),
        team,
        kind,
    )
    mean = divide(slope, mass).hi - task.far_offset
    value = kl
    if kind.DIVERGENCE != REVERSE_KL:
        value = far_value(
            from_p, from_q, sums.z_s, sums.z_t, log, task.w_p, task.w_q, kind.DIVERGENCE
        )
    return Slope(value, mean, mean * 0.0), team


class Shares(NamedTuple):
    """The gradient's constants, rounded once."""

    distill: tl.tensor  # of q (φ − mean)
    student: tl.tensor  # of e^{(s − max_s)/T}, where the row is far apart
    teacher: tl.tensor  # of e^{(t − max_t)/T}
    hard: tl.tensor  # of e^{s − max_s}
    smoothing: tl.tensor  # ε/V of every class
    label: tl.tensor  # the cross-entropy's gradient at the label


@triton.jit
def shares_of(task, row, sums, scale, kind):
    distill = multiply(scale, TwoFloats(task.grad_distill, task.grad_distill_lo))
    student = distill.hi
    teacher = distill.hi
    hard = distill.hi
    smoothing = distill.hi
    label = distill.hi
    if kind.DISTILL:
        zero = tl.zeros_like(sums.z_s)
        student = divide(distill, TwoFloats(sums.z_s, zero)).hi
        teacher = divide(distill, TwoFloats(sums.z_t, zero)).hi
    if kind.HARD:
        weight = multiply(scale, TwoFloats(task.grad_hard, task.grad_hard_lo))
        normaliser = hard_normaliser(row, sums)
        hard = divide(weight, TwoFloats(normaliser, tl.zeros_like(normaliser))).hi
        smoothing = multiply(weight, TwoFloats(task.smoothing, task.smoothing_lo)).hi
        # The cross-entropy's share at the label is −Σ_{j≠y} q_j and not q_y − 1, which a confident
        # row would lose to rounding.
        label = weight.hi * ((0.0 - sums.z_rest / normaliser) + task.smoothed_label)
    return Shares(distill.hi, student, teacher, hard, smoothing, label)


@triton.jit
def far_part(task, x, y, sums, slope, shares, kind):
    """∂D/∂s of classes in rows that are far apart."""
    e_s = exp_of(x, task.rate)
    student = shares.student
    if kind.DIVERGENCE == FORWARD_KL:
        part = student * e_s - shares.teacher * exp_of(y, task.rate)
    else:
        unit = student * task.far_unit
        balance = balance_of(task, sums)
        phi = far_slope(
            tl.maximum(x, -1e30), tl.maximum(y, -1e30), task.rate, balance, kind.DIVERGENCE
        )
        part = e_s * (unit * (phi - slope.mean))
    return part, e_s


@triton.jit
def near_part(task, s, t, frame, slope, shares, kind):
    """∂D/∂s of classes, and their terms of D."""
    x = element_of(task, s, t, frame)
    of = contribution(x, task.w_p, task.w_q, kind.DIVERGENCE)
    distill = shares.distill
    if kind.DIVERGENCE == FORWARD_KL:
        part = distill * x.difference
    else:
        phi = (of.slope - slope.mean) - slope.mean_lo
        part = distill * (x.q * phi)
    return part, of.term


class Swept(NamedTuple):
    value: tl.tensor  # D of a near forward KL
    peak: tl.tensor  # the largest entry of the gradient


@triton.jit
def sweep(
    task,
    row,
    sums,
    frame,
    slope,
    shares,
    far,
    fill,
    NEAR: tl.constexpr,
    STORE: tl.constexpr,
    kind,
):
    """One pass over the gradient of the R rows.

    far: rows to be taken as far apart; all of them without NEAR. fill: NaN for rows whose
    gradient is that, 0 for rows that do not count, else 1. Without STORE it is only measured.
    """
    lanes = tl.zeros((kind.ROWS, kind.CHUNKS, 1), tl.float32)
    value = lanes
    peak = lanes
    STAGES: tl.constexpr = 1 if NEAR else 3
    for start in tl.range(row.begin, row.end, kind.CHUNKS * 8, num_stages=STAGES):
        column = columns_from(start, kind.CHUNKS)
        s, t = logits(task, row, column, kind)
        x = s - sums.max_s
        part = tl.zeros_like(s)
        e_s = part
        if kind.DISTILL:
            y = t - sums.max_t
            if NEAR:
                part, terms = near_part(task, s, t, frame, slope, shares, kind)
                value += tl.sum(terms, 2, keep_dims=True)
                if kind.ROWS > 1 and not kind.HALF:
                    far_parts, e_s = far_part(task, x, y, sums, slope, shares, kind)
                    part = tl.where(far, far_parts, part)
            else:
                part, e_s = far_part(task, x, y, sums, slope, shares, kind)
        if kind.HARD:
            if NEAR:
                e = exp_exact(x, 0.0, LOG2E, LOG2E_LO)
                # A row has the same bits whatever the rows are that share its tile.
                if kind.DISTILL and kind.ROWS > 1 and not kind.HALF:
                    e = tl.where(far, hard_exponentials(task, x, x, e_s, False, kind), e)
            else:
                e = hard_exponentials(task, x, x, e_s, False, kind)
            at_label = column == row.label
            of_class = shares.hard * e - shares.smoothing
            part += tl.where(at_label, shares.label, of_class)
        if kind.PROJECTED:
            mask = tl.where(row.read, inside(column, row.end, kind.WHOLE), False)
            x = tl.load(row.student + column, mask=mask, other=0.0).to(tl.float32)
            part *= cap_slope(x, task.student_cap)
        part = tl.where(fill == 1.0, part, fill)
        part = tl.where(column < row.end, part, 0.0)
        if STORE:
            mask = tl.where(row.inside, inside(column, row.end, kind.WHOLE), False)
            tl.store(row.grad + column, part, mask=mask)
        else:
            peak = tl.maximum(peak, tl.max(tl.abs(part), 2, keep_dims=True))
    return Swept(row_sum(value, kind.ROWS), row_max(peak, kind.ROWS))
