"""Every family of models trains, generates and is saved; what the table in tests/README.md says is so."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.families import FAMILIES, try_family

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.parametrize("name", FAMILIES)
def test_sft_reward_model_and_ppo(name: str, tmp_path: Path):
    seen = try_family(name, tmp_path)
    assert [seen.sft[False], seen.reward[False], seen.ppo[False]] == ["", "", ""]
    packed = {seen.sft[True], seen.reward[True], seen.ppo[True]}
    row = next(line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |"))
    assert row.endswith("| yes |" if packed == {""} else "| not supported |")
    assert all(not how or "packed" in how for how in packed)
