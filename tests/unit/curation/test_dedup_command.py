from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cli.main import main

LONG = "Explain in two sentences why the sea is salt and the lakes that feed it are not, for a child of nine years."


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run(tmp_path: Path, sources: list[dict[str, Any]], *overrides: str, **config: Any) -> int:
    path = tmp_path / "dedup.yaml"
    path.write_text(json.dumps({"out_dir": str(tmp_path / "out"), "sources": sources, "num_processes": 0, **config}))
    return main(["data", "dedup", str(path), *overrides])


def test_what_is_removed_is_listed_with_its_place_the_reason_and_what_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a.jsonl", [{"q": LONG, "r": "Rain.", "id": 7}, {"q": "Name a bird.", "r": "Wren"}])
    b = write(
        tmp_path / "b.jsonl",
        [
            {"instruction": "Name a BIRD.", "output": "wren"},
            {"instruction": LONG.replace("nine", "ten"), "output": "Rain."},
            {"instruction": "What did the heron say to the eel before it ate it?", "output": "Good morning"},
            "{",
        ],
    )
    test = write(tmp_path / "test.jsonl", [{"prompt": "Riddle: what did the heron say to the eel before it ate it"}])
    sources = [
        {"path": str(a), "kind": "instruction", "fields": {"instruction": "q", "output": "r"}},
        {"path": str(b), "kind": "instruction", "on_bad_row": "skip"},
    ]
    against = {"riddles": {"path": str(test), "kind": "prompt"}}
    assert run(tmp_path, sources, decontaminate={"against": against, "num_words": 8}) == 0
    out = tmp_path / "out"
    assert read(out / "records.jsonl") == [
        {"instruction": LONG, "output": "Rain.", "id": 7},
        {"instruction": "Name a bird.", "output": "Wren"},
    ]
    copy, near, riddle = read(out / "removed.jsonl")
    assert copy == {
        "location": f"{b}:1",
        "reason": "exact duplicate",
        "same_as": f"{a}:2",
        "record": {"instruction": "Name a BIRD.", "output": "wren"},
    }
    assert (near["location"], near["reason"], near["same_as"]) == (f"{b}:2", "near-duplicate", f"{a}:1")
    assert 0.8 <= near["similarity"] < 1
    assert near["same_as_record"]["id"] == 7
    assert riddle["reason"] == "in an evaluation set"
    assert (riddle["evaluation_set"], riddle["evaluation_location"]) == ("riddles", f"{test}:1")
    assert riddle["shared_words"] == "what did the heron say to the eel"
    (bad,) = read(out / "bad_rows.jsonl")
    assert "b.jsonl:4: not JSON" in bad["reason"]
    report = json.loads((out / "report.json").read_text())
    assert report["counts"] == {
        "read": 5,
        "in an evaluation set": 1,
        "exact duplicate": 1,
        "near-duplicate": 1,
        "kept": 2,
    }
    assert report["near"]["probability that a pair of a similarity is compared"]["0.8"] > 0.99
    assert report["bad rows"] == 1
    assert sorted(path.name for path in out.iterdir()) == [
        "bad_rows.jsonl",
        "config.yaml",
        "records.jsonl",
        "removed.jsonl",
        "report.json",
    ]
    assert "1 bad rows skipped" in capsys.readouterr().out


def test_what_stays_and_what_goes_is_all_there_was(tmp_path: Path, shared_data: Path) -> None:
    """Real sentences, one file twice and a half of it as evaluation set."""
    columns = ["id", "rating", "text"]
    path = str(shared_data / "movieReviewSnippets_GroundTruth.txt")
    source = {"path": path, "kind": "text", "columns": columns, "limit": 600}
    assert run(tmp_path, [source, source], near=None) == 0
    kept, removed = (read(tmp_path / "out" / name) for name in ("records.jsonl", "removed.jsonl"))
    assert len(kept) + len(removed) == 1200
    assert [row["id"] for row in kept[:3]] == [row["record"]["id"] for row in removed[:3]]
    test = {"e": {**source, "limit": 300}}
    assert (
        run(tmp_path, [source], "--overwrite", "true", near=None, decontaminate={"against": test, "min_words": 1}) == 0
    )
    left = read(tmp_path / "out" / "records.jsonl")
    assert {row["id"] for row in left} <= {row["id"] for row in kept[300:]}
    assert len(left) > 250


def test_chosen_fields_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": "Say it.", "output": "a"}, {"instruction": "say it.", "output": "b"}]
    sources = [{"path": str(write(tmp_path / "a.jsonl", rows)), "kind": "instruction"}]
    assert run(tmp_path, sources, "--fields", '["instruction"]') == 0
    assert read(tmp_path / "out" / "records.jsonl") == rows[:1]
    assert run(tmp_path, sources, "--overwrite", "true") == 0
    assert read(tmp_path / "out" / "records.jsonl") == rows
    assert run(tmp_path, sources, "--overwrite", "true", "--fields", '["instructoin"]') == 3
    assert "no record has the field 'instructoin'" in capsys.readouterr().err
    assert read(tmp_path / "out" / "records.jsonl") == rows, "what was there is untouched"


@pytest.mark.parametrize(
    ("changes", "exit_code", "problem"),
    [
        ({"exact": False, "near": None}, 2, "nothing would be done"),
        ({"near": {"threshold": 0.02}}, 2, "near.num_permutations 128 cannot find pairs of similarity 0.02"),
        ({"normalize": ["accents"]}, 2, "normalize"),
        ({"decontaminate": {"against": {}}}, 2, "decontaminate.against"),
        (
            {"decontaminate": {"against": {"e": {"path": "e", "kind": "text"}}, "num_words": 5}},
            2,
            "min_words 8 is more",
        ),
        (
            {"near": None, "decontaminate": {"against": {"e": {"path": "a.jsonl", "kind": "text"}}, "min_words": 1}},
            3,
            "none of 1 records would be left",
        ),
        ({"sources": [{"path": "a.jsonl", "kind": "text"}, {"path": "a", "kind": "prompt"}]}, 2, "kinds prompt, text"),
    ],
)
def test_rejections(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    exit_code: int,
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", [{"text": "some words"}])
    config = {"sources": [{"path": "a.jsonl", "kind": "text"}], **changes}
    assert run(tmp_path, config.pop("sources"), **config) == exit_code
    assert problem in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "dedup.yaml"]
