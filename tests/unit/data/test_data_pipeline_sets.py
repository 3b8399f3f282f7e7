"""Sets of records: divided without overlap, the same way every time, and written with all their columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.config.data import DataSource
from rlhf_dist.config.data_set import DataSet
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.data.reader import read_preferences, read_prompts, read_sequences
from rlhf_dist.data.splits import divide, set_path, write_set

SHARES = {"a": 0.5, "b": 0.3, "c": 0.1}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(folder: Path, name: str, part: str = "", source: int = 0) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (folder / set_path(name, part, source)).read_text(encoding="utf-8").splitlines()
    ]


def test_parts_have_their_shares_and_no_record_in_common():
    parts = divide(list(range(1000)), SHARES, "0/x")
    assert {part: len(chosen) for part, chosen in parts.items()} == {"a": 500, "b": 300, "c": 100}
    assert len({i for chosen in parts.values() for i in chosen}) == 900
    assert all(chosen == sorted(chosen) for chosen in parts.values())


def test_shares_of_a_whole_leave_nothing():
    for num in (1, 7, 10, 333):
        parts = divide(list(range(num)), {"a": 0.7, "b": 0.2, "c": 0.1}, "0/x")
        assert sorted(i for chosen in parts.values() for i in chosen) == list(range(num))


def test_the_draw_depends_on_seed_and_set_only():
    about = [f"text {i}" for i in range(100)]
    assert divide(about, SHARES, "0/x") == divide(about, SHARES, "0/x")
    assert divide(about, SHARES, "0/x") != divide(about, SHARES, "1/x")
    assert divide(about, SHARES, "0/x") != divide(about, SHARES, "0/y")
    first = set(divide(about, SHARES, "0/x")["a"])
    assert first != set(range(50)), "not in file order"


def test_records_stay_where_they_are_when_others_are_added():
    about = [f"text {i}" for i in range(1000)]
    before, after = (divide(texts, SHARES, "0/x") for texts in (about, [*about, *(f"new {i}" for i in range(50))]))
    moved = {part: set(before[part]) - set(after[part]) for part in SHARES}
    assert sum(map(len, moved.values())) < 50, "only those at the borders"


def test_what_belongs_together_stays_together():
    about = [f"prompt {i // 7}" for i in range(210)]
    parts = divide(about, {"a": 0.5, "b": 0.5}, "0/x")
    prompts = [{about[i] for i in chosen} for chosen in parts.values()]
    assert not prompts[0] & prompts[1]
    assert [len(chosen) for chosen in parts.values()] == [105, 105]


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("instruction", [{"instruction": f"say {i // 2}", "output": f"o{i}"} for i in range(20)]),
        ("prompt", [{"prompt": f" say {i // 2}" + " " * (i % 2)} for i in range(20)]),
        ("text", [{"text": f"say {i // 2}"} for i in range(20)]),
        ("ratings", [{"prompt": f"say {i // 2}", "response": f"r{i}", "rating": i} for i in range(20)]),
        ("ratings", [{"response": f"say {i // 2}", "rating": i} for i in range(20)]),
        ("preference", [{"prompt": f"say {i // 2}", "chosen": f"c{i}", "rejected": "r"} for i in range(20)]),
        (
            "messages",
            [
                {"messages": [{"role": "user", "content": f"say {i // 2}"}, {"role": "assistant", "content": f"{i}"}]}
                for i in range(20)
            ],
        ),
    ],
)  # fmt: skip
def test_no_prompt_or_text_is_in_two_parts(kind: Any, rows: list[dict[str, Any]], tmp_path: Path):
    source = DataSource(path=write(tmp_path / "rows.jsonl", rows), kind=kind)
    write_set(DataSet(name="x", sources=(source,), parts={"a": 0.5, "b": 0.5}), 0, tmp_path)
    parts = [rows_of(tmp_path, "x", part) for part in ("a", "b")]
    assert [len(part) for part in parts] == [10, 10]
    numbers = [{rows.index(row) // 2 for row in part} for part in parts]
    assert not numbers[0] & numbers[1]


def test_columns_survive_and_can_be_read_as_other_kinds(tmp_path: Path):
    table = tmp_path / "reviews.txt"
    table.write_text("".join(f"{i}\t{i - 5}\tReview {i}.\r\n" for i in range(10)), encoding="utf-8")
    source = DataSource(path=str(table), kind="ratings", columns=("id", "rating", "text"), fields={"response": "text"})
    written = write_set(DataSet(name="reviews", sources=(source,)), 0, tmp_path)
    assert (written.num_records, written.num_unassigned) == (10, 0)
    assert rows_of(tmp_path, "reviews")[3] == {"id": "3", "rating": "-2", "text": "Review 3."}
    path = str(tmp_path / set_path("reviews", "", 0))
    assert len(list(read_sequences(DataSource(path=path, kind="text")))) == 10
    assert len(list(read_prompts(DataSource(path=path, kind="prompt", fields={"prompt": "text"})))) == 10
    again = DataSource(path=path, kind="ratings", fields={"response": "text"})
    pairs = [[pair.responses for pair in read_preferences(source, seed=0)] for source in (source, again)]
    assert pairs[0] == pairs[1], "the pairs made of the set are those of the file"


def test_every_source_has_a_file_of_its_own_and_the_rest_is_counted(tmp_path: Path):
    first = DataSource(path=write(tmp_path / "1.jsonl", [{"text": f"a{i}"} for i in range(30)]), kind="text", limit=20)
    second = DataSource(
        path=write(tmp_path / "2.jsonl", [{"body": {"text": f"b{i}"}} for i in range(20)]),
        kind="text",
        fields={"text": "body.text"},
    )
    written = write_set(DataSet(name="x", sources=(first, second), parts={"a": 0.5, "b": 0.25}), 0, tmp_path)
    assert (written.num_records, written.num_unassigned) == (40, 10)
    assert sum(written.files["a"].values()) == 20
    for part in ("a", "b"):
        for number, letter in enumerate("ab"):
            found = rows_of(tmp_path, "x", part, number)
            assert len(found) == written.files[part][set_path("x", part, number)]
            assert all((row.get("text") or row["body"]["text"]).startswith(letter) for row in found)


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("text", {"text": " "}, "is blank"),
        ("instruction", {"instruction": "a", "output": 3}, "not a string"),
        ("ratings", {"response": "a", "rating": "high"}, "not a finite number"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "equals its"),
        ("prompt", {"text": "a"}, "is missing"),
    ],
)
def test_records_that_cannot_be_used_are_named(kind: Any, row: dict[str, Any], expected: str, tmp_path: Path):
    source = DataSource(path=write(tmp_path / "rows.jsonl", [row]), kind=kind)
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{expected}"):
        write_set(DataSet(name="x", sources=(source,)), 0, tmp_path)


def test_a_part_may_not_be_empty(tmp_path: Path):
    source = DataSource(path=write(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}]), kind="text")
    with pytest.raises(DataError, match=r"part 'b' of set 'x' would be empty: its share 0\.1 of 2 records"):
        write_set(DataSet(name="x", sources=(source,), parts={"a": 0.9, "b": 0.1}), 0, tmp_path)


def test_a_mapping_to_no_column_is_invalid(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(ConfigError, match="does not have"):
        write_set(DataSet(name="x", sources=(DataSource(path=path, kind="text", fields={"txt": "text"}),)), 0, tmp_path)
