"""The state of every generator that training may draw from."""

import hashlib
import random

import numpy as np
import torch


def state():
    """Of Python, NumPy and PyTorch, on the CPU and all GPUs."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *map(_number, rest)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore(found):
    name, keys, *rest = found["numpy"]
    random.setstate(found["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(found["torch"])
    # On another machine there may be fewer GPUs, or none.
    if len(found["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(found["cuda"])


def begin(text):
    """States that depend on a text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _number(x):
    return float(x) if isinstance(x, float) else int(x)
