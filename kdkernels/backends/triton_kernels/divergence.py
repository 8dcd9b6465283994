"""The divergences, class by class: csrc/common/divergence.h and far.h derive them."""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import (
    INFINITY,
    LOG2,
    LOG2E,
    expm1_gap,
    log1p_gap,
    log2_of,
    log_of,
    two_diff,
)

# Their places in objective.DIVERGENCES.
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
SKEW_FORWARD_KL = tl.constexpr(3)
SKEW_REVERSE_KL = tl.constexpr(4)
TVD = tl.constexpr(5)

# Below this KL p and q differ too little for a difference of their rounded normalisers.
NEAR_KL = tl.constexpr(1e-3)
# Up to this mean slope, in the units of logits / T, one float holds it.
FAR_SLOPE = tl.constexpr(4.0)


class Frame(NamedTuple):
    """Where a row's logits stand after the statistics."""

    max_s: tl.tensor
    max_t: tl.tensor
    inv_z_s: tl.tensor
    inv_z_t: tl.tensor
    log_hi: tl.tensor  # T · log(Z_s / Z_t), in units of the logits
    log_lo: tl.tensor


class Element(NamedTuple):
    p: tl.tensor
    q: tl.tensor
    d: tl.tensor  # log q − log p
    difference: tl.tensor  # q − p


@triton.jit
def element(s, t, e_s, e_t, frame, inv_temperature):
    q = e_s * frame.inv_z_s
    p = e_t * frame.inv_z_t
    from_max_s = two_diff(s, frame.max_s)
    from_max_t = two_diff(t, frame.max_t)
    gap = from_max_s.hi - from_max_t.hi
    low = (from_max_s.lo - from_max_t.lo) - frame.log_lo
    low = tl.where(low == low, low, 0.0)
    d = ((gap - frame.log_hi) + low) * inv_temperature
    d = tl.where(d == d, d, 0.0)
    near = (tl.abs(d) < 0.5) & (tl.abs(gap) * inv_temperature < 4.0)
    difference = tl.where(near, p * (d + d * d * expm1_gap(d)), q - p)
    return Element(p, q, d, difference)


class Contribution(NamedTuple):
    """What a class adds to D, and φ, of which the gradient is (1/T) q (φ − Σ q φ)."""

    term: tl.tensor
    slope: tl.tensor


class Mixed(NamedTuple):
    term: tl.tensor
    log_ratio: tl.tensor


@triton.jit
def mixed(a, m, difference):
    """The term a ((m − a)/a − log(m/a)) of KL(a‖m), and log(m/a); `difference` is m − a."""
    inverse = 1.0 / tl.where(a > 0.0, a, 1.0)
    y = difference * inverse
    near = tl.abs(y) < 0.25
    squared = y * y * log1p_gap(y)
    ratio = m * inverse
    lost = (y - (ratio - 1.0)) * (2.0 - ratio)
    far_log = log_of(ratio) + tl.where((ratio > 0.5) & (ratio < 2.0), lost, 0.0)
    log_ratio = tl.where(a > 0.0, tl.where(near, y - squared, far_log), 0.0)
    term = tl.where(near & (a > 0.0), a * squared, difference - a * log_ratio)
    return Mixed(term, log_ratio)


@triton.jit
def contribution(x, w_p, w_q, DIVERGENCE: tl.constexpr):
    """Of an `Element`; w_p and w_q are the weights of the mixture m = w_p p + w_q q."""
    near = tl.abs(x.d) < 0.5
    if DIVERGENCE == FORWARD_KL:
        term = tl.where(near, x.p * (x.d * x.d * expm1_gap(x.d)), x.difference - x.p * x.d)
        term = tl.where(x.p > 0.0, term, x.q)
        return Contribution(tl.where(x.d == -INFINITY, INFINITY, term), x.d)
    elif DIVERGENCE == REVERSE_KL:
        term = tl.where(near, x.q * (x.d * x.d * expm1_gap(-x.d)), x.q * x.d - x.difference)
        term = tl.where(x.q > 0.0, term, x.p)
        slope = tl.where(x.q > 0.0, x.d, 0.0)
        return Contribution(tl.where(x.d == INFINITY, INFINITY, term), slope)
    elif DIVERGENCE == TVD:
        slope = tl.where(x.difference > 0.0, 0.5, tl.where(x.difference < 0.0, -0.5, 0.0))
        return Contribution(0.5 * tl.abs(x.difference), slope)
    else:
        m = w_p * x.p + w_q * x.q
        relative = x.difference / tl.where(m > 0.0, m, 1.0)
        if DIVERGENCE == JSD:
            from_p = mixed(x.p, m, w_q * x.difference)
            from_q = mixed(x.q, m, -w_p * x.difference)
            return Contribution(w_p * from_p.term + w_q * from_q.term, -w_q * from_q.log_ratio)
        elif DIVERGENCE == SKEW_FORWARD_KL:
            from_p = mixed(x.p, m, w_q * x.difference)
            return Contribution(from_p.term, w_q * w_q * relative)
        else:
            from_q = mixed(x.q, m, -w_p * x.difference)
            return Contribution(from_q.term, -from_q.log_ratio - w_q * w_p * relative)


