"""quack-kernels 0.6.5: cross-entropy in CuTe, for GPUs from Hopper on. No distillation.

A yardstick of how fast one matrix of logits can be read once and its gradient written, and of what
a head costs without a teacher.
"""

import torch

from . import base
from .base import Lacks, Missing, Variant, imported


def on_hopper(case):
    base.on_gpu(case)
    if torch.cuda.get_device_capability() < (9, 0):
        raise Missing("needs compute capability 9.0")


def dense(case):
    base.cross_entropy_alone(case)
    on_hopper(case)
    (cross_entropy,) = imported("quack.cross_entropy", "cross_entropy")
    return lambda x: cross_entropy(x.student, x.labels)


def linear(case):
    """Its products are of 16 bits, and their rows 16 bytes."""
    base.cross_entropy_alone(case)
    if case.dtype == "float32":
        raise Lacks("float32")
    if case.rows % 8 or case.hidden % 8 or case.vocab % 8:
        raise Lacks("sizes that are no multiple of 8")
    on_hopper(case)
    (cross_entropy,) = imported("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda x: cross_entropy(x.hidden, x.weight, x.labels)


VARIANTS = {
    "dense": {"quack-ce": Variant("quack CE", dense, "float32", compiled=True)},
    "linear": {"quack-ce": Variant("quack linear CE", linear, "own", compiled=True)},
}
