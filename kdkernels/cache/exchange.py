"""Predictions of other programs: JSON lines of log-probabilities, and NumPy's arrays of logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import atomic, begin_array, mapped_array
from ..sources import TopK
from .errors import CacheError
from .reader import TeacherCache
from .samples import Samples
from .writer import Teacher, Writer


def import_jsonl(
    path: Path | str,
    file: Path | str,
    kind: str,
    *,
    vocab_size: int,
    teacher: Teacher,
    **options: Any,
) -> None:
    """Log-probabilities that a server gave for texts -> a cache of kind topk.

    A line is a sample: a JSON object of one of these forms, and whatever else is in it.

        {"prompt_token_ids": [n ids], "prompt_logprobs": [null, {"id": {"logprob": x}, ...}, ...]}
        {"token_ids": [n ids], "ids": [n lists of ids], "logprobs": [n lists of numbers]}

    The first is vLLM's: its number i is of token i, given those before it, and there is none of
    what comes after the last. A server may add the token itself to the K most probable: K + 1 in
    all. In the second, number i is of what comes after token i, as everywhere in kdkernels.

    Args:
        path: the directory of the cache.
        file: path of the lines.
        kind: "topk:K", K being the most that a line has.
        vocab_size, teacher, options: as in `Writer`.

    Raises:
        OSError: the file cannot be read.
        ValueError, IndexError: a line that is none of these; the text says which.
        TypeError, CacheError: as `Writer`.
    """
    with Writer(path, kind, vocab_size=vocab_size, teacher=teacher, **options) as writer:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    writer.add(*_sample(json.loads(line)))
                except CacheError:
                    raise
                except IndexError as error:
                    raise IndexError(f"{file}, line {number}: {error}") from error
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise ValueError(f"{file}, line {number}: {error!r:.300}") from error


def import_npy(
    path: Path | str,
    file: Path | str,
    inputs: Any,
    kind: str = "dense:fp32",
    *,
    teacher: Teacher,
    **options: Any,
) -> None:
    """Logits of a .npy file, in the order of their inputs -> a cache that finds them by the inputs.

    Args:
        path: the directory of the cache.
        file: a .npy file, floating point: (N, V), or (N, L, V) for token ids.
        inputs: what they are of, in the same order: token ids (N, L), or, for (N, V), a tensor
            (N, ...) of any dtype.
        kind: "dense:fp32", or any other that can be made of logits.
        teacher, options: as in `Writer`; vocab_size is V unless given.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no .npy file of logits for these inputs.
        TypeError, CacheError: as `Writer`.
    """
    logits = mapped_array("file", file)
    inputs = torch.as_tensor(inputs)
    tokens = logits.ndim == 3
    leading = tuple(inputs.shape) if tokens else (len(inputs),)
    if not np.issubdtype(logits.dtype, np.floating) or logits.shape[:-1] != leading:
        raise ValueError(
            f"file must have floating point logits (N, V) or (N, L, V) of the inputs "
            f"{tuple(inputs.shape)}, got {logits.dtype} of shape {logits.shape}"
        )
    options = {
        "vocab_size": logits.shape[-1],
        "sample": "tokens" if tokens else "values",
        **options,
    }
    with Writer(path, kind, teacher=teacher, **options) as writer:
        for ids, rows in zip(inputs, logits, strict=True):
            writer.add(ids, torch.from_numpy(np.atleast_2d(rows)))


def export_npy(file: Path | str, cache: TeacherCache, inputs: Samples) -> None:
    """Logits of a cache of kind dense -> a .npy file (N, V) or (N, L, V), float32 or float16.

    Args:
        file: the path to write to.
        cache: a `TeacherCache`.
        inputs: the samples, in the order that the rows are to have: as `TeacherCache.read` takes
            them, all of one length.

    Raises:
        CacheMissError: one of the inputs is not in the cache.
        ValueError: a cache of another kind.
        OSError: the file cannot be written.
    """
    if cache.kind.name != "dense":
        raise ValueError(f"cache must be of kind dense, got {cache.kind.spec}")
    if not len(inputs):
        raise ValueError("inputs must have a sample at least, got none")
    with atomic(file) as out:
        for k in range(len(inputs)):
            found: Any = cache[inputs[k : k + 1]]
            logits = found[0].cpu()
            array = logits.float().numpy() if logits.dtype == torch.bfloat16 else logits.numpy()
            if not k:
                first = array.shape
                begin_array(out, array.dtype, (len(inputs), *first))
            if array.shape != first:
                raise ValueError(
                    f"inputs must all have one length, got {first[0]} and {len(array)}"
                )
            out.write(np.ascontiguousarray(array).data)


def _sample(line: Any) -> tuple[torch.Tensor, TopK]:
    """-> token ids (n,), `TopK` of n rows"""
    if "prompt_logprobs" in line:
        tokens = line["prompt_token_ids"]
        if line["prompt_logprobs"][:1] != [None]:
            raise ValueError("prompt_logprobs must begin with null, of the first token")
        rows = [_pairs(each) for each in [*line["prompt_logprobs"][1:], None]]
    else:
        tokens = line["token_ids"]
        rows = [(list(x), list(y)) for x, y in zip(line["ids"], line["logprobs"], strict=True)]
    if any(len(ids) != len(logprobs) for ids, logprobs in rows):
        raise ValueError("ids and logprobs must be as many")
    most = max([1, *(len(ids) for ids, _ in rows)])
    ids = torch.tensor([x + [-1] * (most - len(x)) for x, _ in rows]).view(-1, most)
    logprobs = [y + [0.0] * (most - len(y)) for _, y in rows]
    return torch.tensor(tokens), TopK(ids, torch.tensor(logprobs, dtype=torch.float64))


def _pairs(entries: Any) -> tuple[list[int], list[float]]:
    """{"id": {"logprob": x}, ...} or {"id": x, ...} -> [ids], [log-probabilities]"""
    entries = entries or {}
    values = [x["logprob"] if isinstance(x, dict) else x for x in entries.values()]
    return [int(key) for key in entries], [float(x) for x in values]
