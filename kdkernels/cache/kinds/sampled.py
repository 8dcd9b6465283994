"""Classes drawn from the teacher."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...files import Array
from ...source_rows import logit_chunks
from ...sources import LinearHead, Sampled, Tail
from ..errors import Malformed
from ..sections import Column
from . import checks, entries


class SampledKind:
    """Classes drawn from the teacher, N times a row, and how often each: exact."""

    name = "sampled"

    def __init__(self, vocab_size: int, draws: int) -> None:
        self.vocab_size, self.draws = vocab_size, draws
        self.spec = f"sampled:{draws}"
        self.columns = (
            Column("counts", "<u2", 2),
            Column("gaps", "<u4", entries.width_of(vocab_size - 1), "entry"),
            Column("draws", "<u2", entries.width_of(draws - 1), "entry"),
        )

    def describe(self) -> dict[str, Any]:
        return {"name": "sampled", "draws": self.draws, "bound": {"counts": {"absolute": 0}}}

    def encode(self, prediction: Sampled | Tensor | LinearHead, seed: int) -> dict[str, Array]:
        """`Sampled`, or logits or a `LinearHead` that are drawn from: n rows; seed: below 2⁶⁴."""
        checks.one_of(prediction, Sampled, torch.Tensor, LinearHead)
        if not isinstance(prediction, Sampled):
            checks.logits(prediction, self.vocab_size)
            prediction = self.draw(prediction, seed)
        ids = entries.ids_of("ids", prediction.ids, self.vocab_size)  # (n, k)
        draws = prediction.counts.detach().cpu().double().numpy()
        if draws.shape != ids.shape:
            raise ValueError(f"counts must be {ids.shape}, as ids, got {draws.shape}")
        kept = (ids >= 0) & (draws != 0)
        if not (draws == np.floor(draws))[kept].all() or (draws < 0)[kept].any():
            raise ValueError("counts must be whole numbers and not negative")
        rows = len(ids)
        row, ids, draws = entries.in_order(kept, ids, draws)
        first = np.flatnonzero(entries.gaps_of(row, ids) >= 0)
        row, ids = row[first], ids[first]
        draws = np.add.reduceat(draws, first).astype(np.int64) if len(first) else draws[:0]
        sums = np.bincount(row, draws, rows)
        if not np.isin(sums, (0, self.draws)).all():
            wrong = sums[~np.isin(sums, (0, self.draws))][0]
            raise ValueError(f"counts of a row must sum to {self.draws}, got {wrong:g}")
        counts = np.bincount(row, minlength=rows)
        return {"counts": counts, "gaps": entries.gaps_of(row, ids), "draws": draws - 1}

    def decode(self, columns: dict[str, Array]) -> dict[str, Array]:
        """{column: numbers of n rows} -> {"ids": (n, k), "counts": (n, k) int32}"""
        counts = columns["counts"]
        here = entries.grid_of(counts)
        ids = entries.ids_from(here(columns["gaps"], 0), counts, self.vocab_size)
        draws = here(columns["draws"], 0).astype(np.int32)
        draws += 1
        entries.blank(counts, ids, draws)
        return {"ids": ids, "counts": draws}

    def check(self, columns: dict[str, Array], decoded: dict[str, Array]) -> None:
        if not np.isin(decoded["counts"].sum(1), (0, self.draws)).all():
            raise Malformed(f"counts of a row that do not sum to {self.draws}")

    def source(
        self, decoded: dict[str, Tensor], tail: Tail | None = None, head: LinearHead | None = None
    ) -> Sampled:
        return Sampled(decoded["ids"], decoded["counts"])

    padding = {"ids": -1, "counts": 0}

    def draw(self, prediction: Tensor | LinearHead, seed: int) -> Sampled:
        """Draws of rows of logits or a `LinearHead` -> `Sampled`, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for _, logits in logit_chunks(prediction, self.vocab_size):
            # In float64: a sum of 100,000 probabilities in float32 favours some classes.
            sums = logits.double().softmax(-1).cumsum(-1)
            if not sums[:, -1].isfinite().all():
                raise ValueError("teacher's predictions must be finite or −inf, got NaN or +inf")
            shape = len(sums), self.draws
            # Of the CPU, so that it is the same whatever the teacher runs on.
            uniform = torch.rand(shape, dtype=torch.float64, generator=generator)
            uniform = uniform.to(sums.device) * sums[:, -1:]
            drawn = torch.searchsorted(sums, uniform, right=True)
            found.append(drawn.clamp_(max=sums.shape[-1] - 1).cpu())
        ids = torch.cat(found)
        return Sampled(ids, torch.ones_like(ids))
