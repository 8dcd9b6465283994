"""A teacher's logits as NumPy arrays: never pickled, written atomically."""

import os

import numpy as np
import torch

from ..files import atomic


def save_logits(path, logits):
    """Writes logits (N, ..., V), any float dtype of NumPy's, as a .npy file.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic(path) as file:
        np.save(file, logits.detach().cpu().numpy(), allow_pickle=False)


def mapped_array(name, path):
    """The array of a .npy file, mapped; name: what it is called in errors.

    Raises:
        OSError: the file cannot be read.
        ValueError: no .npy file, or a pickled one.
    """
    # Mapped, so that a header which claims more than there is allocates nothing; NumPy parses a
    # damaged one with Python's own parser, and passes on whatever that or the dtype's finds.
    try:
        array = np.lib.format.open_memmap(path, mode="c")  # writable, which torch wants, in private
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{name} must be a .npy file, got {path}: {error}") from error
    if array.offset + array.nbytes != os.path.getsize(path):
        raise ValueError(f"{name} must be a .npy file, got {path} with more after the array")
    return array


def load_logits(path, shape):
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
