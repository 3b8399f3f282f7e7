"""Small combinators over `concurrent.futures.Future`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")


def completed(value: T) -> Future[T]:
    """A future that is done."""
    future: Future[T] = Future()
    future.set_result(value)
    return future


def gathered(futures: Sequence[Future[T]]) -> Future[list[T]]:
    """The results of all, in order; fails at the first failure, without waiting for the rest.

    A rank that dies leaves the others waiting in a collective: the first failure is the one that matters.
    """
    result: Future[list[T]] = Future()
    remaining = len(futures)
    lock = threading.Lock()

    def on_done(future: Future[T]) -> None:
        nonlocal remaining
        with lock:
            remaining -= 1
            if result.done():
                return
            error = CancelledError() if future.cancelled() else future.exception()
            if error is not None:
                result.set_exception(error)
            elif remaining == 0:
                result.set_result([f.result() for f in futures])

    if not futures:
        result.set_result([])
    for future in futures:
        future.add_done_callback(on_done)
    return result


def mapped(future: Future[T], function: Callable[[T], U]) -> Future[U]:
    """`function` of the result; an exception in either fails the new future."""
    result: Future[Any] = Future()

    def on_done(done: Future[T]) -> None:
        try:
            result.set_result(function(done.result()))
        except BaseException as error:
            result.set_exception(error)

    future.add_done_callback(on_done)
    return result
