"""The compiled row operators of `csrc/`, registered with `torch.library`.

This file turns tensors into pointers, shapes and strides and allocates the outputs; everything
else is C++.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import bad_labels, marks

_C: Any  # the module, or None
try:
    _C = importlib.import_module("kdkernels._C")
    LOAD_ERROR = None
except ImportError as error:
    _C = None
    built = importlib.util.find_spec("kdkernels._C") is not None
    LOAD_ERROR = f"kdkernels._C does not load: {error}" if built else "kdkernels._C was not built"

Rows = tuple[int, int, int, int]
Tensors = tuple[Tensor | None, ...]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/rows.h: DType


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot take tensors of a device type (the current device), or None."""
    if _C is None:
        return f"{LOAD_ERROR} (python -m kdkernels.info says more)"
    if device_type == "cpu":
        return None
    if device_type != "cuda" or torch.version.hip:
        return "the compiled row operators run on CPUs and NVIDIA GPUs"
    if not hasattr(_C, "distill_rows_cuda"):
        return "kdkernels._C was built without CUDA (python -m kdkernels.info says why)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _no_code_for(torch.cuda.current_device())


@marks.constant  # torch.compile cannot look into it
def _no_code_for(device: int) -> str | None:
    return _ask_for_code(device)


@functools.cache
def _ask_for_code(device: int) -> str | None:
    error = _C.cuda_usable(device)
    return error and f"kdkernels._C was built for other GPUs: {error}"


def _rows(x: Tensor) -> Rows:
    """(L, V) or (B, L, V), unit vocabulary stride, as C++ sees it: pointer, dtype, two strides."""
    return x.data_ptr(), DTYPES[x.dtype], *ops.strides(x)


def _teacher(tensors: list[Tensor]) -> tuple[Rows | None, tuple[int, ...] | None]:
    """What `ops` takes a teacher as: its rows and None, or None and the fields of `Kept`."""
    if len(tensors) == 1:
        return _rows(*tensors), None
    return None, (tensors[0].shape[-1], *map(_pointer, tensors))


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def operators(
    distill: Callable[..., int], scale: Callable[..., None], shard: Callable[..., None]
) -> ops.Kernels:
    """The row operators of `ops.SCHEMAS` over three compiled functions that take addresses.

    They take the device and what csrc/bind_args.h turns into C++; `distill` returns the first row
    whose label is out of range, or -1.
    """

    def compute(
        student: Tensor,
        teacher: list[Tensor],
        labels: Tensor | None,
        weights: Tensor | None,
        num_items: Tensor | None,
        grad: Tensor | None,
        want_terms: bool,
        options: tuple[Any, ...],
    ) -> ops.Losses:
        losses = ops.new_losses(student)
        bad_label = distill(
            student.device,
            ops.sizes(student),
            _rows(student),
            *_teacher(teacher),
            None if grad is None else _rows(grad),
            tuple(map(_pointer, (labels, weights, num_items))),
            tuple(map(_pointer, losses)),
            want_terms,
            options,
        )
        if bad_label >= 0 and labels is not None:
            *_, ignore_index, vocab_size, _ = options
            raise IndexError(ops.bad_label_message(labels, bad_label, ignore_index, vocab_size))
        return losses

    def scale_rows_(
        grad: Tensor,
        upstream: Tensor,
        unscale: Tensor,
        labels: Tensor | None,
        weights: Tensor | None,
        ignore_index: int,
        vocab_size: int,
    ) -> None:
        scale(
            grad.device,
            ops.sizes(grad),
            _rows(grad),
            upstream.data_ptr(),
            upstream.numel() > 1,
            tuple(map(_pointer, (labels, weights, unscale))),
            ignore_index,
            vocab_size,
        )

    return ops.operators(compute, scale_rows_, _shard_operators(shard))


PHASES = {"statistics": 0, "terms": 1, "gradient": 2}  # csrc/common/args.h: Phase


