from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_dist.cli.main import main
from rlhf_dist.config.data import DataSource
from rlhf_dist.config.mixing import MixingSettings
from rlhf_dist.curation.config.mix import MixConfig, MixSource
from rlhf_dist.curation.mixture import mixed_lines, spool_sources
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.mixing import compose
from rlhf_dist.data.reader import read_sequences
from rlhf_dist.data.records import Conversation


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def task(text: str, **more: Any) -> dict[str, Any]:
    return {"instruction": text, "output": f"re: {text}", **more}


def run(tmp_path: Path, config: dict[str, Any], *overrides: str) -> int:
    path = tmp_path / "mix.yaml"
    path.write_text(json.dumps({"out_dir": str(tmp_path / "out"), **config}))
    return main(["data", "mix", str(path), *overrides])


def test_the_command_keeps_the_shares_and_says_them_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = write(tmp_path / "large.jsonl", [task(f"l{i}", extra=i) for i in range(300)])
    small = write(tmp_path / "small.jsonl", [{"q": f"s{i} é", "a": "x"} for i in range(10)])
    sources = [
        {"path": str(large), "kind": "instruction"},
        {"path": str(small), "kind": "instruction", "name": "few", "fields": {"instruction": "q", "output": "a"}},
    ]
    mixing = {"method": "equal", "num_records": 100, "oversample": True}
    assert run(tmp_path, {"sources": sources, "mixing": mixing}) == 0
    records = read(tmp_path / "out" / "records.jsonl")
    assert Counter(record["source"] for record in records) == {"large": 50, "few": 50}
    of_small = Counter(record["instruction"] for record in records if record["source"] == "few")
    assert of_small == {f"s{i} é": 5 for i in range(10)}
    of_large = [record for record in records if record["source"] == "large"]
    assert len({record["extra"] for record in of_large}) == 50
    assert all(record == task(f"l{record['extra']}", extra=record["extra"], source="large") for record in of_large)
    assert {record["source"] for record in records[:10]} == {"large", "few"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(s["name"], s["available"], s["taken"], s["epochs"]) for s in report["sources"]] == [
        ("large", 300, 50, 50 / 300),
        ("few", 10, 50, 5.0),
    ]
    shown = capsys.readouterr().out
    assert "| few    | 10        | 50.0000% | 50    | 50.0000% | 5.000" in shown
    # It is directly usable.
    assert (
        len(list(read_sequences(DataSource(path=str(tmp_path / "out" / "records.jsonl"), kind="instruction")))) == 100
    )


def test_the_same_seed_makes_the_same_bytes(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [task(f"a{i}") for i in range(40)])
    config = {"sources": [{"path": str(a), "kind": "instruction"}]}
    made = []
    for seed in ("0", "0", "1"):
        assert run(tmp_path, config, "--seed", seed, "--overwrite", "true") == 0
        made.append((tmp_path / "out" / "records.jsonl").read_bytes())
    assert made[0] == made[1] != made[2]
    assert sorted(made[0].splitlines()) == sorted(made[2].splitlines())


def test_bad_rows_are_no_part_of_the_shares_and_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.jsonl", [task("a0"), "{broken", {"instruction": " "}, task("a1")])
    b = write(tmp_path / "b.jsonl", [task(f"b{i}") for i in range(5)])
    sources = [{"path": str(p), "kind": "instruction"} for p in (a, b)]
    assert run(tmp_path, {"sources": sources, "mixing": {"method": "equal"}}) == 3
    assert "a.jsonl:2: not JSON" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    sources[0]["on_bad_row"] = "skip"
    assert run(tmp_path, {"sources": sources, "mixing": {"method": "equal"}}) == 0
    assert len(read(tmp_path / "out" / "records.jsonl")) == 4
    bad = read(tmp_path / "out" / "bad_rows.jsonl")
    assert [("a.jsonl:2" in row["reason"], "a.jsonl:3" in row["reason"]) for row in bad] == [
        (True, False),
        (False, True),
    ]


def test_more_than_there_is_is_rejected_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a.jsonl", [task(f"a{i}") for i in range(4)])
    assert run(tmp_path, {"sources": [{"path": str(a), "kind": "instruction"}], "mixing": {"num_records": 9}}) == 2
    error = capsys.readouterr().err
    assert "num_records 9 takes 9 records of source 'a'" in error
    assert "set oversample to true" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "mix.yaml"]


