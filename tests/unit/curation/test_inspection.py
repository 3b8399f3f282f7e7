"""What is said of a data set, against counts by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.tiny import tiny_tokenizer

from rlhf_dist.config.data import DataSettings, DataSource, RewardData, SFTData
from rlhf_dist.curation.config.inspect import InspectSettings
from rlhf_dist.curation.dataset_view import View
from rlhf_dist.curation.inspection import SetReport, bad_row_kinds, inspect_set, length_numbers, overlap_numbers
from rlhf_dist.data.bad_rows import BadRow
from rlhf_dist.data.loading import load_preferences, load_prompts, load_sft
from rlhf_dist.data.tokenizer import load_tokenizer

LONG = "Explain in two sentences why the sea is salt and the lakes that feed it are not, for a child of nine years."
RECORDS = [
    {"instruction": "Name a bird.", "output": "Wren", "task": "names"},
    {"instruction": "Name a  BIRD.", "output": "wren", "task": "names"},
    {"instruction": LONG, "output": "Rain.", "task": "why"},
    {"instruction": LONG.replace("nine", "ten"), "output": "Rain.", "task": "why"},
    {"instruction": "Скажи слово", "output": "слово\ufffd", "task": 7},
    {"instruction": "Name a bird.", "output": "Owl"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(path)
    return load_tokenizer(str(path))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def _write(name: str, rows: list[Any]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return _write


def sft_view(data: SFTData, tokenizer: Any, seed: int = 0) -> View:
    return View("training records", load_sft(data, tokenizer, seed, keep_records=True).train, data.train, tokenizer)


def look(view: View, tokenizer: Any, limit: int = 1000, **options: Any) -> SetReport:
    return inspect_set(view, tokenizer, InspectSettings(**options), seed=0, max_length_tokens=limit)


def test_keeping_records_changes_nothing_that_is_trained_on(write: Any, tokenizer: Any):
    data = SFTData.model_validate(
        {"train": [{"path": write("a.jsonl", RECORDS), "kind": "instruction"}], "eval_fraction": 0.4}
    )
    plain, kept = (load_sft(data, tokenizer, 3, keep_records=keep) for keep in (False, True))
    for side in ("train", "eval"):
        a, b = getattr(plain, side), getattr(kept, side)
        items = range(len(a))
        assert len(a) == len(b)
        assert torch.equal(a.batch(items).tokens, b.batch(items).tokens)
        assert torch.equal(a.batch(items).loss_mask, b.batch(items).loss_mask)
        assert not a.records
        assert len(b.records) == len(b)
    with pytest.raises(ValueError, match="keep_records=True"):
        View("x", plain.train, data.train, tokenizer)


def test_numbers_of_instructions(write: Any, tokenizer: Any):
    more = [{"instruction": "Say b.", "output": "b"}]
    sources = [
        {"path": write("a.jsonl", RECORDS), "kind": "instruction"},
        {"path": write("b.jsonl", more), "kind": "instruction", "name": "letters"},
    ]
    data = SFTData.model_validate({"train": sources})
    view = sft_view(data, tokenizer)
    numbers = look(view, tokenizer).numbers
    batch = view.dataset.batch(range(7))
    assert numbers["records used"] == numbers["sequences"] == 7
    assert numbers["tokens"] == int(batch.lengths.sum())
    assert numbers["tokens learnt from"] == int(batch.loss_mask.sum())
    assert [(row["name"], row["sequences"]) for row in numbers["sources"]] == [("a", 6), ("letters", 1)]
    assert numbers["sources"][1]["tokens"] == int(batch.lengths[6])
    # A column `task` that holds a number is no task, and no error either: the trainer does not read it.
    assert {row["name"]: row["sequences"] for row in numbers["tasks"]} == {"(none)": 3, "names": 2, "why": 2}
    assert (numbers["duplicates"]["exact"], numbers["duplicates"]["near"]) == (1, 1)
    exact, near = numbers["duplicates"]["first"]
    assert (exact["location"][-7:], exact["same as"][-7:]) == ("jsonl:2", "jsonl:1")
    assert (near["location"][-7:], near["same as"][-7:]) == ("jsonl:4", "jsonl:3")
    assert numbers["repeated prompts"] == 2
    assert {row["oddity"]: row["records"] for row in numbers["oddities"]} == {"replacement character": 1}
    assert [(row["script"], row["records mostly in it"]) for row in numbers["scripts"]] == [
        ("Latin", 6),
        ("Cyrillic", 1),
    ]
    json.dumps(numbers)


def test_near_duplicates_are_looked_for_up_to_a_size(write: Any, tokenizer: Any):
    data = SFTData.model_validate({"train": [{"path": write("a.jsonl", RECORDS), "kind": "instruction"}]})
    found = look(sft_view(data, tokenizer), tokenizer, max_near=5).numbers["duplicates"]
    assert (found["exact"], found["near"]) == (1, None)
    assert "max_near 5" in found["note"]


def test_what_was_cut_and_what_came_of_one_text(write: Any, tokenizer: Any):
    source = {
        "path": write("a.jsonl", [*RECORDS[:2], {"instruction": "Go on", "output": "and on " * 40}]),
        "kind": "instruction",
    }
    texts = {"path": write("t.jsonl", [{"text": "a calm crime " * 30}]), "kind": "text"}
    data = SFTData.model_validate({"train": [source, texts], "max_length_tokens": 80})
    view = sft_view(data, tokenizer)
    assert view.cut.tolist() == [False, False, True] + [False] * (len(view) - 3)
    assert len(view) > 5
    assert view.first_items() == [0, 1, 2, 3]
    report = look(view, tokenizer, 80)
    assert report.numbers["records with a cut response"] == 1
    assert report.numbers["duplicates"]["exact"] == 1  # of the two birds: the parts of one text are no duplicates
    assert any(sequence.cut for example in report.examples for sequence in example.sequences)


def test_lengths():
    found = length_numbers(np.array([3, 3, 4, 200]), 200)
    assert (found["shortest"], found["longest"], found["p50"], found["at max_length_tokens"]) == (3, 200, 3, 1)
    counts, edges = found["histogram"]["counts"], found["histogram"]["edges"]
    assert sum(counts) == 4
    assert edges[0] == 3
    assert edges[-1] > 200
    assert length_numbers(np.array([5]), 9)["histogram"] == {"edges": [5, 6], "counts": [1]}


def test_examples_are_drawn_by_the_seed_and_the_extremes_are_among_them(write: Any, tokenizer: Any):
    rows = [{"instruction": f"Say {i}", "output": "x" * (i + 1)} for i in range(40)] + [
        {"instruction": "odd", "output": "a\u200bb"}
    ]
    data = SFTData.model_validate({"train": [{"path": write("a.jsonl", rows), "kind": "instruction"}]})
    view = sft_view(data, tokenizer)
    first, again = (look(view, tokenizer, num_examples=3, num_extremes=1).examples for _ in range(2))
    assert first == again
    other = inspect_set(view, tokenizer, InspectSettings(num_examples=3, num_extremes=1), seed=1, max_length_tokens=99)
    assert [e.location for e in other.examples[:3]] != [e.location for e in first[:3]]
    assert len({example.location for example in first}) == len(first)
    by_reason = {example.why: example for example in first}
    assert by_reason["odd characters"].oddities == ("zero-width characters",)
    assert by_reason["among the longest"].location.endswith(":40")
    for example in first:
        (sequence,) = example.sequences
        item = int(example.location.rpartition(":")[2]) - 1
        assert "".join(p.text for p in sequence.pieces if p.target) == rows[item]["output"] + tokenizer.eos_token


def test_pairs_rankings_and_what_a_reward_model_would_learn_from_their_form(write: Any, tokenizer: Any):
    rows = [
        {"prompt": "Hello?", "chosen": "yes indeed", "rejected": "no", "margin": 2},
        {"prompt": "Hello?", "chosen": "no", "rejected": "yes indeed", "margin": 1},
        {"prompt": "Rank", "responses": ["aaaa", "bb", "c"], "ratings": [5, 3, 3]},
    ]
    data = RewardData.model_validate({"train": [{"path": write("p.jsonl", rows), "kind": "preference"}]})
    split = load_preferences(data, tokenizer, 0, keep_records=True)
    view = View("training pairs", split.train, data.train, tokenizer)
    report = look(view, tokenizer, num_examples=3)
    found = report.numbers["preferences"]
    assert found["share of items whose best response is longer than the worst"] == pytest.approx(2 / 3, abs=1e-3)
    assert found["pairs that another pair contradicts"] == 1
    assert found["margins"]["most"] == 2
    ranking = next(example for example in report.examples if example.location.endswith(":3"))
    assert [(s.label, s.rating) for s in ranking.sequences] == [("rank 1", 5), ("rank 2", 3), ("rank 2", 3)]
    pair = next(example for example in report.examples if example.location.endswith(":1"))
    assert [s.label for s in pair.sequences] == ["chosen", "rejected"]
    assert pair.margin == 2
    responses = ["".join(p.text for p in s.pieces if p.target and not p.special) for s in pair.sequences]
    assert [text.strip() for text in responses] == ["yes indeed", "no"]
    kept = View("x", split.train.keeping([2]), data.train, tokenizer)
    assert [kept.location(0)[-2:], len(kept)] == [":3", 1]


def test_prompts(write: Any, tokenizer: Any):
    sources = [
        DataSource(path=write("p.jsonl", [{"prompt": "One"}, {"prompt": "one"}, {"prompt": "Two"}]), kind="prompt")
    ]
    view = View("prompts", load_prompts(sources, tokenizer, 100, DataSettings(), keep_records=True), sources, tokenizer)
    numbers = look(view, tokenizer, num_examples=1).numbers
    assert (numbers["sequences"], numbers["duplicates"]["exact"], numbers["tokens of responses"]) == (3, 1, 0)
    assert numbers["sources"][0]["name"] == "p"


def test_what_is_held_out_and_trained_on_as_well(write: Any, tokenizer: Any):
    held = [{"instruction": "name a bird.", "output": "WREN"}, {"instruction": "Name a bird.", "output": "Duck"}]
    held.append({"instruction": "New", "output": "new"})
    sets = {"train": [{"path": write("a.jsonl", RECORDS), "kind": "instruction"}]}
    data = SFTData.model_validate(sets | {"eval": [{"path": write("e.jsonl", held), "kind": "instruction"}]})
    loaded = load_sft(data, tokenizer, 0, keep_records=True)
    train, held_out = (View(n, d, data.train, tokenizer) for n, d in (("a", loaded.train), ("b", loaded.eval)))
    found = overlap_numbers(train, held_out)
    assert found["held-out records that are trained on"] == 1
    assert found["held-out prompts that are trained on"] == 2
    assert [place[-7:] for place in found["first prompts"]] == ["jsonl:1", "jsonl:2"]


def test_a_datasets_directory_is_looked_at_as_it_is(tmp_path: Path, tokenizer: Any):
    path = tmp_path / "ds"
    Dataset.from_list([{"instruction": "Say a.", "output": "a"}] * 2).save_to_disk(str(path))
    data = SFTData.model_validate({"train": [{"path": str(path), "kind": "instruction"}]})
    numbers = look(sft_view(data, tokenizer), tokenizer).numbers
    assert numbers["duplicates"]["exact"] == 1
    assert numbers["sources"][0]["name"] == "ds"


def test_bad_rows_are_grouped_by_what_is_wrong():
    reasons = [
        "a.jsonl:1: field 'output' is empty",
        "a.jsonl:22: field 'output' is empty",
        "b.jsonl:3: not JSON (column 5)",
    ]
    found = bad_row_kinds([BadRow(reason) for reason in reasons])
    assert [(row["rows"], row["first"]) for row in found] == [(2, reasons[0]), (1, reasons[2])]
