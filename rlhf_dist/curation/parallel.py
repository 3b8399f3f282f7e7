"""A function over a stream, in processes of its own, with a bounded number of items under way."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from rlhf_dist.core.errors import WorkerError

T = TypeVar("T")
R = TypeVar("R")

_UNDER_WAY = 3
"""Items a process may have before the next is taken from the stream: enough that none waits, few enough to hold."""


def default_processes() -> int:
    """A process for each core that this one may use, but one for itself."""
    return max(len(os.sched_getaffinity(0)) - 1, 0)


def ordered_map(function: Callable[[T], R], items: Iterable[T], num_processes: int) -> Iterator[R]:
    """`map(function, items)`, computed by other processes, in the order of `items`.

    Args:
        function: of a module, since other processes import it.
        items: taken only as fast as results are.
        num_processes: 0 computes in this process.

    Raises:
        WorkerError: a process died.
    """
    if num_processes == 0:
        yield from map(function, items)
        return
    # Spawned, not forked: this process may hold threads and locks of torch.
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"), initializer=_leave_interrupts) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= _UNDER_WAY * num_processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise WorkerError(
                f"one of {num_processes} processes that fingerprint texts died (often: out of memory); lower num_processes, or "
                "set it to 0"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def _leave_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; the main one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