def test_instructions_beside_dialogues_become_the_messages_a_trainer_would_make(tmp_path: Path) -> None:
    tasks = [task("say hi", input="to Ann", demonstration="hello: hello"), task("say bye")]
    chat = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"))]
    sources = (
        MixSource(path=str(write(tmp_path / "tasks.jsonl", tasks)), kind="instruction"),
        MixSource(path=str(write(tmp_path / "chats.jsonl", [{"messages": chat, "source": "oasst"}])), kind="messages"),
    )
    spooled = spool_sources(sources, tmp_path / "spool", BadRows())
    composition = compose(MixingSettings(), spooled.names, spooled.sizes)
    with spooled.lines:
        lines = list(mixed_lines(spooled, composition, seed=0))
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_bytes(b"".join(lines))
    made = list(read_sequences(DataSource(path=str(mixed), kind="messages")))
    expected = [record for source in sources for record in read_sequences(source)]

    def conversations(records: list[Any]) -> list[tuple[tuple[str, str], ...]]:
        return sorted(tuple((m["role"], m["content"]) for m in record.messages) for record in records)

    assert conversations(made) == conversations(expected)
    # A record that says where it is from keeps that, unless the source is given a name.
    assert Counter(record["source"] for record in read(mixed)) == {"tasks": 2, "oasst": 1}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            [{"path": "a", "kind": "text"}, {"path": "b", "kind": "prompt"}],
            "kinds prompt, text, which make no records of one",
        ),
        (
            [{"path": "x/a.jsonl", "kind": "text"}, {"path": "y/a.csv", "kind": "text"}],
            "more than one source is called a",
        ),
        ([{"path": "a", "kind": "text"}], "weights holds 2 numbers for 1 sources"),
    ],
)
def test_configurations_that_cannot_be_meant(changes: list[dict[str, str]], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        MixConfig.model_validate(
            {"out_dir": "o", "sources": changes, "mixing": {"method": "weights", "weights": [1, 2]}}
        )


def test_instructions_of_every_shape_become_the_chats_that_a_trainer_makes_of_them(tmp_path: Path) -> None:
    """Read again, the mixture has the conversations of its sources, with what is learnt from of each."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [
        {"prompt": "p", "completion": "q", "task": "t"},
        {"prompt": turns, "completion": [{"role": "assistant", "content": "d"}]},
        {"instruction": "i", "input": "j", "output": "k", "demonstration": "l", "extra": 1},
    ]
    sources = [
        DataSource(path=str(write(tmp_path / "a.jsonl", rows)), kind="instruction"),
        DataSource(path=str(write(tmp_path / "b.jsonl", [{"messages": turns[:2]}])), kind="messages"),
    ]
    config = {"sources": [{"path": source.path, "kind": source.kind} for source in sources]}
    assert run(tmp_path, config) == 0
    made = read(tmp_path / "out" / "records.jsonl")
    assert not any({"prompt", "completion", "instruction", "output"} & record.keys() for record in made)
    assert {record.get("task") for record in made} == {"t", None}

    def learnt(source: DataSource) -> list[str]:
        found = []
        for record in read_sequences(source):
            assert isinstance(record, Conversation)
            roles = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
            targets = roles if record.targets is None else list(record.targets)
            found.append(json.dumps([record.messages, targets]))
        return found

    again = learnt(DataSource(path=str(tmp_path / "out" / "records.jsonl"), kind="messages"))
    assert sorted(again) == sorted(learnt(sources[0]) + learnt(sources[1]))
