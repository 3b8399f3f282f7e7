from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_dist.core.errors import WorkerError
from rlhf_dist.curation.parallel import ordered_map


def square(number: int) -> int:
    return number * number


def die_at_five(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_results_come_in_order_and_the_stream_is_taken_only_as_fast() -> None:
    taken: list[int] = []

    def stream() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    results = ordered_map(square, stream(), 2)
    assert [next(results) for _ in range(10)] == [square(number) for number in range(10)]
    assert len(taken) <= 10 + 3 * 2
    assert list(results) == [square(number) for number in range(10, 50)]


def test_a_process_that_dies_ends_the_work_in_plain_words() -> None:
    with pytest.raises(WorkerError, match=r"one of 1 processes .* died .*lower num_processes"):
        list(ordered_map(die_at_five, range(20), 1))


def test_an_error_of_the_function_comes_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(ordered_map(os.stat, [tmp_path, tmp_path / "none"], 1))
