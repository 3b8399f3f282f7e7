from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.config.data import DataSource
from rlhf_dist.data.reader import read_preferences


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(tmp_path: Path, kind: str, rows: list[dict[str, Any]], *overrides: str, **source: Any) -> int:
    path = write(tmp_path / "rows.jsonl", rows)
    config = {"out_dir": str(tmp_path / "out"), "sources": [{"path": str(path), "kind": kind, **source}]}
    (tmp_path / "pairs.yaml").write_text(json.dumps(config))
    return main(["data", "pairs", str(tmp_path / "pairs.yaml"), *overrides])


def read(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text("utf-8").splitlines()]


def test_a_ranking_gives_every_pair_but_ties_with_the_margins_of_its_scale(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c", "d"], "ratings": [4, 3, 3, 1]},
        {"prompt": "q", "responses": ["a", "b", "c"]},
        {  # texts that would be dialogues of the HH form, were they not in messages
            "prompt": [{"role": "user", "content": "Human: r"}],
            "chosen": "a",
            "rejected": [{"role": "assistant", "content": "Human: b"}],
            "margin": 0.5,
        },
    ]
    assert run(tmp_path, "preference", rows, name="pilot") == 0
    found = [(r["prompt"], r["chosen"], r["rejected"], r.get("margin")) for r in read(tmp_path)]
    assert found[:8] == [
        ("p", "a", "b", 1),
        ("p", "a", "c", 1),
        ("p", "a", "d", 3),
        ("p", "b", "d", 2),
        ("p", "c", "d", 2),
        ("q", "a", "b", None),
        ("q", "a", "c", None),
        ("q", "b", "c", None),
    ]
    assert read(tmp_path)[0]["source"] == "pilot"
    assert read(tmp_path)[0]["provenance"] == {"location": f"{tmp_path / 'rows.jsonl'}:1"}
    again = list(read_preferences(DataSource(path=str(tmp_path / "out" / "records.jsonl"), kind="preference"), seed=0))
    assert again[8].prompt == ({"role": "user", "content": "Human: r"},)
    assert again[8].responses[1] == ({"role": "assistant", "content": "Human: b"},)
    assert again[8].ratings == (0.5, 0)
    assert run(tmp_path, "preference", rows[:1], "--overwrite", "true", "--min_margin", "2") == 0
    assert [(r["chosen"], r["rejected"]) for r in read(tmp_path)] == [("a", "d"), ("b", "d"), ("c", "d")]
    assert run(tmp_path, "preference", rows[:1], "--overwrite", "true", "--min_margin", "9") == 3


def test_ratings_become_pairs_within_their_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n % 3}", "response": f"r{n}", "rating": n // 3} for n in range(12)]
    assert run(tmp_path, "ratings", [*rows, {"prompt": "p0", "response": "x"}], on_bad_row="skip", min_margin=1) == 0
    found = read(tmp_path)
    assert len(found) == 6
    ratings = {row["response"]: (row["prompt"], row["rating"]) for row in rows}
    for record in found:
        (prompt, high), (other, low) = ratings[record["chosen"]], ratings[record["rejected"]]
        assert prompt == other == record["prompt"]
        assert record["margin"] == high - low >= 1
    assert json.loads((tmp_path / "out" / "report.json").read_text())["bad"] == 1


def test_texts_without_a_prompt_stay_ratings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"response": "x", "rating": 1}, {"response": "y", "rating": 3}]
    assert run(tmp_path, "ratings", rows) == 3
    assert "has no prompt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def weather(city: str, **more: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}], **more}


def test_what_responses_hold_beside_text_is_kept(tmp_path: Path) -> None:
    asked = {"role": "user", "content": "How warm is it in Ulm?", "name": "ann"}
    thought = {"role": "assistant", "content": "No idea.", "reasoning_content": "A guess would be wrong."}
    rows = [{"prompt": [asked], "chosen": [weather("Ulm")], "rejected": [thought]}]
    assert run(tmp_path, "preference", rows) == 0
    (found,) = read(tmp_path)
    assert (found["prompt"], found["chosen"], found["rejected"]) == ([asked], [weather("Ulm")], [thought])
    before, after = (
        next(iter(read_preferences(DataSource(path=str(path), kind="preference"), seed=0)))
        for path in (tmp_path / "rows.jsonl", tmp_path / "out" / "records.jsonl")
    )
    assert (after.prompt, after.responses) == (before.prompt, before.responses)
