"""Huge pages for large tensors on a CPU that are about to be written for the first time."""

import ctypes
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2**21  # bytes
ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux
if ADVICE is not None:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def advise_huge(x: Tensor) -> Tensor:
    """`x`, contiguous, whose memory the system is asked to make of huge pages, where it can.

    Memory of this size comes fresh from the system, and faulting it in page by page costs as much
    as computing what is written to it.
    """
    # Tensors of a compiler and of FakeTensorMode have no memory.
    real = type(x) is torch.Tensor and not torch.compiler.is_compiling()
    if ADVICE is not None and real and x.device.type == "cpu":
        first = -(x.data_ptr() // -HUGE_PAGE) * HUGE_PAGE
        end = (x.data_ptr() + x.nbytes) // HUGE_PAGE * HUGE_PAGE
        if first < end:
            madvise(first, end - first, ADVICE)
    return x
