"""All logits of a row."""

import math
from typing import Any

import torch
from torch import Tensor

from ...files import Array
from ...source_rows import logit_chunks
from ...sources import LinearHead, Tail
from ..errors import Malformed
from . import checks, floats


class DenseKind:
    """All logits of a row, those of padded classes left out."""

    name = "dense"

    def __init__(self, vocab_size: int, dtype: str) -> None:
        self.vocab_size, self.dtype = vocab_size, dtype
        self.spec = f"dense:{dtype}"
        self.columns = floats.columns("logits", dtype, vocab_size)

    def describe(self) -> dict[str, Any]:
        return {"name": "dense", "dtype": self.dtype, "bound": floats.bound("logits", self.dtype)}

    def encode(self, prediction: Tensor | LinearHead, seed: int) -> dict[str, Array]:
        """Logits (n, V), or a `LinearHead` of n rows."""
        checks.one_of(prediction, torch.Tensor, LinearHead)
        checks.logits(prediction, self.vocab_size)
        if isinstance(prediction, LinearHead):
            chunks = [x.cpu() for _, x in logit_chunks(prediction, self.vocab_size)]
            prediction = torch.cat(chunks)
        logits = prediction[:, : self.vocab_size]
        floats.check("logits", logits, self.vocab_size, infinite=True)
        if (logits == -math.inf).all(-1).any():
            raise ValueError("logits must have a finite one in each row, got −inf only")
        return {"logits": floats.rounded("logits", logits, self.dtype)}

    def decode(self, columns: dict[str, Array]) -> dict[str, Tensor]:
        """{column: numbers of n rows} -> {"logits": (n, V)}, a float tensor"""
        bits = columns["logits"].reshape(-1, self.vocab_size)
        return {"logits": floats.tensor(bits, self.dtype)}

    def check(self, columns: dict[str, Array], decoded: dict[str, Tensor]) -> None:
        logits = decoded["logits"]
        if (logits.isnan() | (logits == math.inf)).any():
            raise Malformed("logits that are NaN or infinite")

    def source(
        self, decoded: dict[str, Tensor], tail: Tail | None = None, head: LinearHead | None = None
    ) -> Tensor:
        return decoded["logits"]

    padding = {"logits": 0}
