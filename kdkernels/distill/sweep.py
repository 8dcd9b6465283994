"""Which temperature, which alpha? A grid, or Optuna; the best by a number on held-out examples."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from . import checks


@dataclass(frozen=True)
class Trial:
    """One training."""

    options: dict[str, Any]  # temperature, alpha, ...
    score: float  # the smaller the better; NaN: it has none


def grid(train: Callable[..., float], /, **values: Iterable[Any]) -> list[Trial]:
    """Trains once for each combination -> `Trial`s, the best first.

    A training that fails, or whose score is NaN, stops none of the others: it is the last, and a
    warning says which and why.

    Args:
        train: called with options by name, returns the score of what it trained: the smaller the
            better, on examples that are not the test's.
        values: a list for each option: temperature=[1, 2, 4], alpha=[0.5, 0.9].

    Raises:
        ValueError: no options, or one without values.
        RuntimeError: every training failed.
    """
    if not values:
        raise ValueError("values must have an option to try, got none")
    values = {name: list(each) for name, each in values.items()}
    for name, each in values.items():
        if not each:
            raise ValueError(f"{name} must have values to try, got {each!r}")
    found = []
    for each in itertools.product(*values.values()):
        found.append(_try(train, dict(zip(values, each, strict=True))))
    return _ranked(found)


def search(
    train: Callable[..., float], trials: int, /, *, seed: int = 0, **ranges: tuple[float, float]
) -> list[Trial]:
    """The same where a grid is too large: Optuna's sampler TPE (Bergstra et al. 2011, "Algorithms
    for Hyper-Parameter Optimization", section 4), in `trials` trainings.

    Args:
        train: as in `grid`.
        trials: how many, at least 1.
        seed: of the sampler: with the same scores it tries the same options.
        ranges: (low, high) for each option; where low > 0 and high ≥ 10 · low, on a log scale.

    Raises:
        ImportError: optuna is missing (the extra `train`).
        ValueError, RuntimeError: as in `grid`; a range that is no two finite numbers, in order.
    """
    import optuna

    checks.integer("trials", trials, low=1)
    if not ranges:
        raise ValueError("ranges must have an option to try, got none")
    for name, each in ranges.items():
        pair = isinstance(each, (tuple, list)) and len(each) == 2
        if not (pair and -math.inf < each[0] <= each[1] < math.inf):
            raise ValueError(f"{name} must be (low, high), finite, got {each}")
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # or it says that it has begun
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    optuna.logging.set_verbosity(level)
    found = []
    for _ in range(trials):
        asked = study.ask()
        options = {
            name: asked.suggest_float(name, low, high, log=low > 0 and high >= 10 * low)
            for name, (low, high) in ranges.items()
        }
        found.append(_try(train, options))
        score = found[-1].score
        failed = optuna.trial.TrialState.FAIL if math.isnan(score) else None
        study.tell(asked, None if failed else score, state=failed)
    return _ranked(found)


def _try(train: Callable[..., float], options: dict[str, Any]) -> Trial:
    try:
        score = float(train(**options))
    except Exception as error:
        warnings.warn(f"the trial with {_text(options)} failed: {error!r}", stacklevel=3)
        return Trial(options, math.nan)
    if math.isnan(score):
        warnings.warn(f"the trial with {_text(options)} scored NaN: it comes last", stacklevel=3)
    return Trial(options, score)


def _ranked(trials: list[Trial]) -> list[Trial]:
    trials = sorted(trials, key=lambda trial: (math.isnan(trial.score), trial.score))
    if math.isnan(trials[0].score):
        raise RuntimeError(f"none of {len(trials)} trials has a score: see the warnings before")
    return trials


def _text(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
