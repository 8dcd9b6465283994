"""The backend "cuda": the compiled CUDA operators for CPU tensors, so that every test runs there.

For tests only, and only where torch sees a GPU. Tensors go there and come back with their whole
storages: strides, distance from 16 bytes and shared memory stay what they are.
"""

import torch

from kdkernels import ops
from kdkernels.backends import bad_labels, native
from kdkernels.backends.registry import BACKENDS, Backend

NAME = "cuda"
MAX_STORAGE = 2**30  # bytes; of larger ones only what the tensor takes up is moved


class Moved:
    """Tensors on the GPU, where those that share a storage still do."""

    def __init__(self):
        self.storages = {}

    def __call__(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        storage = x.untyped_storage()
        whole = storage.nbytes() <= MAX_STORAGE
        if storage.data_ptr() not in self.storages:
            there = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cuda")
            if whole:
                there.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
            self.storages[storage.data_ptr()] = there.untyped_storage()
        moved = torch.empty(0, dtype=x.dtype, device="cuda")
        moved.set_(self.storages[storage.data_ptr()], x.storage_offset(), x.shape, x.stride())
        return moved if whole else moved.copy_(x)


def _compute(name, *args):
    """The operator on the GPU -> (its arguments there, its results here)."""
    moved = Moved()
    there = [moved(arg) for arg in args]
    results = ops.get(name, "native")(*there)
    torch.cuda.synchronize()
    row = bad_labels.take(torch.device("cuda", torch.cuda.current_device()))
    if row is not None:
        labels, (*_, ignore_index, vocab_size, _) = args[2], args
        raise IndexError(ops.bad_label_message(labels, row, ignore_index, vocab_size))
    return there, results and tuple(x.cpu() for x in results)


def _distill_rows(*args):
    return _compute("distill_rows", *args)[1]


def _distill_rows_(student, *rest):
    (grad, *_), losses = _compute("distill_rows_", student, *rest)
    student.copy_(grad.cpu())
    return losses


def _scale_rows_(grad, *rest):
    (scaled, *_), _ = _compute("scale_rows_", grad, *rest)
    grad.copy_(scaled.cpu())


def register():
    """Adds the backend to those of the package, if there is a GPU that it can use."""
    if native.unavailable("cuda"):
        return
    kernels = {
        "distill_rows": _distill_rows,
        "distill_rows_": _distill_rows_,
        "scale_rows_": _scale_rows_,
    }
    ops.register(NAME, {"CPU": kernels})
    BACKENDS[NAME] = Backend(
        NAME,
        lambda device_type: None if device_type == "cpu" else "it takes CPU tensors",
        takes_float64=False,
    )
