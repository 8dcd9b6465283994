"""The compiled row operators of `csrc/`, registered with `torch.library`.

This file turns tensors into pointers, shapes and strides and allocates the outputs; everything
else is C++.
"""

import importlib.util

import torch

from .. import ops

try:
    from .. import _C

    LOAD_ERROR = None
except ImportError as error:
    _C = None
    built = importlib.util.find_spec("kdkernels._C") is not None
    LOAD_ERROR = f"kdkernels._C does not load: {error}" if built else "kdkernels._C was not built"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/rows.h: DType


def unavailable(device_type):
    """Why this backend cannot take tensors of a device type, or None."""
    if _C is None:
        return f"{LOAD_ERROR} (python -m kdkernels.info says more)"
    if device_type != "cpu":
        return f"the compiled row operators of this version run on the CPU, not on {device_type}"
    return None


def _rows(x):
    """(L, V) or (B, L, V), unit vocabulary stride, as C++ sees it: pointer, dtype, two strides."""
    *batch, stride = x.stride()[:-1]
    return x.data_ptr(), DTYPES[x.dtype], batch[0] if batch else 0, stride


def _sizes(x):
    *batch, length, width = x.shape
    return batch[0] if batch else 1, length, width


def _pointer(x):
    return 0 if x is None else x.data_ptr()


def operators(distill, scale):
    """The row operators of `ops.SCHEMAS` over two compiled functions that take addresses.

    `distill` and `scale` take what csrc/bind_args.h turns into C++; `distill` returns the first row
    whose label is out of range, or -1.
    """

    def compute(student, teacher, labels, weights, num_items, grad, want_terms, options):
        losses = ops.new_losses(student)
        bad_label = distill(
            _sizes(student),
            _rows(student),
            _rows(teacher),
            None if grad is None else _rows(grad),
            tuple(map(_pointer, (labels, weights, num_items))),
            tuple(map(_pointer, losses)),
            want_terms,
            options,
        )
        if bad_label >= 0:
            *_, ignore_index, vocab_size, _ = options
            raise IndexError(ops.bad_label_message(labels, bad_label, ignore_index, vocab_size))
        return losses

    def distill_rows(student, teacher, labels, weights, num_items, terms, want_grad, *options):
        grad = ops.new_grad(student, want_grad)
        inputs = student, teacher, labels, weights, num_items
        return *compute(*inputs, grad if want_grad else None, terms, options), grad

    def distill_rows_(student, teacher, labels, weights, num_items, terms, *options):
        inputs = student, teacher, labels, weights, num_items
        return compute(*inputs, student, terms, options)

    def scale_rows_(grad, upstream, unscale, labels, weights, ignore_index, vocab_size):
        scale(
            _sizes(grad),
            _rows(grad),
            upstream.data_ptr(),
            upstream.numel() > 1,
            tuple(map(_pointer, (labels, weights, unscale))),
            ignore_index,
            vocab_size,
        )

    return dict(distill_rows=distill_rows, distill_rows_=distill_rows_, scale_rows_=scale_rows_)


if _C is not None:
    on_cpu = operators(
        lambda *args: _C.distill_rows_cpu(*args, torch.get_num_threads()),
        lambda *args: _C.scale_rows_cpu(*args, torch.get_num_threads()),
    )
    ops.register("native", "CPU", **on_cpu)
