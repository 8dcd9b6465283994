"""What goes over rows and not over columns: the denominator of a mean before the rows are computed,
the loss after, and the upstream gradient in the backward pass."""

import triton
import triton.language as tl

from .arithmetic import INFINITY, TwoFloats, add, divide, multiply, pair, row_sum_pairs
from .statistics import columns_from, inside, starts_of, stride_of

LANES = tl.constexpr(1024)


@triton.jit
def pair_from_double(bits):
    """A double's bits, int64 (n), without double-precision instructions. Beyond a float's range: 0
    or infinity."""
    exponent = ((bits >> 52) & 2047).to(tl.int32) - 1023
    fraction = bits & 0xFFFFFFFFFFFFF
    sign = tl.where(bits < 0, -1.0, 1.0)
    held = tl.minimum(tl.maximum(exponent, -126), 127)
    power = sign * ((held + 127) << 23).to(tl.float32, bitcast=True)
    high = ((fraction >> 29) + 0x800000).to(tl.float32)  # 24 bits
    low = (fraction & 0x1FFFFFFF).to(tl.float32)
    value = pair(high * 1.1920928955078125e-07 * power, low * 2.220446049250313e-16 * power)
    beyond = tl.where(
        exponent > 127,
        tl.where((exponent == 1024) & (fraction != 0), float("nan"), sign * INFINITY),
        0.0,
    )
    outside = (exponent > 127) | (exponent < -126)
    return TwoFloats(tl.where(outside, beyond, value.hi), tl.where(outside, 0.0, value.lo))


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def prepare(
    labels,  # int64 (N) or None
    weights,  # float32 (N) or None
    num_items,  # the bits of a float64, int64 (), or None
    mean,  # see distill.py: written
    arrivals,  # int32 (COUNT), a power of 2: zeroed
    rows,
    ignore_index,
    MEAN: tl.constexpr,
    COUNT: tl.constexpr,
):
    """One program."""
    tl.store(arrivals + tl.arange(0, COUNT), tl.zeros((COUNT,), tl.int32))
    denominator = TwoFloats(tl.cast(1.0, tl.float32), tl.cast(0.0, tl.float32))
    if MEAN:
        if num_items is not None:
            denominator = pair_from_double(tl.load(num_items))
        else:
            lanes = tl.zeros((LANES,), tl.float32)
            total = TwoFloats(lanes, lanes)
            for first in range(0, rows, LANES):
                index = first + tl.arange(0, LANES)
                counts = index < rows
                weight = tl.full((LANES,), 1.0, tl.float32)
                if weights is not None:
                    weight = tl.load(weights + index, mask=counts, other=0.0)
                if labels is not None:
                    label = tl.load(labels + index, mask=counts, other=0)
                    counts = counts & (label != ignore_index)
                total = add(total, TwoFloats(tl.where(counts, weight, 0.0), lanes * 0.0))
            denominator = row_sum_pairs(total, LANES, 1)
    inverse = divide(TwoFloats(1.0, 0.0), denominator)
    empty = denominator.hi == 0.0
    tl.store(mean, tl.where(empty, 0.0, inverse.hi))
    tl.store(mean + 1, tl.where(empty, 0.0, inverse.lo))
    tl.store(mean + 2, tl.where(empty, 1.0, 0.0))


@triton.jit(do_not_specialize=["rows"])
def finish(
    row_losses,  # float32 (N)
    mean,
    loss,  # float32 (): written
    unscale,  # float32 (): written, or None where every row has its own
    rows,
):
    """One program: the rows' losses add up in pairs of floats."""
    lanes = tl.zeros((LANES,), tl.float32)
    total = TwoFloats(lanes, lanes)
    for first in range(0, rows, LANES):
        index = first + tl.arange(0, LANES)
        value = tl.load(row_losses + index, mask=index < rows, other=0.0)
        total = add(total, TwoFloats(value, lanes * 0.0))
    total = row_sum_pairs(total, LANES, 1)
    inverse = TwoFloats(tl.load(mean), tl.load(mean + 1))
    empty = tl.load(mean + 2) != 0.0
    tl.store(loss, tl.where(empty, 0.0, multiply(total, inverse).hi))
    if unscale is not None:
        tl.store(unscale, tl.where(empty, 0.0, 1.0))


@triton.jit(do_not_specialize=["grad_b", "grad_l", "rows", "length", "columns", "ignore_index"])
def scale_rows(
    grad,  # (B, L, V_s)
    grad_b,  # its strides, see distill.py
    grad_l,
    upstream,  # float32 () or (N)
    unscale,  # float32, () or (N) for float16
    labels,
    weights,
    rows,
    length,
    columns,
    ignore_index,
    PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,  # rows begin and end with chunks, the padding is 0
):
    """grad times upstream · unscale. Rows whose factor is 1 are left as they are, without asking
    the host."""
    HALF: tl.constexpr = grad.dtype.element_ty == tl.float16
    index = (tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None, None]
    there = index < rows
    counts = there
    if labels is not None:
        counts = counts & (tl.load(labels + index, mask=there, other=0) != ignore_index)
    if weights is not None:
        counts = counts & (tl.load(weights + index, mask=there, other=0.0) != 0.0)
    remaining = tl.load(unscale + (index if HALF else index * 0), mask=there, other=0.0)
    factor = tl.load(upstream + (index if PER_ROW else index * 0), mask=there, other=1.0)
    factor = factor * remaining
    counts = counts & (remaining != 0.0) & (factor != 1.0)
    if tl.max(counts.to(tl.int32)) > 0:
        stride_b = stride_of(grad_b, WHOLE)
        stride_l = stride_of(grad_l, WHOLE)
        data = starts_of(grad, stride_b, stride_l, tl.minimum(index, rows - 1), length)
        for start in range(0, columns, CHUNKS * 8):
            column = columns_from(start, CHUNKS)
            mask = tl.where(counts, inside(column, columns, WHOLE), False)
            values = tl.load(data + column, mask=mask, other=0.0).to(tl.float32)
            # The padding of the last chunk stays +0, whatever it is multiplied by.
            values = tl.where(column < columns, values * factor, 0.0)
            tl.store(data + column, values, mask=mask)
