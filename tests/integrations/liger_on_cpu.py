"""Runs Liger's losses where there is no GPU: what is Triton in them in Triton's interpreter.

`python tests/integrations/liger_on_cpu.py CASES RESULTS`, files of `torch.save`: a dict of `Case`s,
and one of what `measured` or, for a class alone, `described` returns for each.
A process of its own, because the suite's interpreter knows only what the suite's kernels do.
"""

import inspect
import os
import sys
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Case(NamedTuple):
    name: str  # of Liger's class
    options: dict  # of its constructor
    args: tuple  # of its call
    upstream: torch.Tensor | None = None  # None: ones
    output: int = 0  # the one to differentiate, where it returns several


class Eps(float):
    """A float as a kernel gets it: LigerKLDIVLoss casts it, and the interpreter passes floats."""

    def to(self, dtype):
        return self


class Largest(TorchDispatchMode):
    """The most elements that an operator returned while this was open."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        numbers = [x.numel() for x in outputs if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *numbers])
        return result


def measured(loss, case):
    """(outputs, gradients of the arguments that require grad, `Largest.elements`)"""
    with Largest() as largest:
        outputs = loss(*case.args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        chosen = outputs[case.output]
        wanted = [x for x in case.args if isinstance(x, torch.Tensor) and x.requires_grad]
        upstream = torch.ones_like(chosen) if case.upstream is None else case.upstream
        grads = torch.autograd.grad(chosen, wanted, upstream, allow_unused=True)
    return [x.detach() for x in outputs], grads, largest.elements


def described(loss):
    """Its signatures, [(argument, default)] of constructor and call, its attributes and repr."""
    signatures = []
    for function in (type(loss).__init__, type(loss).forward):
        parameters = inspect.signature(function).parameters.values()
        positional = [x for x in parameters if x.kind != x.KEYWORD_ONLY]
        signatures.append([(x.name, repr(x.default)) for x in positional])
    attributes = {name: x for name, x in vars(loss).items() if not name.startswith("_")}
    return signatures, attributes, repr(loss)


def main(cases, results):
    os.environ["TRITON_INTERPRET"] = "1"
    sys.modules["peft"] = None  # Liger only looks whether it is there, which takes seconds
    from liger_kernel import chunked_loss, transformers

    found = {}
    for key, case in torch.load(cases, weights_only=False).items():
        home = chunked_loss if hasattr(chunked_loss, case.name) else transformers
        make, options = getattr(home, case.name), case.options
        if not case.args:
            found[key] = described(make())
            continue
        if case.name == "LigerKLDIVLoss":
            options = dict(options, eps=Eps(1e-10))
        found[key] = measured(make(**options), case)
    torch.save(found, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
