"""One session of ranks, one set of tiny models, and the table of deviations for the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from deviations import Table
from layouts import Models
from objectives import Trainings
from support.bench import Bench
from support.tiny import save_tiny_lm, save_tiny_rm
from whole_suite import expected_rows, is_whole

_BENCHES: list[Bench] = []
HERE = Path(__file__).resolve().parent
TABLE = Table()
_OUTCOMES: dict[str, str] = {}
"""Test of this folder → how it ended."""
_DESELECTED: list[str] = []
"""Tests of this folder that were not asked for."""
_NOTES: list[str] = []
"""For the end of pytest's report."""


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


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _OUTCOMES[report.nodeid] = report.outcome


def pytest_deselected(items: list[pytest.Item]) -> None:
    _DESELECTED.extend(item.nodeid for item in items if _is_ours(item))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Publish only what the whole suite has measured, and passed."""
    ours = [item for item in session.items if _is_ours(item)]
    measured = {key: row.cases for key, row in TABLE.rows.items()}
    if is_whole([item.nodeid for item in ours], _OUTCOMES, _DESELECTED, measured):
        TABLE.write(HERE.parent / "README.md")
    elif not _DESELECTED and {item.path.name for item in ours} == {path.name for path in HERE.glob("test_*.py")}:
        expected = expected_rows()
        other = [f"{key}" for key in measured.keys() | expected if measured.get(key) != expected.get(key)]
        _NOTES.append(f"tests/README.md was left alone: a test failed, or whole_suite.py differs in {sorted(other)}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for note in _NOTES:
        terminalreporter.write_line(note)


def _is_ours(item: pytest.Item) -> bool:
    return HERE in item.path.parents
