"""What a training remembers of itself: its learning curves, and sums since their last point."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .evaluation import Evaluation
from .validation import Scores

KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Evaluation, Scores)}


@dataclass
class History:
    """What `Distiller.train` recorded, one entry per recording: the learning curves."""

    steps: list[int] = field(default_factory=list)  # optimiser steps taken so far
    losses: list[float] = field(default_factory=list)  # mean training loss since the last entry
    # Means like `losses` of what it is made of, where that is more than one thing: "distill" and
    # "hard", unweighted, "hints", weighted; and the "learning_rate" of the step.
    terms: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[Evaluation | Scores] = field(
        default_factory=list
    )  # `Evaluation` or `Scores`; empty without test
    # (step, [(row of the data set, position in it ...), ...]) of steps that were not taken
    skipped: list[tuple[int, list[tuple[int, ...]]]] = field(default_factory=list)
    stopped_early: bool = False

    def state(self) -> dict[str, Any]:
        """As `Checkpoints` can hold it."""
        evaluations = [[type(each).__name__, asdict(each)] for each in self.evaluations]
        return {**vars(self), "evaluations": evaluations}

    @classmethod
    def of(cls, state: dict[str, Any]) -> History:
        evaluations = [KINDS[name](**values) for name, values in state["evaluations"]]
        return cls(**{**state, "evaluations": evaluations})


class Meter:
    """Sums over the steps since the last recording, left on their device."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.totals: dict[str, Any] = {}
        self.rows: int | Tensor = 0
        self.count, self.started = 0, time.perf_counter()

    def add(self, terms: Mapping[str, Tensor] | None, rows: int | Tensor) -> None:
        """terms: {name: ()} of a step, or None; rows: predictions that counted, an int or ()."""
        self.rows = self.rows + rows
        if terms is not None:
            self.totals = {name: self.totals.get(name, 0.0) + x for name, x in terms.items()}
            self.count += 1

    def read(self, engine: Any) -> tuple[dict[str, float], float]:
        """-> ({name: mean over the steps}, rows per second), over all processes.

        Without a step the loss is NaN.
        """
        seconds = time.perf_counter() - self.started
        every = *self.totals.values(), self.rows
        sums = torch.stack([torch.as_tensor(x, device=engine.device).double() for x in every])
        *totals, rows = engine.reduce(sums).tolist()
        steps = self.count * engine.num_processes
        means = {k: x / steps for k, x in zip(self.totals, totals, strict=True)}
        return means or {"loss": math.nan}, rows / seconds

    def state(self) -> dict[str, Any]:
        totals = {name: torch.as_tensor(x).cpu() for name, x in self.totals.items()}
        return {"totals": totals, "count": self.count}

    @staticmethod
    def mean(states: list[dict[str, Any]]) -> dict[str, Any]:
        """The states of all processes -> that of each, where they are another number."""
        totals = {
            name: torch.stack([each["totals"][name] for each in states]).mean(0)
            for name in states[0]["totals"]
        }
        return {**states[0], "totals": totals}

    def restore(self, state: dict[str, Any]) -> None:
        self.reset()
        self.totals, self.count = state["totals"], state["count"]
