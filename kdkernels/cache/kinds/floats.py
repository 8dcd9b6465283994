"""Rows of floats, as their bits, and how exact those are."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...files import Array
from ..sections import Column

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Half a unit in the last place, relative to a number that is not subnormal.
ROUNDING = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}


def columns(name: str, dtype: str, times: int) -> tuple[Column, ...]:
    """The one of `times` numbers a row."""
    bytes_each = {"fp32": 4, "fp8": 1}.get(dtype, 2)
    return (Column(name, f"<u{bytes_each}", bytes_each, times=times),)


def bound(name: str, dtype: str) -> dict[str, Any]:
    """How far what is read is from what was given, as a description says it."""
    if dtype == "fp8":
        # The scale is 2⁻¹²⁶ at least: then of what is as small as that.
        return {name: {"relative": 2.0**-4, "of_largest_in_row": 2.0**-17, "absolute": 2.0**-136}}
    # Of what is subnormal, half of the smallest number there is.
    smallest = torch.finfo(FLOATS[dtype]).smallest_normal * ROUNDING[dtype]
    return {name: {"relative": ROUNDING[dtype], "absolute": smallest}}


def check(name: str, x: Tensor, size: int, infinite: bool) -> None:
    """(n, size), and finite; infinite: −inf may be there."""
    if not x.is_floating_point() or x.dim() != 2 or x.shape[1] != size:
        raise ValueError(
            f"{name} must be floating point of shape (n, {size}), got {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    wrong = x.isnan() | (x == math.inf) if infinite else ~x.isfinite()
    if wrong.any():
        raise ValueError(f"{name} must be finite{' or −inf' * infinite}, got {x[wrong][0]}")


def rounded(name: str, x: Tensor, dtype: str) -> Array:
    """(n, size) -> the bits of its numbers in the dtype."""
    numbers = cast(name, x, dtype).contiguous()
    bits = {4: torch.int32, 2: torch.int16}[numbers.itemsize]
    return numbers.view(bits).numpy().view(f"<u{numbers.itemsize}")


def cast(name: str, x: Tensor, dtype: str) -> Tensor:
    """A tensor -> the same in the dtype, on the CPU, where it has room for the numbers."""
    x = x.detach().cpu()
    numbers = x.to(FLOATS[dtype])
    if (numbers.isinf() & ~x.isinf()).any():
        raise ValueError(f"{name} must be in the range of {dtype}, got {x.abs().max():.4g}")
    return numbers


def tensor(bits: Array, dtype: str) -> Tensor:
    """(n, size) -> a tensor"""
    signed = {4: np.int32, 2: np.int16}[bits.itemsize]
    return torch.from_numpy(bits.view(signed)).view(FLOATS[dtype])
