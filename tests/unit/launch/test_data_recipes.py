"""The recipes of `rlhf-dist data` do what they say, on the data beside the checkout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.curation.commands.command import ACTIONS

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "launch" / "recipes" / "data"


@pytest.mark.parametrize("name", ["mix", "dedup"])
def test_its_header_says_how_to_run_it(name: str) -> None:
    assert name in ACTIONS
    assert f"rlhf-dist data {name} launch/recipes/data/{name}.yaml" in (RECIPES / f"{name}.yaml").read_text("utf-8")


def test_mix(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["data", "mix", str(RECIPES / "mix.yaml"), "--out_dir", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(source["name"], source["taken"]) for source in report["sources"]] == [
        ("word_problems", 350),
        ("seed_tasks", 175),
    ]


def test_dedup(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["--out_dir", str(tmp_path / "out"), "--num_processes", "0"]
    assert main(["data", "dedup", str(RECIPES / "dedup.yaml"), *arguments]) == 0
    counts = json.loads((tmp_path / "out" / "report.json").read_text())["counts"]
    assert counts["read"] == 1175
    removed = (tmp_path / "out" / "removed.jsonl").read_text("utf-8").splitlines()
    assert counts["kept"] == 1175 - len(removed)
