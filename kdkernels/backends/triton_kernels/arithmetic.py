"""Float arithmetic on numbers and tensors of any shape, after csrc/common/math.h and pairs.h.

Classes are (R, C, 8): R rows, C lanes of 8 neighbouring columns. What is known of a lane is
(R, C, 1), of a row (R, 1, 1), or a number where R is 1: no thread has to tell it another one.
"""

from typing import NamedTuple

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
LOG2 = tl.constexpr(0.6931471824645996)  # log 2 as a float
LOG2_LO = tl.constexpr(-1.9046542121259336e-9)
HALF_LOG2_SQUARED = tl.constexpr(0.24022650718688965)
HALF_LOG2_SQUARED_LO = tl.constexpr(-2.277889404878053e-10)
LOG2E = tl.constexpr(1.4426950216293335)  # log2 e in two floats: the rate of e^x
LOG2E_LO = tl.constexpr(1.925963033500011e-8)
# Adding 1.5 · 2^23 rounds to an integer n; adding the exponent bias as well leaves n + 127 in the
# low bits, which shifted into place are 2^n.
SHIFT = tl.constexpr(12582912.0 + 127.0)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)


class TwoFloats(NamedTuple):
    """hi + lo, not added up."""

    hi: tl.tensor
    lo: tl.tensor


@triton.jit
def two_diff(a, b):
    """a − b exactly; lo is NaN where hi is infinite."""
    hi = a - b
    back = a - hi
    return TwoFloats(hi, (a - (hi + back)) + (back - b))


@triton.jit
def two_sum(a, b):
    hi = a + b
    back = hi - a
    return TwoFloats(hi, (a - (hi - back)) + (b - back))


@triton.jit
def two_product(a, b):
    """a · b exactly, where it is no smaller than 2^-102. As a fused multiply-add, because compilers
    fuse a mere product with whatever it is added to, and then lo is of another hi."""
    hi = tl.fma(a, b, 0.0)
    return TwoFloats(hi, tl.fma(a, b, -hi))


@triton.jit
def pair(hi, lo):
    """hi + lo in its normal form; an infinite hi keeps no lo."""
    lo = tl.where(lo == lo, lo, 0.0)
    total = hi + lo
    rest = lo - (total - hi)
    return TwoFloats(total, tl.where(rest == rest, rest, 0.0))


@triton.jit
def add(a, b):
    total = two_sum(a.hi, b.hi)
    return pair(total.hi, total.lo + (a.lo + b.lo))


@triton.jit
def multiply(a, b):
    product = two_product(a.hi, b.hi)
    return pair(product.hi, product.lo + (a.hi * b.lo + a.lo * b.hi))


@triton.jit
def divide(a, b):
    quotient = a.hi / b.hi
    rest = tl.fma(-quotient, b.hi, a.hi) + (a.lo - quotient * b.lo)
    return pair(quotient, rest / b.hi)


@triton.jit
def exp_of(x, rate):
    """e^{x / T}, with rate = log2(e) / T in one float: off by up to 2^-23 |x| / T."""
    return tl.exp2(x * rate)


