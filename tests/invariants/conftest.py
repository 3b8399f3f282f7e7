"""One session of ranks, one set of tiny models, and the table of deviations for the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from deviations import Table
from layouts import Models
from objectives import Trainings
from support.bench import Bench
from support.tiny import save_tiny_lm, save_tiny_rm

HERE = Path(__file__).resolve().parent
TABLE = Table()
_OUTCOMES: dict[str, str] = {}
"""Test of this folder → how it ended."""


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Actors are started when a layout first needs them."""
    bench = Bench(tmp_path_factory.mktemp("invariants") / "logs")
    yield bench
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
def table() -> Table:
    """What tests add to what tests/README.md publishes."""
    return TABLE


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "tests/invariants/" in report.nodeid and (report.when == "call" or report.outcome != "passed"):
        _OUTCOMES[report.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Publish only what the whole suite has measured, and passed."""
    mine = {item.nodeid for item in session.items if "tests/invariants/" in item.nodeid}
    files = {nodeid.split("::")[0].rsplit("/", 1)[-1] for nodeid in mine}
    whole = files == {path.name for path in HERE.glob("test_*.py")} and not _is_selective(session.config)
    if whole and all(_OUTCOMES.get(nodeid) == "passed" for nodeid in mine):
        TABLE.write(HERE.parent / "README.md")


def _is_selective(config: pytest.Config) -> bool:
    return bool(config.getoption("keyword") or config.getoption("markexpr") or any("::" in arg for arg in config.args))
