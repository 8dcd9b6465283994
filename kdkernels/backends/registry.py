"""Which backend computes a call: `backend=` > `KDKERNELS_BACKEND` > the first usable one.

An explicit choice is honoured or raises, naming what there is and why the rest is not; only an
automatic one falls back.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from . import native, triton

Name = Literal["native", "triton", "eager"]
ENVIRONMENT_VARIABLE = "KDKERNELS_BACKEND"


@dataclass(frozen=True)
class Backend:
    name: Name
    unavailable: Callable[[str], str | None]  # device type -> why it cannot be used there, or None
    takes_float64: bool
    default_on: tuple[str, ...] | None = None  # device types of an automatic choice; None: all


# In the order of preference of an automatic choice.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("native", native.unavailable, takes_float64=False),
        Backend("triton", triton.unavailable, takes_float64=False, default_on=triton.DEVICE_TYPES),
        Backend("eager", lambda device_type: None, takes_float64=True),
    )
}


def check_name(source: str, name: object) -> None:
    """`source` says where the name comes from: the keyword or the environment variable."""
    if name is not None and name not in tuple(BACKENDS):
        raise ValueError(f"unknown {source} {name!r}; known: {', '.join(BACKENDS)}")


def resolve(device_type: str, dtype: torch.dtype, requested: str | None = None) -> Name:
    """The name of the backend for logits of `dtype` on `device_type` ("cpu", "cuda", …)."""
    source = "backend"
    if requested is None:
        source = ENVIRONMENT_VARIABLE
        requested = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if requested is None:
        for backend in BACKENDS.values():
            if backend.default_on is not None and device_type not in backend.default_on:
                continue
            if dtype == torch.float64 and not backend.takes_float64:
                continue
            if not backend.unavailable(device_type):
                return backend.name
    check_name(source, requested)
    backend = BACKENDS[str(requested)]
    if backend.unavailable(device_type):
        states = (f"{b.name}: {b.unavailable(device_type) or 'usable'}" for b in BACKENDS.values())
        raise RuntimeError(
            f"{source}={requested!r} cannot be used for {device_type} tensors. {'; '.join(states)}"
        )
    if dtype == torch.float64 and not backend.takes_float64:
        raise TypeError(
            f"{source}={requested!r} computes in float32 and takes no float64 logits; "
            "use backend='eager' for float64"
        )
    return backend.name
