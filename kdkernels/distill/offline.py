"""A teacher's logits in a file, in the order of the inputs: images, or whatever a model takes.

    teacher.npy           logits (N, ..., V): float32, float16 or float64
    teacher.safetensors   "logits" (N, ..., V), any float dtype

Files are written atomically and read through a map: only the rows that a batch asks for are loaded.
Of language models `kdkernels.cache` keeps less, and finds it by the tokens.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..files import atomic, begin_array, mapped_array
from ..source_rows import logit_chunks
from ..sources import LinearHead
from . import batches, checks
from .predictions import inference, predict_with


def write_predictions(
    path: Path | str,
    teacher: torch.nn.Module,
    inputs: batches.Inputs,
    *,
    vocab_size: int | None = None,
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes what a teacher predicts for all inputs, in their order.

    A .npy file is written as the predictions come; those of a .safetensors file are in memory until
    the last is there.

    Args:
        path: the file, .npy or .safetensors.
        teacher: a module that maps a batch (B, ...) to logits (B, ..., V), a `LinearHead`, or an
            object that has `logits`.
        inputs: (N, ...), or a map-style `Dataset` as in `Distiller`; labels are not used.
        vocab_size: as in `kd_loss`: columns from there on are padding, and not written.
        batch_size: inputs per call of the teacher.
        dtype: None for that of the teacher's logits, and, where they are a head's, for at least
            float32.

    Raises:
        TypeError, ValueError: arguments other than listed, inputs whose predictions differ in
            shape.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"path must end in .npy or .safetensors, got {path}")
    checks.instance("teacher", teacher, torch.nn.Module, "a torch.nn.Module")
    checks.data(inputs, None)
    checks.integer("batch_size", batch_size, low=1)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a float dtype, got {dtype}")
    source = batches.of(inputs, None, 0)
    device = next((x.device for x in teacher.parameters()), torch.device("cpu"))

    def predictions() -> Iterator[tuple[Tensor, Tensor]]:
        with inference(teacher):
            for batch in source.batches(iter(torch.arange(len(source)).split(batch_size))):
                prediction = predict_with(teacher, batch.to(device).inputs)
                yield batch.rows, _logits(prediction, vocab_size, dtype)

    write = _write_array if path.suffix == ".npy" else _write_tensor
    with atomic(path) as file:
        write(file, _of_one_shape(predictions()), len(source))


def open_predictions(path: Path | str, count: int | None = None) -> Tensor:
    """What `write_predictions`, or any other program, wrote: a teacher of `Distiller`.

    Args:
        path: a .npy file of logits, or a .safetensors file of "logits".
        count: None, or N, how many inputs it must be for.

    Returns:
        The logits (N, ..., V), a tensor, mapped, and not to be written to.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, damaged, or not for `count` inputs.
    """
    path = Path(path)
    if path.suffix == ".npy":
        found = torch.from_numpy(mapped_array("teacher predictions", path))
    elif path.suffix == ".safetensors":
        found = _tensor(path)
    else:
        raise ValueError(f"path must end in .npy or .safetensors, got {path}")
    if not found.is_floating_point() or found.dim() < 2 or not len(found):
        raise ValueError(
            f"logits in {path} must be floating point of shape (N, ..., classes), got "
            f"{found.dtype} of shape {tuple(found.shape)}"
        )
    if count is not None and len(found) != count:
        raise ValueError(f"logits in {path} must be of {count} inputs, got {len(found)}")
    return found


def _of_one_shape(predictions: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows (B,), logits (B, ..., V)) of every batch, checked against the first."""
    first = None
    for rows, logits in predictions:
        first = first or logits.shape[1:]
        if logits.shape[1:] != first:
            raise ValueError(
                f"inputs must all have predictions of shape {tuple(first)}, got "
                f"{tuple(logits.shape[1:])} from row {rows[0]} on"
            )
        yield rows, logits


def _write_array(file: IO[bytes], predictions: Iterable[tuple[Tensor, Tensor]], count: int) -> None:
    """Logits of `count` inputs as a .npy file."""
    for rows, logits in predictions:
        if logits.dtype == torch.bfloat16:
            raise ValueError("path must end in .safetensors for bfloat16, which NumPy has not")
        array = logits.contiguous().numpy()
        if not rows[0]:
            begin_array(file, array.dtype, (count, *array.shape[1:]))
        file.write(array.data)


def _write_tensor(
    file: IO[bytes], predictions: Iterable[tuple[Tensor, Tensor]], count: int
) -> None:
    """Logits of `count` inputs as a .safetensors file."""
    from safetensors.torch import save_file

    found: Any = None
    for rows, logits in predictions:
        if found is None:
            found = logits.new_empty((count, *logits.shape[1:]))
        found[rows] = logits
    save_file({"logits": found}, file.name)


def _logits(
    prediction: Tensor | LinearHead, vocab_size: int | None, dtype: torch.dtype | None
) -> Tensor:
    if not isinstance(prediction, torch.Tensor):
        chunks = [logits.to("cpu", dtype) for _, logits in logit_chunks(prediction, vocab_size)]
        return torch.cat(chunks).view(*prediction.hidden.shape[:-1], -1)
    return prediction[..., :vocab_size].to("cpu", dtype or prediction.dtype)


def _tensor(path: Path) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if "logits" in names:
                found: Tensor = file.get_tensor("logits")
                return found
    except OSError:
        raise
    except SafetensorError as error:
        raise ValueError(f"{path} must be a .safetensors file: {error}") from error
    raise ValueError(f'{path} must have "logits", it has {", ".join(names) or "nothing"}')