# ---- Rows that are far apart: csrc/common/far.h --------------------------------------------------


@triton.jit
def far_slope(x, y, rate, balance, DIVERGENCE: tl.constexpr):
    """φ of a class in the units of `Task.far_unit`, less the constant that makes it 0 where only
    the student has the class; x and y are the distances to the maxima, balance is
    w_p z_s / (w_q z_t)."""
    if DIVERGENCE == REVERSE_KL:
        return tl.maximum(x - y, -1e9)
    else:
        distance = (y - x) * rate
        ratio = balance * tl.exp2(tl.minimum(distance, 100.0))
        if DIVERGENCE == SKEW_FORWARD_KL:
            return -ratio / (1.0 + ratio)
        else:
            # What was cut off comes back, up to distances at which e_s is 0.
            cut = tl.minimum(tl.maximum(distance * 0.0078125 - 0.78125, 0.0), 1.0)
            log = log2_of(1.0 + ratio) + 128.0 * cut
            if DIVERGENCE == JSD:
                return -log
            else:
                return LOG2E * ratio / (1.0 + ratio) - log


class FarTerms(NamedTuple):
    """What a class adds to the sums over a row; 0 what the divergence does not need."""

    mass: tl.tensor  # e_s
    from_p: tl.tensor  # e_t (log(p/m) − log(z_s/z_t))
    from_q: tl.tensor  # e_s log(q/m)
    slope: tl.tensor  # e_s times the slope plus `Task.far_offset`


@triton.jit
def far_terms(x, y, rate, balance, w_q, DIVERGENCE: tl.constexpr):
    zero = tl.zeros_like(x)
    if DIVERGENCE == REVERSE_KL:
        e_s = tl.exp2(x * rate)
        return FarTerms(e_s, zero, zero, e_s * far_slope(x, y, rate, balance, DIVERGENCE))
    else:
        a = tl.maximum(x * rate, -1e4)
        b = tl.maximum(y * rate, -1e4)
        e_s = tl.exp2(a)
        e_t = tl.exp2(b)
        m = tl.maximum(w_q * tl.fma(balance, e_t, e_s), 1e-37)
        log_m = log2_of(m)
        from_p = e_t * (b - log_m)
        from_q = e_s * (a - log_m)
        if DIVERGENCE == JSD:
            return FarTerms(e_s, from_p, from_q, from_q)
        elif DIVERGENCE == SKEW_FORWARD_KL:
            return FarTerms(e_s, from_p, zero, -e_s * (w_q * balance * e_t / m))
        else:
            return FarTerms(e_s, zero, from_q, from_q - e_s * (w_q * LOG2E * e_s / m))


@triton.jit
def far_value(from_p, from_q, z_s, z_t, log_ratio, w_p, w_q, DIVERGENCE: tl.constexpr):
    """D from the sums over a row: w_p KL(p‖m) + w_q KL(q‖m), or one of the two."""
    kl_p = (log_ratio.hi + LOG2 * from_p / z_t) + log_ratio.lo
    kl_q = LOG2 * from_q / z_s
    if DIVERGENCE == JSD:
        return w_p * kl_p + w_q * kl_q
    elif DIVERGENCE == SKEW_FORWARD_KL:
        return kl_p
    else:
        return kl_q
