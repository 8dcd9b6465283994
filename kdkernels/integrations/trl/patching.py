"""The losses of this package in TRL's place, and the way back."""

import importlib
import inspect
import warnings
from types import TracebackType
from typing import Any, NamedTuple

from .chunked import ChunkedDivergenceFunction, chunked_divergence_loss
from .jsd import generalized_jsd_loss, gold_jsd_loss

# Where TRL has them (module, name in it), and what comes in their place.
TARGETS: tuple[tuple[str, str, Any], ...] = (
    (
        "trl.experimental.gkd.gkd_trainer",
        "GKDTrainer.generalized_jsd_loss",
        generalized_jsd_loss,
    ),
    (
        "trl.experimental.gold.gold_trainer",
        "GOLDTrainer.generalized_jsd_loss",
        gold_jsd_loss,
    ),
    (
        "trl.trainer.distillation_trainer",
        "_chunked_divergence_loss",
        chunked_divergence_loss,
    ),
    (
        "trl.trainer.distillation_trainer",
        "ChunkedDivergenceFunction",
        ChunkedDivergenceFunction,
    ),
    (
        "trl.kernels.chunked_divergence",
        "ChunkedDivergenceFunction",
        ChunkedDivergenceFunction,
    ),
)


class Replacement(NamedTuple):
    """One name of TRL's."""

    name: str  # dotted
    owner: Any  # the module or class that has it
    attribute: str
    old: Any  # as the owner held it
    new: Any


class Patch:
    """What `patch` did. As a context manager it undoes it at the end.

    Attributes:
        version: TRL's.
        replaced: a `Replacement` for every name that leads to kdkernels because of this.
        skipped: a dict, name -> why it was left as it is.
    """

    def __init__(self, version: str) -> None:
        self.version = version
        self.replaced: list[Replacement] = []
        self.skipped: dict[str, str] = {}

    def undo(self) -> list[str]:
        """Gives TRL back what was replaced; a second time there is nothing to do.

        Returns:
            Names that somebody else has replaced since: they stay as they are.
        """
        foreign = []
        for name, owner, attribute, old, new in self.replaced:
            if vars(owner).get(attribute) is new:
                setattr(owner, attribute, old)
            else:
                foreign.append(name)
        self.replaced = []
        return foreign

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        lines = [f"Patch of trl {self.version}: {len(self.replaced)} replaced"]
        lines += [f"  {x.name} -> {__package__}.{_plain(x.new).__name__}" for x in self.replaced]
        lines += [f"  {name} skipped: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def patch() -> Patch:
    """Puts the losses of this package where the installed TRL's trainers call its own.

    That is `generalized_jsd_loss` of `GKDTrainer` and `GOLDTrainer`, and of `DistillationTrainer`
    `_chunked_divergence_loss` and, wherever it is imported, `ChunkedDivergenceFunction`. Trainers
    that exist already are changed too. (`IWOPDTrainer`'s `generalized_jsd_loss` is left alone: by
    default it takes the top k.)

    What a TRL of another version does not have, or has with other arguments, is skipped, with a
    warning. What is replaced already is skipped without one, and undone by who replaced it.

    Returns:
        `Patch`: print it, and call its `undo()`.

    Raises:
        ImportError: TRL is not installed.

    Example:
        with patch() as patched:
            print(patched)
            trainer.train()
    """
    done = Patch(importlib.import_module("trl").__version__)
    already = []
    for module, path, function in TARGETS:
        name = f"{module}.{path}"
        try:
            owner, attribute, old, new = _found(module, path, function)
        except _SkippedError as reason:
            done.skipped[name] = str(reason)
            continue
        if _plain(old) is function:
            done.skipped[name] = "replaced already"
            already.append(name)
            continue
        setattr(owner, attribute, new)
        done.replaced.append(Replacement(name, owner, attribute, old, new))
    left = [f"{name} ({done.skipped[name]})" for name in done.skipped if name not in already]
    if left:
        warnings.warn(
            f"trl {done.version} is not one that kdkernels knows, and keeps its own "
            f"{', '.join(left)}",
            stacklevel=2,
        )
    return done


class _SkippedError(Exception):
    """Why a name is not replaced."""


def _found(module: str, path: str, function: Any) -> tuple[Any, str, Any, Any]:
    """The owner of a name, the attribute, what the owner holds there, and what it is to hold."""
    *owners, attribute = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
    except Exception as error:  # whatever the modules that it imports raise
        raise _SkippedError(f"{type(error).__name__}: {error}") from None
    for part in owners:
        owner = getattr(owner, part, None)
    old = None if owner is None else vars(owner).get(attribute)
    if old is None:
        raise _SkippedError("not there")
    new = staticmethod(function) if owners else function
    if owners and not isinstance(old, staticmethod):
        raise _SkippedError("not a static method")
    if _plain(old) is not function:
        theirs, ours = _parameters(_plain(old)), _parameters(function)
        if theirs != ours[: len(theirs)]:
            wanted = inspect.Signature(ours[: len(theirs)])
            raise _SkippedError(f"takes {inspect.Signature(theirs)}, expected {wanted}")
    return owner, attribute, old, new


def _plain(x: Any) -> Any:
    return x.__func__ if isinstance(x, staticmethod) else x


def _parameters(function: Any) -> list[inspect.Parameter]:
    """In order, without annotations; of an autograd function those that `apply` takes."""
    forward = getattr(function, "forward", None)  # (ctx, ...)
    plain = forward or getattr(function, "apply", function)
    parameters = list(inspect.signature(plain).parameters.values())[1 if forward else 0 :]
    return [x.replace(annotation=inspect.Parameter.empty) for x in parameters]
