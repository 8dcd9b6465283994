"""What an adapter is: how one implementation of the loss is called for a case."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass


class Missing(Exception):
    """This cannot be measured here; the text says why."""


class Lacks(Missing):
    """It has no such formula; the text says what it has not."""


@dataclass(frozen=True)
class Variant:
    """An implementation, with what PyTorch has to add to it: that is in its time and its title."""

    title: str
    make: Callable  # (case) -> loss(inputs) -> scalar tensor; raises Missing
    accuracy: str  # of definition.TOLERANCES
    ours: bool = False  # if it is wrong, so is the exit status
    overwrites: bool = False  # the student's logits it is given
    compiled: bool = False  # the first call on a shape is not like the later ones


def imported(module, *names):
    """What a module of another package has under these names; raises Missing."""
    try:
        found = importlib.import_module(module)
        return [getattr(found, name) for name in names]
    except Exception as error:  # a package that is there fails to import in ways of its own
        lines = str(error).splitlines()
        raise Missing(f"{module}: {type(error).__name__}: {lines[0] if lines else ''}") from error


# What adapters of other libraries share

GENERALIZED = "forward_kl", "reverse_kl", "jsd"  # the JSD of β = 0, of β = 1, and in between


def generalized_beta(case):
    return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(case.divergence, case.beta)


def distils(case, *divergences, cross_entropy=True):
    """Raises Lacks where a library has only these, and perhaps no cross-entropy to go with them.

    A cross-entropy alone is never what such an adapter is about.
    """
    if case.alpha == 0:
        raise Lacks("cross-entropy alone")
    if case.divergence not in divergences:
        raise Lacks(spelled(case.divergence))
    if case.alpha < 1 and not cross_entropy:
        raise Lacks("cross-entropy")


def cross_entropy_alone(case):
    """Raises Lacks where a library has nothing else."""
    if case.alpha > 0:
        raise Lacks(spelled(case.divergence))


def spelled(divergence):
    names = {"jsd": "JSD", "tvd": "TVD"}
    return names.get(divergence, divergence.replace("_", " ").replace("kl", "KL"))


def on_gpu(case):
    """Raises Missing where Triton would only interpret."""
    if case.device != "cuda":
        raise Missing("needs a CUDA device")
