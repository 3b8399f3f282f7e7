"""The sets of an SFT run: names, shares, tasks that are held out, plain text beside the records."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.config.data import DATA_SUFFIXES, DataSource, SFTData, source_names
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.data.files import read_rows
from rlhf_dist.data.loading import load_sft, mixed_order, shares_of

Write = Callable[..., str]
SMALL, LARGE = 6, 30


def instructions(num: int, word: str, task: str | None = None) -> list[dict[str, Any]]:
    said = {} if task is None else {"task": task}
    return [{"instruction": f"say {word} {i}", "output": f"{word} {i}"} | said for i in range(num)]


@pytest.fixture
def of(write: Write) -> Callable[..., SFTData]:
    """Data of a small and a large set of one task each, and of one with two tasks; `changes` are laid over it."""
    sources = [
        {"path": write("small.jsonl", instructions(SMALL, "small")), "kind": "instruction"},
        {"path": write("large.jsonl", instructions(LARGE, "large")), "kind": "instruction"},
        {
            "path": write("two.jsonl", instructions(8, "sum", "sums") + instructions(4, "poem", "poems")),
            "kind": "instruction",
        },
    ]
    return lambda **changes: SFTData.model_validate({"train": sources} | changes)


def texts(tokenizer: Any, dataset: Any, items: Any = None) -> list[str]:
    """The targets of items, readable."""
    batch = dataset.batch(torch.arange(len(dataset)) if items is None else items)
    return [tokenizer.decode(row[mask])[:-4] for row, mask in zip(batch.tokens, batch.loss_mask, strict=True)]


# -- names ---------------------------------------------------------------------------------------------------------------


def test_names_come_from_paths_and_are_made_unique():
    paths = ["a/train.jsonl", "b/train.jsonl", "train", "org/v1.5", "${data.reviews.sft}", "x.tsv", "given.txt"]
    sources = [DataSource(path=path, kind="text") for path in paths]
    sources[5] = DataSource(path="x.tsv", kind="text", name="train-2")
    assert source_names(sources) == ["train", "train-3", "train-4", "v1.5", "reviews.sft", "train-2", "given"]
    same = [DataSource(path=path, kind="text", name="mine") for path in paths[:2]]
    assert source_names(same) == ["mine", "mine"]


def test_the_endings_that_names_leave_out_are_those_that_can_be_read(tmp_path: Path):
    with pytest.raises(DataError, match="files end in one of") as error:
        next(read_rows(DataSource(path=str(tmp_path / "x.xml"), kind="text")))
    listed = str(error.value).split("one of ")[1].split(";")[0]
    assert set(listed.split(", ")) == set(DATA_SUFFIXES)


def test_sources_of_one_name_are_one_set(tokenizer: Any, of: Any, write: Write):
    more = {"path": write("more.jsonl", instructions(3, "more")), "kind": "instruction", "name": "small"}
    data = of()
    sources = [*[json.loads(source.model_dump_json()) for source in data.train], more]
    sources[0]["name"] = "small"
    train = load_sft(of(train=sources), tokenizer, 0).train
    assert {name: len(items) for name, items in train.groups.items()} == {"small": 9, "large": LARGE, "two": 12}
    assert texts(tokenizer, train, train.groups["small"])[SMALL:] == ["more 0", "more 1", "more 2"]
    # The sampler of mixtures counts on it.
    assert torch.equal(torch.cat(list(train.groups.values())), torch.arange(len(train)))


# -- tasks ---------------------------------------------------------------------------------------------------------------


def test_a_held_out_task_is_trained_on_nowhere(tokenizer: Any, of: Any):
    sets = load_sft(of(hold_out_tasks=["poems", "small"], eval_fraction=0.25), tokenizer, 0)
    trained = texts(tokenizer, sets.train)
    assert not any(text.startswith(("poem", "small")) for text in trained)
    assert set(sets.train.groups) == {"large", "two"}
    assert sets.eval is not None
    groups = {name: texts(tokenizer, sets.eval, items) for name, items in sets.eval.groups.items()}
    assert set(groups) == {"source/large", "source/two", "task/poems", "task/small"}
    assert groups["task/poems"] == [f"poem {i}" for i in range(4)]
    assert groups["task/small"] == [f"small {i}" for i in range(SMALL)]  # a record without a task is of its set's
    # A quarter of what is left, and all in all every record once.
    assert len(groups["source/large"]) + len(groups["source/two"]) == round((LARGE + 8) / 4)
    assert sorted([*trained, *itertools.chain(*groups.values())]) == sorted(
        texts(tokenizer, load_sft(of(), tokenizer, 0).train)
    )


def test_records_of_eval_that_are_of_a_held_out_task_count_with_it(tokenizer: Any, of: Any, write: Write):
    held_out = write("held.jsonl", instructions(2, "poem", "poems") + instructions(3, "sum", "sums"))
    data = of(hold_out_tasks=["poems"], eval=[{"path": held_out, "kind": "instruction"}])
    sets = load_sft(data, tokenizer, 0)
    assert sets.eval is not None
    assert {name: len(items) for name, items in sets.eval.groups.items()} == {"task/poems": 6, "source/held": 3}


def test_tasks_in_a_column_of_another_name(tokenizer: Any, write: Write):
    rows = [{"text": f"text {i}", "category": "even" if i % 2 == 0 else "odd"} for i in range(6)]
    source = {"path": write("t.jsonl", rows), "kind": "text", "fields": {"task": "category"}}
    sets = load_sft(SFTData.model_validate({"train": [source], "hold_out_tasks": ["odd"]}), tokenizer, 0)
    assert len(sets.train) == 3
    assert sets.eval is not None
    assert list(sets.eval.groups) == ["task/odd"]


def test_an_unrelated_column_named_task_does_no_harm(tokenizer: Any, write: Write):
    source = {"path": write("t.jsonl", [{"text": "a", "task": 7}]), "kind": "text"}
    assert len(load_sft(SFTData.model_validate({"train": [source]}), tokenizer, 0).train) == 1
    with pytest.raises(DataError, match="field 'task' is 7, a int, not a string"):
        load_sft(SFTData.model_validate({"train": [source], "hold_out_tasks": ["a"]}), tokenizer, 0)


def test_tasks_that_cannot_be_held_out(tokenizer: Any, of: Any):
    with pytest.raises(ConfigError) as error:
        load_sft(of(hold_out_tasks=["poem"]), tokenizer, 0)
    assert "names 'poem', a task that no record of data.train or data.eval has; did you mean 'poems'?" in str(
        error.value
    )
    assert "tasks are large (30), sums (8), small (6), poems (4)" in str(error.value)
    with pytest.raises(DataError, match=r"holds out all 48 records of data\.train and leaves none to train on"):
        load_sft(of(hold_out_tasks=["poems", "sums", "small", "large"]), tokenizer, 0)


# -- shares --------------------------------------------------------------------------------------------------------------


def drawn_of(order: Any, train: Any, count: int) -> dict[str, int]:
    """How many of the first `count` items are of each set."""
    items = order.indices(0, count)
    return {name: int(torch.isin(items, members).sum()) for name, members in train.groups.items()}


@pytest.mark.parametrize(
    ("mixing", "counts"),
    [
        ({}, {"small": 6, "large": 30, "two": 12}),
        ({"cap": 12}, {"small": 6, "large": 12, "two": 12}),
        ({"method": "equal"}, {"small": 6, "large": 6, "two": 6}),
        ({"method": "weights", "weights": [1, 4, 2]}, {"small": 6, "large": 24, "two": 12}),
        # 30 : 60 : 30 of 48 in all, where the small set is met twice.
        ({"method": "weights", "weights": [1, 2, 1], "oversample": True}, {"small": 12, "large": 24, "two": 12}),
    ],
)
def test_an_epoch_has_the_shares_that_were_asked_for(tokenizer: Any, of: Any, mixing: Any, counts: dict[str, int]):
    data = of(mixing=mixing)
    train = load_sft(data, tokenizer, 0).train
    order = mixed_order(data, train, seed=0)
    assert order is not None
    assert order.num_items == sum(counts.values())
    assert drawn_of(order, train, order.num_items) == counts
    shares = {row["source"]: row for row in shares_of(train, order)}
    for name, count in counts.items():
        assert shares[name]["taken"] == count
        assert shares[name]["share"] == pytest.approx(count / sum(counts.values()), abs=1e-6)
        assert shares[name]["epochs"] == pytest.approx(count / len(train.groups[name]), abs=1e-4)
    assert sum(row["share_of_tokens"] for row in shares.values()) == pytest.approx(1, abs=1e-5)


def test_what_is_held_out_has_no_share(tokenizer: Any, of: Any):
    data = of(mixing={"method": "weights", "weights": [1, 2, 1]}, hold_out_tasks=["small", "sums"])
    train = load_sft(data, tokenizer, 0).train
    order = mixed_order(data, train, seed=0)
    assert order is not None
    assert drawn_of(order, train, order.num_items) == {"large": 8, "two": 4}


def test_shares_that_cannot_be_had_are_invalid_with_their_section(tokenizer: Any, of: Any):
    data = of(mixing={"method": "equal", "num_records": 90})
    train = load_sft(data, tokenizer, 0).train
    with pytest.raises(ConfigError, match=r"data\.mixing: num_records 90 takes 30 records of source 'small'"):
        mixed_order(data, train, seed=0)


def test_without_mixing_shares_are_those_of_the_records(tokenizer: Any, of: Any):
    data = of()
    train = load_sft(data, tokenizer, 0).train
    assert mixed_order(data, train, seed=0) is None
    rows = shares_of(train, None)
    assert [(row["source"], row["taken"], row["epochs"]) for row in rows] == [
        ("small", 6, 1.0),
        ("large", 30, 1.0),
        ("two", 12, 1.0),
    ]
    assert "rate" not in rows[0]
    tokens = [float(train.lengths[items.numpy()].sum()) for items in train.groups.values()]
    assert [row["share_of_tokens"] for row in rows] == pytest.approx([n / sum(tokens) for n in tokens], abs=1e-6)


# -- plain text ----------------------------------------------------------------------------------------------------------


def plain(write: Write, name: str, num: int) -> dict[str, Any]:
    return {"path": write(name, [{"text": f"{name} {i}"} for i in range(num)]), "kind": "text"}


def test_pretraining_text_is_a_set_of_its_own(tokenizer: Any, of: Any, write: Write):
    text = plain(write, "web.jsonl", 10)
    sets = load_sft(of(pretraining=[text]), tokenizer, 0)
    assert len(sets.train) == SMALL + LARGE + 12
    assert (len(sets.pretraining or ()), sets.eval_pretraining) == (10, None)
    sets = load_sft(of(pretraining=[text], eval_fraction=0.2), tokenizer, 0)
    assert (len(sets.pretraining or ()), len(sets.eval_pretraining or ())) == (8, 2)
    sets = load_sft(of(pretraining=[text], eval_pretraining=[plain(write, "held.jsonl", 3)]), tokenizer, 0)
    assert (len(sets.pretraining or ()), len(sets.eval_pretraining or ()), sets.eval) == (10, 3, None)


def test_too_little_text_to_hold_some_out_is_invalid_with_its_key(tokenizer: Any, of: Any, write: Write):
    with pytest.raises(DataError, match=r"data\.pretraining: data.eval_fraction 0.2 of 1 records holds out 0"):
        load_sft(of(pretraining=[plain(write, "one.jsonl", 1)], eval_fraction=0.2), tokenizer, 0)


def test_the_last_turn_only_and_a_system_message_for_models_without(write: Write, tokenizer: Any):
    chat = [
        {"role": role, "content": f"{role} {i}"}
        for i, role in enumerate(("system", "user", "assistant", "user", "assistant"))
    ]
    source = {"path": write("chat.jsonl", [{"messages": chat}]), "kind": "messages"}

    def loaded(**changes: Any) -> tuple[str, str]:
        train = load_sft(SFTData.model_validate({"train": [source]} | changes), tokenizer, 0).train
        return texts(tokenizer, train)[0], tokenizer.decode(train.batch(torch.arange(1)).tokens[0])

    assert loaded()[0] == "assistant 2</s>assistant 4"
    targets, whole = loaded(train_on="last")
    assert targets == "assistant 4"
    assert "assistant 2" in whole
    targets, whole = loaded(train_on="last", system="merge_into_user")
    assert targets == "assistant 4"
    assert "system 0\n\nuser 1" in whole
