"""A teacher's predictions in a file: made once, read as often as students are trained.

    teacher.npy           logits (N, ..., V): float32, float16 or float64
    teacher.safetensors   "logits" (N, ..., V), any float dtype; or, for the K most probable classes
                          of each row, "ids" int32 and "logprobs" (N, ..., K), at T = 1

Files are written atomically and read through a map: only the rows that a batch asks for are loaded.
"""

from pathlib import Path

import numpy as np
import torch

from ..files import atomic, mapped_array
from ..source_rows import logit_chunks
from ..sources import TopK
from . import batches, checks
from .predictions import inference, predict_with

TAILS = ("bucket", "renormalize")


class StoredTopK:
    """The K most probable classes of each input's rows, as a teacher of `Distiller`.

    Args:
        ids: (N, ..., K), an integer dtype, −1 pads.
        logprobs: (N, ..., K), at T = 1.
        tail: as in `TopK`.
    """

    def __init__(self, ids, logprobs, tail="bucket"):
        self.ids, self.logprobs, self.tail = ids, logprobs, tail

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, rows):
        """rows (B,) int64 -> `TopK` (B, ..., K)."""
        rows = torch.as_tensor(rows)
        return TopK(self.ids[rows], self.logprobs[rows], self.tail)


def write_predictions(
    path, teacher, inputs, *, topk=None, vocab_size=None, batch_size=256, dtype=None
):
    """Writes what a teacher predicts for all inputs, in their order.

    A .npy file is written as the predictions come; those of a .safetensors file are in memory until
    the last is there.

    Args:
        path: the file: .npy for logits, .safetensors for logits or the K most probable classes.
        teacher: a module that maps a batch (B, ...) to logits (B, ..., V), a `LinearHead`, or an
            object that has `logits`.
        inputs: (N, ...), or a map-style `Dataset` as in `Distiller`; labels are not used.
        topk: None for all logits, or K in [1, V].
        vocab_size: as in `kd_loss`: columns from there on are padding, and not written.
        batch_size: inputs per call of the teacher.
        dtype: of logits or log-probabilities: None for that of the teacher's logits, and, where
            they are a head's or log-probabilities, for at least float32.

    Raises:
        TypeError, ValueError: arguments other than listed, inputs whose predictions differ in
            shape.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"path must end in .npy or .safetensors, got {path}")
    if topk is not None:
        checks.integer("topk", topk, low=1)
        if path.suffix == ".npy":
            raise ValueError(f"path must end in .safetensors for topk={topk}, got {path}")
    checks.instance("teacher", teacher, torch.nn.Module, "a torch.nn.Module")
    checks.data(inputs, None)
    checks.integer("batch_size", batch_size, low=1)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a float dtype, got {dtype}")
    source = batches.of(inputs, None, 0)
    device = next((x.device for x in teacher.parameters()), torch.device("cpu"))

    def predictions():
        with inference(teacher):
            for batch in source.batches(iter(torch.arange(len(source)).split(batch_size))):
                prediction = predict_with(teacher, batch.to(device).inputs)
                if topk is None:
                    yield batch.rows, _logits(prediction, vocab_size, dtype)
                else:
                    yield batch.rows, most_probable(prediction, topk, vocab_size, dtype)

    write = _write_array if path.suffix == ".npy" else _write_tensors
    with atomic(path) as file:
        write(file, _of_one_shape(predictions()), len(source))


def open_predictions(path, count=None, tail="bucket"):
    """What `write_predictions`, or any other program, wrote: a teacher of `Distiller`.

    Args:
        path: a .npy file of logits, or a .safetensors file of "logits" or "ids" and "logprobs".
        count: None, or N, how many inputs it must be for.
        tail: of the classes beyond the K most probable, as in `TopK`.

    Returns:
        The logits (N, ..., V), a tensor, or `StoredTopK`; both mapped, and not to be written to.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, damaged, or not for `count` inputs.
    """
    path = Path(path)
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    if path.suffix == ".npy":
        found = torch.from_numpy(mapped_array("teacher predictions", path))
        _check(path, {"logits": found}, count)
        return found
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .npy or .safetensors, got {path}")
    tensors = _tensors(path)
    if "logits" in tensors:
        _check(path, {"logits": tensors["logits"]}, count)
        return tensors["logits"]
    if not {"ids", "logprobs"} <= tensors.keys():
        raise ValueError(
            f'{path} must have "logits", or "ids" and "logprobs", it has '
            f"{', '.join(sorted(tensors)) or 'nothing'}"
        )
    ids, logprobs = tensors["ids"], tensors["logprobs"]
    _check(path, {"logprobs": logprobs}, count)
    if ids.dtype.is_floating_point or ids.shape != logprobs.shape:
        raise ValueError(
            f"ids in {path} must be integers of the shape of logprobs, {tuple(logprobs.shape)}, "
            f"got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    return StoredTopK(ids, logprobs, tail)


def _of_one_shape(predictions):
    """(rows (B,), {name: (B, ...)}) of every batch, checked against the first."""
    first = None
    for rows, found in predictions:
        shapes = [tuple(x.shape[1:]) for x in found.values()]
        first = first or shapes
        if shapes != first:
            raise ValueError(
                f"inputs must all have predictions of shape {first[0]}, got {shapes[0]} from row "
                f"{rows[0]} on"
            )
        yield rows, found


def _write_array(file, predictions, count):
    """Logits of `count` inputs as a .npy file."""
    for rows, found in predictions:
        logits = found["logits"]
        if logits.dtype == torch.bfloat16:
            raise ValueError("path must end in .safetensors for bfloat16, which NumPy has not")
        array = logits.contiguous().numpy()
        if not rows[0]:
            header = {
                "descr": np.lib.format.dtype_to_descr(array.dtype),
                "fortran_order": False,
                "shape": (count, *array.shape[1:]),
            }
            np.lib.format.write_array_header_2_0(file, header)
        file.write(array.data)


def _write_tensors(file, predictions, count):
    """Tensors by name, of `count` inputs, as a .safetensors file."""
    from safetensors.torch import save_file

    tensors = {}
    for rows, found in predictions:
        for name, x in found.items():
            if name not in tensors:
                tensors[name] = x.new_empty((count, *x.shape[1:]))
            tensors[name][rows] = x
    save_file(tensors, file.name)


def _logits(prediction, vocab_size, dtype):
    if not isinstance(prediction, torch.Tensor):
        chunks = [logits.to("cpu", dtype) for _, logits in logit_chunks(prediction, vocab_size)]
        return {"logits": torch.cat(chunks).view(*prediction.hidden.shape[:-1], -1)}
    return {"logits": prediction[..., :vocab_size].to("cpu", dtype or prediction.dtype)}


def most_probable(prediction, k, vocab_size=None, dtype=None):
    """Of the rows of logits or a `LinearHead` (..., V), the most probable classes, in that order.

    Returns:
        {"ids": int32, "logprobs": dtype, or at least float32}, each (..., k), on the CPU.

    Raises:
        ValueError: k is more than there are classes.
    """
    ids, logprobs = [], []
    for _, logits in logit_chunks(prediction, vocab_size):
        if k > logits.shape[-1]:
            raise ValueError(f"topk must be in [1, {logits.shape[-1]}], got {k}")
        top, which = logits.topk(k, -1)  # (n, k)
        logprobs.append((top - logits.logsumexp(-1, keepdim=True)).to("cpu", dtype))
        ids.append(which.int().cpu())
    rows = prediction if isinstance(prediction, torch.Tensor) else prediction.hidden
    shape = *rows.shape[:-1], k
    return {"ids": torch.cat(ids).view(shape), "logprobs": torch.cat(logprobs).view(shape)}


def _tensors(path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except SafetensorError as error:
        raise ValueError(f"{path} must be a .safetensors file: {error}") from error


def _check(path, named, count):
    ((name, x),) = named.items()
    if not x.is_floating_point() or x.dim() < 2 or not len(x):
        raise ValueError(
            f"{name} in {path} must be floating point of shape (N, ..., classes), got {x.dtype} of "
            f"shape {tuple(x.shape)}"
        )
    if count is not None and len(x) != count:
        raise ValueError(f"{name} in {path} must be of {count} inputs, got {len(x)}")
