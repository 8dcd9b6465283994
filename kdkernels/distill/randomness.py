"""The state of every generator that training may draw from."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


def state() -> dict[str, Any]:
    """Of Python, NumPy and PyTorch, on the CPU and all GPUs."""
    numpy: Any = np.random.get_state()
    name, keys, *rest = numpy
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *map(_number, rest)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore(found: dict[str, Any]) -> None:
    name, keys, *rest = found["numpy"]
    random.setstate(found["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(found["torch"])
    # On another machine there may be fewer GPUs, or none.
    if len(found["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(found["cuda"])


def begin(text: str) -> None:
    """States that depend on a text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _number(x: Any) -> int | float:
    return float(x) if isinstance(x, float) else int(x)
