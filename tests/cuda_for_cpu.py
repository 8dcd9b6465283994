"""The backends "cuda" and "cuda_triton": the compiled and the Triton operators on a GPU, for CPU
tensors, so that every test runs there.

For tests only, and only where torch sees a GPU. Tensors go there and come back with their whole
storages: strides, distance from 16 bytes and shared memory stay what they are.
"""

import torch

from kdkernels import ops
from kdkernels.backends import bad_labels
from kdkernels.backends.registry import BACKENDS, Backend

NAMES = {"cuda": "native", "cuda_triton": "triton"}
MAX_STORAGE = 2**30  # bytes; of larger ones only what the tensor takes up is moved


class Moved:
    """Tensors on the GPU, where those that share a storage still do."""

    def __init__(self):
        self.storages = {}

    def __call__(self, x):
        if isinstance(x, list):
            return [self(item) for item in x]
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


class Operators:
    """The operators of a backend, on the GPU."""

    def __init__(self, backend):
        self.backend = backend

    def compute(self, name, *args, raises=True):
        """-> (the operator's arguments there, its results here); raises for a bad label, or
        forgets it: of shards it is the caller who knows the label."""
        moved = Moved()
        there = [moved(arg) for arg in args]
        results = ops.get(name, self.backend)(*there)
        torch.cuda.synchronize()
        row = bad_labels.take(torch.device("cuda", torch.cuda.current_device()))
        if row is not None and raises:
            labels, (*_, ignore_index, vocab_size, _) = args[2], args
            raise IndexError(ops.bad_label_message(labels, row, ignore_index, vocab_size))
        if isinstance(results, torch.Tensor):
            return there, results.cpu()
        return there, results and tuple(x.cpu() for x in results)

    def distill_rows(self, *args):
        return self.compute("distill_rows", *args)[1]

    def distill_rows_(self, *args):
        there, losses = self.compute("distill_rows_", *args)
        args[5].copy_(there[5].cpu())
        return losses

    def scale_rows_(self, grad, *rest):
        (scaled, *_), _ = self.compute("scale_rows_", grad, *rest)
        grad.copy_(scaled.cpu())

    def shard_statistics(self, *args):
        return self.compute("shard_statistics", *args, raises=False)[1]

    def shard_terms(self, *args):
        return self.compute("shard_terms", *args, raises=False)[1]

    def shard_gradient_(self, *args):
        there, unscale = self.compute("shard_gradient_", *args, raises=False)
        args[6].copy_(there[6].cpu())
        return unscale


def register():
    """Adds the backends to those of the package, if there is a GPU that they can use."""
    for name, backend in NAMES.items():
        if BACKENDS[backend].unavailable("cuda"):
            continue
        operators = Operators(backend)
        ops.register(name, {"CPU": {op: getattr(operators, op) for op in ops.SCHEMAS}})
        BACKENDS[name] = Backend(
            name,
            lambda device_type: None if device_type == "cpu" else "it takes CPU tensors",
            takes_float64=False,
        )
