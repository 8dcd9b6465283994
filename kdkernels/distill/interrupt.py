"""Ctrl-C between two steps, and not in the middle of one."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """While this is open, a first Ctrl-C is only noted -> a function that says whether it came.

    A second one interrupts at once. Signals belong to the main thread: in others nothing changes,
    nor where they are ignored.
    """
    came = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    ignored = before in (signal.SIG_IGN, None)  # as the shell says to jobs in the background
    if ignored or threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        came.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)
