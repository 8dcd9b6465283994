"""What a sample is, and its key: of its content alone, whatever its place in data or a batch."""

import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..files import Array
from .errors import Malformed
from .sections import Column

KEY = 16  # bytes

Integers: TypeAlias = Tensor | Array | Sequence[int]  # a sample, or a batch of one length
Samples: TypeAlias = Integers | Sequence[Integers]
Content = tuple[int, bytes, dict[str, Array]]  # rows, bytes, {column: array}


class Tokens:
    """A sequence of token ids, with a prediction for each of them."""

    columns = (Column("tokens", "<u4", 4),)

    @staticmethod
    def content(ids: Any) -> Content:
        """(n,) of any integer dtype -> (rows, bytes, {column: array})"""
        ids = as_integers("ids", ids)
        if ids.ndim != 1 or not ids.size:
            raise ValueError(f"ids must be (n,) with n ≥ 1, got shape {ids.shape}")
        found = ids.astype("<u4")
        if (found != ids).any():
            raise ValueError(f"ids must be in [0, 2³²), got {ids.min()} to {ids.max()}")
        return len(found), found.tobytes(), {"tokens": found}


class Values:
    """Any other tensor, an image say, with one prediction; what is stored of it is its SHA-256."""

    columns = (Column("digest", "<u1", 1, times=32),)

    @staticmethod
    def content(x: Any) -> Content:
        """A tensor of any shape -> (1, bytes, {column: array})"""
        x = torch.as_tensor(x).detach().cpu().contiguous()
        head = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}\n".encode()
        digest = hashlib.sha256(head)
        digest.update(x.reshape(-1).view(torch.uint8).numpy())
        return 1, digest.digest(), {"digest": np.frombuffer(digest.digest(), np.uint8)}


KINDS: dict[str, type[Tokens] | type[Values]] = {"tokens": Tokens, "values": Values}


def kind_of(name: str) -> type[Tokens] | type[Values]:
    if name not in KINDS:
        raise Malformed(f"sample must be one of {', '.join(KINDS)}, got {name!r}")
    return KINDS[name]


def key(salt: bytes, content: bytes) -> bytes:
    """salt: bytes that stand for the teacher."""
    return hashlib.sha256(salt + content).digest()[:KEY]


def as_integers(name: str, x: Any) -> Array:
    """A tensor, an array or a list -> an array of integers."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().numpy()
    array = np.asarray(x)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    return array
