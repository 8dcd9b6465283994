"""Lets the backend "triton" take CPU tensors: Triton's interpreter, fast enough for a test suite.

For tests only. Imported before anything that imports Triton's kernels, because they are made for
the interpreter or for a GPU when they are defined.
"""

import functools
import importlib.util
import os

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
INSTALLED = importlib.util.find_spec("triton") is not None


def _fma(a, b, c):
    """float32, rounded once; in Triton 3.6, whose interpreter has none, twice in a case of 2^29."""
    from triton.runtime.interpreter import _interpreter

    if hasattr(_interpreter, "fma_fp32"):
        return _interpreter.fma_fp32(*np.broadcast_arrays(a, b, c))
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def _fuse():
    """Fused multiply-adds are what error-free transformations are made of."""
    from triton.runtime import interpreter

    def create_fma(self, a, b, c):
        return interpreter.TensorHandle(_fma(a.data, b.data, c.data), c.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


if INSTALLED:
    _fuse()


def speed_up():
    """Of the interpreter's time most goes into types, shapes and patches, not into NumPy. Here
    float arithmetic goes to NumPy at once, and everything else the interpreter's way."""
    if not INSTALLED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    # It patches `triton.language` at each call of each function; once is enough, for each of the
    # modules that a function can know it by.
    @functools.cache
    def patch_for(modules, fn):
        patch(fn)
        if "tl" in modules:
            _shorten(tl, interpreter)

    @functools.cache
    def patch_once(fn):
        known = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        modules = ("tl",) if tl in known else ("core",)
        if modules not in patched:
            patched.add(modules)
            patch_for(modules, fn)
        return _Kept

    patched = set()
    interpreter._patch_lang = patch_once


class _Kept:
    """The scope of a patch that stays."""

    @staticmethod
    def restore():
        pass


def _shorten(tl, interpreter):
    """Replaces operators of `tl.tensor` and functions of `tl` by shorter ways to the same call of
    NumPy.

    Each takes tensors of one dtype and Python's numbers, and leaves everything else to the
    original.
    """
    handle_type, tensor_type = interpreter.TensorHandle, tl.tensor
    float32, int1 = tl.float32, tl.int1
    # By identity: not every type can be hashed, and none quickly.
    floats = {id(float32): np.float32}
    integers = {id(tl.int32): np.int32, id(tl.int64): np.int64}
    numbers = {**floats, **integers}
    logical = {id(int1): np.bool_, **integers}
    everything = {**floats, **logical}

    @functools.cache
    def template(dtype, shape):
        type = dtype if shape is None else tl.block_type(dtype, list(shape))
        return vars(tensor_type(None, type))

    def tensor(data, dtype, block):
        made = object.__new__(tensor_type)
        made.__dict__.update(template(dtype, data.shape if block else None))
        made.handle = object.__new__(handle_type)
        made.handle.__dict__.update(data=data, dtype=dtype, attr={})
        return made

    def parts_of(args, dtypes):
        """-> (dtype, whether one is a block, arrays and numbers), or None for the original."""
        dtype, block, data, python = None, False, [], False
        for x in args:
            if type(x) is tl.constexpr:
                x = x.value
            if type(x) is tensor_type:
                if dtype is not None and x.dtype is not dtype:
                    return None
                dtype = x.dtype
                block = block or x.type.is_block()
                data.append(x.handle.data)
            else:
                python = True
                data.append(x)
        convert = dtypes.get(id(dtype))
        if convert is None:
            return None
        if python:
            for i, x in enumerate(data):
                kind = type(x)
                if (
                    (kind is float and dtype is float32)
                    or (kind is bool and dtype is int1)
                    or (kind is int and dtype is not int1 and -(2**31) <= x < 2**31)
                ):
                    data[i] = convert(x)
                elif kind is not np.ndarray:
                    return None
        return dtype, block, data

    def shorter(original, compute, dtypes, result=None):
        def call(*args):
            parts = parts_of(args, dtypes)
            if parts is None:
                return original(*args)
            dtype, block, data = parts
            return tensor(compute(*data), result or dtype, block)

        return call

    def where(condition, x, y, original=tl.where):
        parts = parts_of((x, y), everything)
        if type(condition) is not tensor_type or condition.dtype is not int1 or parts is None:
            return original(condition, x, y)
        dtype, block, (a, b) = parts
        chosen = np.where(condition.handle.data, a, b)
        return tensor(chosen, dtype, block or condition.type.is_block())

    def over(axes, original):
        def call(x, axis=None, keep_dims=False):
            if x.dtype is not float32 or not x.type.is_block():
                return original(x, axis, keep_dims=keep_dims)
            data = axes(x.handle.data, axis=axis, keepdims=keep_dims)
            return tensor(np.atleast_1d(data), float32, axis is not None)

        return call

    def operator(name, compute, dtypes, result=None):
        for side, swapped in ((f"__{name}__", False), (f"__r{name}__", True)):
            if hasattr(tensor_type, side):
                function = (lambda b, a: compute(a, b)) if swapped else compute
                original = getattr(tensor_type, side)
                setattr(tensor_type, side, shorter(original, function, dtypes, result))

    for name, compute in dict(add=np.add, sub=np.subtract, mul=np.multiply).items():
        operator(name, compute, numbers)
    operator("lshift", np.left_shift, integers)
    operator("rshift", np.right_shift, integers)
    operator("neg", np.negative, numbers)
    operator("truediv", np.true_divide, floats)
    for name, compute in (("and", np.bitwise_and), ("or", np.bitwise_or), ("invert", np.invert)):
        operator(name, compute, logical)
    compare = dict(
        lt=np.less,
        le=np.less_equal,
        gt=np.greater,
        ge=np.greater_equal,
        eq=np.equal,
        ne=np.not_equal,
    )
    for name, compute in compare.items():
        operator(name, compute, numbers, int1)
    functions = dict(maximum=np.fmax, minimum=np.fmin, abs=np.abs, exp2=np.exp2, fma=_fma)
    for name, compute in functions.items():
        setattr(tl, name, shorter(getattr(tl, name), compute, floats))
    tl.where = where
    tl.sum = over(np.sum, tl.sum)
    tl.max = over(np.fmax.reduce, tl.max)
