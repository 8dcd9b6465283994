"""Several processes of which one fails: it says so in a line, and the others say which it was.

A process tells the others by the store of the process group, which torch has no public name for.
"""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

GRACE = 5.0  # seconds in which processes that fail tell each other of it


class ProcessError(RuntimeError):
    """Another process failed, died or hangs; the text says which."""


entered: list[None] = []  # of `shared` that are open; and how many outermost ones there were
generations = 0


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """While this is open, the other processes are told of what is raised here.

    Raises:
        ProcessError: instead of what a collective raises where another process is missing.
    """
    global generations
    generations += not entered
    entered.append(None)
    try:
        yield
    except ProcessError:
        raise
    except Exception as error:
        if not several():
            raise
        text, reason = None if _is_of_others(error) else line(error), _reason(error)
        said = _within_grace(lambda: _tell(text, reason))
        if text is None:
            raise ProcessError(said or f"process 0 hangs: {reason}") from None
        raise
    finally:
        entered.pop()


def several() -> bool:
    """Whether this is one of several processes, which know of each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def place() -> str:
    """Which process this is, as messages name it."""
    return f"process {dist.get_rank()} of {dist.get_world_size()}"


def line(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _is_of_others(error: BaseException) -> bool:
    """Whether a collective raised it: gloo's have no type of their own, but the place in its
    source."""
    gloo = type(error) is RuntimeError and re.search(r"gloo/\S+\.(cc|h):\d+\]", str(error))
    return isinstance(error, dist.DistError) or bool(gloo)


def _reason(error: BaseException) -> str:
    """What gloo and NCCL say, without the place in their source and good advice."""
    text = " ".join(str(error).split())
    return text.rpartition("cc:")[2].partition("] ")[2].partition(". ")[0] or text[:200]


def _within_grace(ask: Callable[[], str | None]) -> str | None:
    """What it returns; None where who keeps the store does not answer."""
    found = []
    thread = threading.Thread(target=lambda: found.append(ask()), daemon=True)
    thread.start()
    thread.join(GRACE + 2)
    return found[0] if found else None


def _tell(text: str | None, reason: str) -> str | None:
    """Leaves for the others what this process failed of, or that it found another one missing
    (None) -> for which it then looks: which is the first that failed, and what happened."""
    store = _store()
    if store is None:
        return f"{'torchrun' if _kept_by_agent() else 'process 0'} is gone: {reason}"
    names = [f"kdkernels/{generations}/{rank}" for rank in range(dist.get_world_size())]
    try:
        store.set(names[dist.get_rank()], text or "")
        return _found(store, names, reason) if text is None else None
    except dist.DistError:
        return f"another process is gone: {reason}"


def _found(store: Any, names: list[str], reason: str) -> str:
    end, said = time.monotonic() + GRACE, {}
    # Who keeps the store goes last.
    keeps = dist.get_rank() == 0 and not _kept_by_agent()
    while True:
        for rank, name in enumerate(names):
            if rank not in said and store.check([name]):
                said[rank] = store.get(name).decode()
        failed = [rank for rank, text in sorted(said.items()) if text]
        missing = [str(rank) for rank in range(len(names)) if rank not in said]
        if not missing or (failed and not keeps) or time.monotonic() > end:
            break
        time.sleep(0.1)
    if failed:
        return f"process {failed[0]} failed: {said[failed[0]]}"
    if not missing:
        return f"another process is gone: {reason}"
    which = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(missing)}"
    return f"{which} died or hangs: {reason}"


def _kept_by_agent() -> bool:
    """Whether torchrun keeps the store; without it, process 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store() -> Any:
    """The process group's, or None where who keeps it is gone: to ask it would print pages."""
    from torch.distributed.distributed_c10d import _get_default_store

    stores: Any = dist  # whose types say nothing of them
    found = inner = _get_default_store()
    while isinstance(inner, stores.PrefixStore):
        inner = inner.underlying_store
    if isinstance(inner, stores.TCPStore):
        try:
            socket.create_connection((inner.host, inner.port), 1).close()
        except OSError:
            return None
    return found
