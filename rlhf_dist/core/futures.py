"""Small combinators over `concurrent.futures.Future`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Deferred(Future[T]):
    """A result that is worked out in the thread that asks for it first, when it asks: for what must not run in a callback of
    Ray, nor at a moment that nobody chose.

    It completes when it is asked (`result`, `exception`); `mapped` and `gathered` pass the question on.
    """

    def __init__(self, finish: Callable[[], T], waits_for: Sequence[Future[Any]] = ()) -> None:
        """`finish`: gives the result, once. `waits_for`: what it will wait for."""
        super().__init__()
        self._finish = finish
        self._waits_for = waits_for
        self._asked = threading.Lock()

    def done(self) -> bool:
        """Whether what it waits for is done."""
        return super().done() or all(future.done() for future in self._waits_for)

    def result(self, timeout: float | None = None) -> T:
        """The result; `timeout` is not kept by what is still to be done."""
        self._complete()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See `result`."""
        self._complete()
        return super().exception(timeout)

    def _complete(self) -> None:
        with self._asked:
            if super().done():
                return
            try:
                self.set_result(self._finish())
            except Exception as error:
                self.set_exception(error)


def completed(value: T) -> Future[T]:
    """A future that is done."""
    future: Future[T] = Future()
    future.set_result(value)
    return future


def gathered(futures: Sequence[Future[T]]) -> Future[list[T]]:
    """The results of all, in order; fails at the first failure, without waiting for the rest.

    A rank that dies leaves the others waiting in a collective: the first failure is the one that matters.
    """
    if any(isinstance(future, Deferred) for future in futures):
        return Deferred(lambda: [future.result() for future in futures], futures)
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
    if isinstance(future, Deferred):
        return Deferred(lambda: function(future.result()), [future])
    result: Future[Any] = Future()

    def on_done(done: Future[T]) -> None:
        try:
            result.set_result(function(done.result()))
        except BaseException as error:
            result.set_exception(error)

    future.add_done_callback(on_done)
    return result
