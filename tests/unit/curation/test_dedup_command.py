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


CHAT = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "Rain carries salt out of stones."}]
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "ShareGPT": (
        "messages",
        {"conversations": [{"from": "human", "value": LONG}, {"from": "gpt", "value": CHAT[1]["content"]}]},
    ),
    "turns in messages": (
        "messages",
        {"messages": [{"from": "human", "value": LONG}, {"from": "gpt", "value": CHAT[1]["content"]}]},
    ),
    "content in parts": (
        "messages",
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]},
    ),
    "chat": ("messages", {"messages": CHAT}),
    "completion": ("messages", {"prompt": LONG, "completion": CHAT[1]["content"]}),
    "instruction": ("instruction", {"instruction": LONG, "output": CHAT[1]["content"]}),
    "completion as instruction": ("instruction", {"prompt": LONG, "completion": CHAT[1]["content"]}),
    "preference": ("preference", {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "No."}]}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_that_a_kind_reads_is_compared(
    tmp_path: Path, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, row = SHAPES[shape]
    sources = [{"path": str(write(tmp_path / "a.jsonl", [row, row, row])), "kind": kind}]
    assert run(tmp_path, sources) == 0
    assert read(tmp_path / "out" / "records.jsonl") == [row], "written as it was"
    assert "without text" not in capsys.readouterr().out


@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_sets_of_every_shape_are_found(tmp_path: Path, shape: str) -> None:
    kind, row = SHAPES[shape]
    rows = [{"instruction": LONG, "output": "x"}, {"instruction": "Name a bird.", "output": "Wren"}]
    sources = [{"path": str(write(tmp_path / "a.jsonl", rows)), "kind": "instruction"}]
    against = {"e": {"path": str(write(tmp_path / "e.jsonl", [row])), "kind": kind}}
    assert run(tmp_path, sources, decontaminate={"against": against}) == 0
    assert read(tmp_path / "out" / "records.jsonl") == rows[1:]


def test_what_makes_chats_differ_beside_their_texts(tmp_path: Path) -> None:
    def call(city: str) -> dict[str, Any]:
        function = {"name": "weather", "arguments": {"city": city}}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}

    asked = {"role": "user", "content": "How warm is it?"}
    rows = [{"messages": [asked, call(city)]} for city in ("Ulm", "Bonn", "Ulm")]
    rows += [{"messages": CHAT}, {"messages": CHAT, "tools": [{"name": "weather"}]}]
    sources = [{"path": str(write(tmp_path / "a.jsonl", rows)), "kind": "messages"}]
    assert run(tmp_path, sources, near=None) == 0
    assert read(tmp_path / "out" / "records.jsonl") == [rows[0], rows[1], rows[3], rows[4]]


def test_a_chosen_field_without_text_has_a_place_and_can_be_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "one", "more": {"a": 1}}, {"text": "two", "more": "b"}, {"text": "three"}]
    source = {"path": str(write(tmp_path / "a.jsonl", rows)), "kind": "text"}
    assert run(tmp_path, [source], fields=["more"]) == 3
    error = capsys.readouterr().err
    assert "a.jsonl:1" in error
    assert "'more'" in error
    assert run(tmp_path, [{**source, "on_bad_row": "skip"}], fields=["more"]) == 0
    assert read(tmp_path / "out" / "records.jsonl") == rows[1:]
    assert "without text to compare" in capsys.readouterr().out
