"""One session of ranks, one set of tiny models, and the table of deviations for the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from deviations import MEASURED, Table
from layouts import Models
from objectives import Trainings
from support.bench import Bench
from support.tiny import save_tiny_lm, save_tiny_rm

_BENCHES: list[Bench] = []
TABLE = Table()


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Actors are started when a layout first needs them."""
    bench = Bench(tmp_path_factory.mktemp("invariants") / "logs")
    _BENCHES.append(bench)
    yield bench
    bench.close()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Stop the actors after the last test of this folder: a process has one Ray at a time, and other folders need it, too."""
    if nextitem is None or "tests/invariants/" not in nextitem.nodeid:
        for bench in _BENCHES:
            bench.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """All of different weights: what is taken from the wrong model shows."""
    folder = tmp_path_factory.mktemp("models")
    models = Models(
        policy=save_tiny_lm(folder / "policy", seed=0),
        reference=save_tiny_lm(folder / "reference", seed=2),
        reward=save_tiny_rm(folder / "reward", seed=1),
        value=save_tiny_rm(folder / "value", seed=3),
        records=folder / "records.jsonl",
    )
    models.write_records()
    return models


@pytest.fixture(scope="session")
def trainings(bench: Bench, models: Models) -> Trainings:
    """See `Trainings`."""
    return Trainings(bench, models)


@pytest.fixture(scope="session")
def tied_trainings(bench: Bench, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """Of a language model whose embeddings are its output layer, too."""
    tied = save_tiny_lm(tmp_path_factory.mktemp("tied") / "policy", seed=4, tie_word_embeddings=True)
    return Trainings(bench, replace(models, policy=tied))


@pytest.fixture(scope="session")
def table() -> Table:
    """What tests add to what tests/README.md publishes."""
    return TABLE


def pytest_sessionfinish() -> None:
    """Hand what was measured to tests/support/publish_tables.py, where that asks for it: a test run writes no tracked file."""
    if path := os.environ.get(MEASURED):
        TABLE.save(Path(path))
