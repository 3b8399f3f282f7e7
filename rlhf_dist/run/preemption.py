"""A request to stop: SIGUSR1, which job schedulers send before they take the machine away.

A run looks at it between two steps, writes a checkpoint, and ends with exit code 75 (`Preempted`). The process keeps the
request rather than the run, so that one that comes while data is still being read is not lost.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

STOP_SIGNAL = signal.SIGUSR1

_requested = threading.Event()


def requested() -> bool:
    """Whether the process was asked to stop its run."""
    return _requested.is_set()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Inside, SIGUSR1 asks the run to stop in place of ending the process. For the main thread."""
    _requested.clear()
    before = signal.signal(STOP_SIGNAL, lambda *_: _requested.set())
    try:
        yield
    finally:
        signal.signal(STOP_SIGNAL, before)
        _requested.clear()
