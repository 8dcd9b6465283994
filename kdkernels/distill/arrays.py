"""A teacher's logits as NumPy arrays: never pickled, written atomically."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..files import atomic, mapped_array


def save_logits(path: Path | str, logits: torch.Tensor) -> None:
    """Writes logits (N, ..., V), any float dtype of NumPy's, as a .npy file.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic(path) as file:
        np.save(file, logits.detach().cpu().numpy(), allow_pickle=False)


def load_logits(path: Path | str, shape: Sequence[int]) -> torch.Tensor:
    """Reads a teacher's logits from a .npy file -> float32 tensor of `shape`.

    Raises:
        OSError: the file cannot be read.
        ValueError: no .npy file or a pickled one, not floating point, another shape, or numbers
            that are not finite in float32.
    """
    array = mapped_array("teacher_logits", path)
    if array.shape != tuple(shape) or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"teacher_logits must be floating point of shape {tuple(shape)}, a row of logits for "
            f"each training example, got {array.dtype} of shape {array.shape} in {path}"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is reported below
        logits = torch.from_numpy(array.astype(np.float32))
    wrong = int((~torch.isfinite(logits)).sum())
    if wrong:
        raise ValueError(
            f"teacher_logits must be finite in float32, got {wrong} numbers that are not in {path}"
        )
    return logits
