"""Combinators over futures."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from rlhf_dist.core.futures import Deferred, completed, gathered, mapped


def test_results_come_in_the_order_of_the_futures():
    futures: list[Future[int]] = [Future() for _ in range(3)]
    together = gathered(futures)
    for i in (2, 0, 1):
        assert not together.done()
        futures[i].set_result(i)
    assert together.result(timeout=0) == [0, 1, 2]


def test_nothing_to_wait_for():
    assert gathered([]).result(timeout=0) == []
    assert gathered([completed(1), completed(2)]).result(timeout=0) == [1, 2]


def test_the_first_failure_wins_without_waiting_for_the_rest():
    hangs, dies, late = Future(), Future(), Future()
    together = gathered([hangs, dies, late])
    dies.set_exception(ValueError("first"))
    with pytest.raises(ValueError, match="first"):
        together.result(timeout=0)
    late.set_exception(ValueError("second"))
    hangs.set_result(1)
    with pytest.raises(ValueError, match="first"):
        together.result(timeout=0)


def test_a_cancelled_future_is_a_failure_and_not_a_hang():
    waiting: Future[int] = Future()
    together = gathered([waiting, Future()])
    waiting.cancel()
    assert together.done()
    assert together.exception(timeout=0) is not None


def test_many_threads_may_finish_at_once():
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            assert gathered([pool.submit(lambda i=i: i) for i in range(50)]).result(timeout=30) == list(range(50))


def test_mapped():
    assert mapped(completed(2), lambda x: x + 1).result(timeout=0) == 3
    with pytest.raises(ZeroDivisionError):
        mapped(completed(0), lambda x: 1 / x).result(timeout=0)
    failed: Future[int] = Future()
    failed.set_exception(KeyError("cause"))
    with pytest.raises(KeyError, match="cause"):
        mapped(failed, lambda x: x).result(timeout=0)


def test_a_deferred_result_is_worked_out_once_by_who_asks_for_it_and_so_is_what_is_made_of_it():
    asked: list[int] = []
    waits_for: Future[int] = Future()

    def finish() -> int:
        asked.append(threading.get_ident())
        return waits_for.result(timeout=0)

    deferred = Deferred(finish, [waits_for])
    doubled = mapped(deferred, lambda value: 2 * value)
    together = gathered([doubled, completed(1)])
    assert not together.done()
    waits_for.set_result(4)
    assert deferred.done()
    assert together.done()
    assert not asked, "nobody has asked for it"
    assert together.result() == [8, 1]
    assert deferred.result() == 4
    assert asked == [threading.get_ident()]


def test_a_deferred_failure_is_everybodys():
    deferred = Deferred(lambda: 1 // 0)
    doubled = mapped(deferred, lambda value: 2 * value)
    for future in (doubled, deferred):
        assert isinstance(future.exception(), ZeroDivisionError)
        with pytest.raises(ZeroDivisionError):
            future.result()
