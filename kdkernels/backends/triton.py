"""The row operators in Triton, for GPUs without compiled kernels: NVIDIA, AMD, Intel.

This file says where they run, triton_rows.py has the operators, triton_launch.py what a launch
takes, triton_shards.py the operators for shards, and the kernels are in `triton_kernels/`: all
imported by the first call. With TRITON_INTERPRET=1 they run on CPU tensors, for tests and
debugging.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from .. import ops
from . import marks

DEVICE_TYPES = ("cuda", "xpu")
INSTALLED = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot take tensors of a device type, or None."""
    if not INSTALLED:
        return "triton is not installed"
    if device_type == "cpu":
        if interpreting():
            return None
        return "Triton compiles for GPUs (TRITON_INTERPRET=1 runs it on CPU tensors, slowly)"
    if device_type not in DEVICE_TYPES:
        return "Triton compiles for NVIDIA, AMD and Intel GPUs"
    if not torch.get_device_module(device_type).is_available():
        return f"torch sees no {device_type} device"
    if device_type == "cuda" and not torch.version.hip and _capability() < (7, 0):
        return "Triton compiles for NVIDIA GPUs of compute capability 7.0 or newer"
    return None


@marks.constant
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _operator(name: str) -> Callable[..., Any]:
    """One of triton_rows.py, imported when it is first called."""

    def operator(*args: Any) -> Any:
        from . import triton_rows

        return triton_rows.OPERATORS[name](*args)

    return operator


KERNELS = {name: _operator(name) for name in ops.SCHEMAS}
ops.register("triton", dict.fromkeys(("CPU", "CUDA", "XPU"), KERNELS))