@triton.jit
def exp_exact(x, x_lo, rate, rate_lo):
    """e^{(x + x_lo) / T} for x <= 0 to a few ulp; 1 at 0, 0 at −inf and where it is subnormal."""
    shifted = x * rate + SHIFT
    f = tl.fma(x, rate, SHIFT - shifted)
    f = x_lo * rate + (x * rate_lo + f)
    y = tl.exp2(f) * (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return tl.where(shifted < 12582913.0, 0.0, y)


@triton.jit
def exp_pair(x, x_lo, rate, rate_lo):
    """e^{(x + x_lo) / T} for x <= 0 in two floats, to 2^-32 of it; 0 where it is subnormal."""
    y = two_product(x, rate)
    n = (y.hi + SHIFT) - SHIFT
    f = pair(y.hi - n, y.lo + (x * rate_lo + x_lo * rate))
    # 2^f = 1 + log 2 · f + log² 2 / 2 · f² + …, the first three terms in two floats.
    t = f.hi * 1.0178086e-7 + 1.3215487e-6
    t = t * f.hi + 1.5252734e-5
    t = t * f.hi + 1.5403530e-4
    t = t * f.hi + 1.3333558e-3
    t = t * f.hi + 9.6181291e-3
    t = t * f.hi + 5.5504109e-2
    t = t * f.hi * f.hi * f.hi
    linear = multiply(f, TwoFloats(LOG2, LOG2_LO))
    square = multiply(multiply(f, f), TwoFloats(HALF_LOG2_SQUARED, HALF_LOG2_SQUARED_LO))
    total = add(add(TwoFloats(1.0 + 0.0 * t, 0.0 * t), linear), square)
    total = add(total, TwoFloats(t, 0.0 * t))
    power = ((n + SHIFT).to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    there = y.hi > -125.0
    return TwoFloats(tl.where(there, total.hi * power, 0.0), tl.where(there, total.lo * power, 0.0))


class Logarithm(NamedTuple):
    """log x = exponent · log 2 + of_fraction."""

    exponent: tl.tensor
    of_fraction: tl.tensor


@triton.jit
def logarithm(x):
    """For normal x > 0."""
    bits = x.to(tl.int32, bitcast=True) - SQRT_HALF_BITS
    f = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    y = f * 7.0376792e-2 - 1.1514607e-1
    y = y * f + 1.1676999e-1
    y = y * f - 1.2420141e-1
    y = y * f + 1.4249323e-1
    y = y * f - 1.6668058e-1
    y = y * f + 2.0000715e-1
    y = y * f - 2.4999994e-1
    y = y * f + 3.3333331e-1
    y = y * f * f * f - 0.5 * f * f
    return Logarithm((bits >> 23).to(tl.float32), y + f)


@triton.jit
def log_of(x):
    """log x for normal x > 0; finite for 0 and subnormal x."""
    log = logarithm(x)
    return log.exponent * LOG2 + log.of_fraction


@triton.jit
def log2_of(x):
    """log2 x; −inf where x is subnormal, x where it is no finite number."""
    log = logarithm(x)
    y = log.exponent + log.of_fraction * LOG2E
    y = tl.where(x < 1.1754944e-38, -INFINITY, y)
    return tl.where(x < INFINITY, y, x)


@triton.jit
def log_ratio(a, b):
    """log(a / b), absolute error about 2^-24, for normal positive a, b and a / b."""
    ratio = a / b
    lost = tl.fma(-ratio, b, a) / a
    log = logarithm(ratio)
    # 0.693145752 has so few bits that its product with the exponent is exact.
    return pair(
        log.exponent * 6.93145752e-1, log.exponent * 1.42860677e-6 + (log.of_fraction + lost)
    )


@triton.jit
def log_pair(x):
    """log x of x = hi + lo in two floats, absolute error about 2^-32, for normal x >= 1."""
    near = log_of(x.hi)
    e = exp_pair(-near, 0.0 * near, LOG2E, LOG2E_LO)
    rest = two_product(x.hi, e.hi)
    rest = (rest.hi - 1.0) + (rest.lo + (x.hi * e.lo + x.lo * e.hi))
    return pair(near, rest - 0.5 * rest * rest)


@triton.jit
def log1p_gap(y):
    """(y − log(1 + y)) / y² for |y| < ¼."""
    z = y * 1.1357451e-1 - 1.2500031e-1
    z = z * y + 1.2428257e-1
    z = z * y - 1.4218845e-1
    z = z * y + 1.6668151e-1
    z = z * y - 2.0001176e-1
    z = z * y + 2.4999990e-1
    z = z * y - 3.3333328e-1
    return z * y + 0.5


@triton.jit
def log1p_of(y):
    """log(1 + y) for y > −1."""
    return tl.where(tl.abs(y) < 0.25, y - y * y * log1p_gap(y), log_of(1.0 + y))


@triton.jit
def expm1_gap(d):
    """(e^d − 1 − d) / d² for |d| < ½."""
    y = d * 1.9875629e-4 + 1.3981997e-3
    y = y * d + 8.3334522e-3
    y = y * d + 4.1665796e-2
    y = y * d + 1.6666665e-1
    return y * d + 0.5


@triton.jit
def anchor(maximum):
    """What differences are taken from: the maximum, or 0 while everything is −inf."""
    return tl.where(maximum == -INFINITY, 0.0, maximum)


# ---- Over the lanes and columns of a row ---------------------------------------------------------


@triton.jit
def row_sum(x, ROWS: tl.constexpr):
    if ROWS == 1:
        return tl.sum(x)
    else:
        return tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def row_max(x, ROWS: tl.constexpr):
    if ROWS == 1:
        return tl.max(x)
    else:
        return tl.max(tl.max(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def row_sum_pairs(x, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Of at most COUNT terms a row, a power of 2: hi is split at a unit so large that the upper
    parts add up exactly in any order."""
    top = row_max(tl.abs(x.hi), ROWS)
    power = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.where(top < 1e30, power * (2.0 * COUNT), 0.0)  # infinities add up as they are
    upper = (x.hi + unit) - unit
    lower = (x.hi - upper) + x.lo
    return pair(row_sum(upper, ROWS), row_sum(lower, ROWS))


@triton.jit
def some(flag, ROWS: tl.constexpr):
    """Whether it is true of any row, to branch on."""
    if ROWS == 1:
        return flag
    else:
        return tl.max(flag.to(tl.int32)) > 0


class Cap(NamedTuple):
    """Logits that come as a projection x: z = cap tanh(rate x) with rate = scale / cap, or
    scale · x where cap is 0."""

    scale: tl.tensor
    cap: tl.tensor
    rate: tl.tensor


class Tanh(NamedTuple):
    value: tl.tensor
    slope: tl.tensor  # 1 − tanh²(u), not as a difference


@triton.jit
def tanh_of(u):
    size = tl.abs(u)
    e = tl.exp2(size * (-2.0 * LOG2E))
    inverse = 1.0 / (1.0 + e)
    u2 = u * u
    # For |u| < ¼ the series, to u^9: 1e-8 of it is missing.
    y = u2 * 2.1869488e-2 - 5.3968254e-2
    y = y * u2 + 1.3333334e-1
    y = y * u2 - 3.3333334e-1
    near = u + u * u2 * y
    far = (1.0 - e) * inverse
    far = tl.where(u < 0.0, -far, far)
    return Tanh(tl.where(size < 0.25, near, far), 4.0 * e * inverse * inverse)


@triton.jit
def capped(x, cap):
    return tl.where(cap.cap == 0.0, x * cap.scale, cap.cap * tanh_of(x * cap.rate).value)


@triton.jit
def cap_slope(x, cap):
    """dz/dx"""
    return cap.scale * tl.where(cap.cap == 0.0, 1.0, tanh_of(x * cap.rate).slope)