def _shard_operators(shard: Callable[..., None]) -> ops.Kernels:
    def run(
        phase: str,
        student: Tensor,
        teacher: list[Tensor],
        grad: Tensor | None,
        inputs: Tensors,
        outputs: Tensors,
        flags: tuple[Any, ...],
        options: tuple[Any, ...],
    ) -> None:
        shard(
            student.device,
            PHASES[phase],
            ops.sizes(student),
            _rows(student),
            *_teacher(teacher),
            None if grad is None else _rows(grad),
            tuple(map(_pointer, inputs)),
            tuple(map(_pointer, outputs)),
            *flags,
            options,
        )

    def shard_statistics(
        student: Tensor,
        teacher: list[Tensor],
        labels: Tensor | None,
        weights: Tensor | None,
        want_terms: bool,
        *options: Any,
    ) -> Tensor:
        out = ops.new_statistics(student, ops.shard_fields(teacher))
        inputs, flags = (labels, weights, None, None), (want_terms, False, 0)
        run("statistics", student, teacher, None, inputs, (out, None), flags, options)
        return out

    def shard_terms(
        student: Tensor,
        teacher: list[Tensor],
        labels: Tensor | None,
        weights: Tensor | None,
        merged: Tensor,
        want_terms: bool,
        leads: bool,
        *options: Any,
    ) -> Tensor:
        out = ops.new_statistics(student, ops.TERM_FIELDS)
        inputs, flags = (labels, weights, None, merged), (want_terms, leads, 0)
        run("terms", student, teacher, None, inputs, (out, None), flags, options)
        return out

    def shard_gradient_(
        student: Tensor,
        teacher: list[Tensor],
        labels: Tensor | None,
        weights: Tensor | None,
        num_items: Tensor | None,
        merged: Tensor,
        grad: Tensor,
        classes: int,
        *options: Any,
    ) -> Tensor:
        unscale = ops.new_unscale(student)
        inputs, flags = (labels, weights, num_items, merged), (False, False, classes)
        run("gradient", student, teacher, grad, inputs, (None, unscale), flags, options)
        return unscale

    return dict(
        shard_statistics=shard_statistics,
        shard_terms=shard_terms,
        shard_gradient_=shard_gradient_,
    )


def _distill_on_cpu(device: torch.device, *args: Any) -> int:
    return int(_C.distill_rows_cpu(*args, torch.get_num_threads()))


def _scale_on_cpu(device: torch.device, *args: Any) -> None:
    _C.scale_rows_cpu(*args, torch.get_num_threads())


def _shard_on_cpu(device: torch.device, *args: Any) -> None:
    _C.shard_rows_cpu(*args, torch.get_num_threads())


# ---- CUDA ----------------------------------------------------------------------------------------


def _call(device: torch.device, scratch: int) -> tuple[int, int, int, int]:
    stream = torch.cuda.current_stream(device).cuda_stream
    return device.index, stream, scratch, bad_labels.flag(device).data_ptr()


def _distill_on_cuda(device: torch.device, *args: Any) -> int:
    bad_labels.raise_earlier(device)
    # Freed on return, which is safe: who gets this memory next uses it later on the same stream.
    scratch = torch.empty(_C.CUDA_SCRATCH_BYTES, dtype=torch.uint8, device=device)
    _C.distill_rows_cuda(*args, _call(device, scratch.data_ptr()))
    return -1


def _scale_on_cuda(device: torch.device, *args: Any) -> None:
    bad_labels.raise_earlier(device)
    _C.scale_rows_cuda(*args, _call(device, 0))


def _shard_on_cuda(device: torch.device, *args: Any) -> None:
    bad_labels.raise_earlier(device)
    scratch = torch.empty(_C.CUDA_SCRATCH_BYTES, dtype=torch.uint8, device=device)
    _C.shard_rows_cuda(*args, _call(device, scratch.data_ptr()))


if _C is not None:
    KERNELS = {"CPU": operators(_distill_on_cpu, _scale_on_cpu, _shard_on_cpu)}
    if hasattr(_C, "distill_rows_cuda"):
        KERNELS["CUDA"] = operators(_distill_on_cuda, _scale_on_cuda, _shard_on_cuda)
    ops.register("native", KERNELS)
