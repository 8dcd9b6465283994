"""Labels out of range, reported by a GPU without anyone waiting for it: by the next call that sees
the report."""

import functools

import torch
from torch import Tensor


@functools.cache
def flag(device: torch.device) -> Tensor:
    """1 + a row whose label was out of range, written by the GPU: int64 (), page-locked."""
    with torch.inference_mode(False):  # it outlives the mode of the call that is the first
        return torch.zeros((), dtype=torch.int64, device="cpu", pin_memory=True)


def take(device: torch.device) -> int | None:
    """A row whose label a call on `device` has found out of range since this was last asked.

    Does not wait for the GPU: what it has still to compute is for whoever asks next. None if all is
    well.
    """
    row = int(flag(device)) - 1
    if row < 0:
        return None
    flag(device).zero_()
    return row


def raise_earlier(device: torch.device) -> Tensor:
    """IndexError for a label of an earlier call on `device`; else the flag for the next one."""
    row = take(device)
    if row is not None:
        raise IndexError(
            f"an earlier call on {device} had a label that is neither in [0, vocab_size) nor "
            f"ignore_index, at row {row}: loss and gradient of that row are NaN"
        )
    return flag(device)
