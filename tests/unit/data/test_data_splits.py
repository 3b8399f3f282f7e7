"""Held-out records: whole prompts, texts and labeled rows, near the share asked for, drawn by the seed."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf_dist.config.data import RewardData, SFTData
from rlhf_dist.config.templates import TemplateSettings
from rlhf_dist.core.errors import DataError
from rlhf_dist.core.random import permutation
from rlhf_dist.curation.templates import TemplateReport, render_sources
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.loading import load_preferences, load_sft
from rlhf_dist.data.splits import hold_out


def prompts(part, tokenizer) -> set[str]:
    """Prompts of a set, out of its tokens."""
    sequences = part.batch(range(len(part))).sequences
    texts = [tokenizer.decode(row[:length]) for row, length in zip(sequences.tokens, sequences.lengths, strict=True)]
    return {text.partition("### Response:")[0] for text in texts}


PAIRS = [{"prompt": f"p{i % 10}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
RANKINGS = [{"prompt": f"p{i % 10}", "responses": [f"good {i}", f"fair {i}", "bad"]} for i in range(40)]
RATINGS = [{"prompt": f"p{i % 10}", "response": f"text {i}", "rating": i // 10} for i in range(80)]
MESSAGES = [
    {"prompt": [{"role": "user", "content": f"p{i % 10}"}], "chosen": f"messages {i}", "rejected": "bad"}
    for i in range(40)
]


@pytest.mark.parametrize(
    ("kind", "rows", "sizes"),
    [
        ("preference", PAIRS, (28, 12)),
        ("preference", RANKINGS, (28, 12)),
        ("preference", PAIRS + RANKINGS + MESSAGES, (84, 36)),  # the same prompts in three forms
        ("ratings", RATINGS, (28, 12)),
    ],
)
def test_no_prompt_is_on_both_sides(source, tokenizer, kind, rows, sizes):
    data = RewardData(train=(source(kind, rows),), eval_fraction=0.3)
    split = load_preferences(data, tokenizer, 0)
    assert split.eval is not None
    assert (len(split.train), len(split.eval)) == sizes
    train, held_out = prompts(split.train, tokenizer), prompts(split.eval, tokenizer)
    assert (len(train), len(held_out)) == (7, 3)
    assert not train & held_out
    again, other = load_preferences(data, tokenizer, 0).eval, load_preferences(data, tokenizer, 1).eval
    assert prompts(again, tokenizer) == held_out != prompts(other, tokenizer)


TWICE = [{"instruction": f"say {i % 10} {' ' * (i // 20)}", "output": f"so {i}"} for i in range(40)]
TEXTS = [{"text": f"text {i % 10}"} for i in range(40)]
CHATS = [
    {"messages": [{"role": role, "content": text} for role, text in (("user", f"say {i % 10}"), ("assistant", f"{i}"))]}
    for i in range(40)
]


@pytest.mark.parametrize(("kind", "rows"), [("instruction", TWICE), ("text", TEXTS), ("messages", CHATS)])
def test_no_prompt_or_text_of_sft_is_on_both_sides(source, tokenizer, kind, rows):
    split = load_sft(SFTData(train=(source(kind, rows),), eval_fraction=0.3), tokenizer, 0, keep_records=True)
    assert split.eval is not None
    assert (len(split.train), len(split.eval)) == (28, 12)

    def asked(part):
        return {record.text if kind == "text" else record.messages[0]["content"].split()[1] for record in part.records}

    assert (len(asked(split.train)), len(asked(split.eval))) == (7, 3)
    assert not asked(split.train) & asked(split.eval)


@pytest.mark.parametrize("written", [False, True])
def test_no_labeled_row_is_on_both_sides(source, write, tokenizer, written):
    labels = {"column": "label", "names": {"0": "bad", "1": "good"}}
    templates = TemplateSettings.model_validate({"builtin": "classification", "per_row": None, "labels": labels})
    wanted = source("instruction", [{"text": f"film {i}.", "label": i % 2} for i in range(20)], templates=templates)
    if written:  # by `data templates`, for a later run to read
        records = list(render_sources([wanted], BadRows(), TemplateReport()))
        wanted = wanted.model_copy(update={"path": write("made.jsonl", records), "templates": None})
    split = load_sft(SFTData(train=(wanted,), eval_fraction=0.25), tokenizer, 0, keep_records=True)
    assert split.eval is not None

    def rows(part):
        texts = [" ".join(message["content"] for message in record.messages) for record in part.records]
        return {found[0] for text in texts if (found := re.findall(r"film \d+", text))}

    assert (len(rows(split.train)), len(rows(split.eval))) == (15, 5)
    assert not rows(split.train) & rows(split.eval)


def test_demonstrations_are_not_taken_from_what_is_held_out():
    templates = {"builtin": "classification", "num_demonstrations": 2}
    train = [{"path": "a.jsonl", "kind": "instruction", "templates": templates}]
    with pytest.raises(
        ValidationError, match=r"0\.1, but .*a\.jsonl has templates\.num_demonstrations 2.*name held-out"
    ):
        SFTData.model_validate({"train": train, "eval_fraction": 0.1})
    held_out = [{"path": "b.jsonl", "kind": "instruction"}]
    assert SFTData.model_validate({"train": train, "eval_fraction": 0.1, "eval": held_out}).eval
    assert SFTData.model_validate({"train": train}).eval_fraction == 0


def test_pairs_without_a_prompt_are_split_one_by_one(source, tokenizer):
    rows = [{"response": f"text {i}", "rating": i} for i in range(40)]
    split = load_preferences(RewardData(train=(source("ratings", rows),), eval_fraction=0.25), tokenizer, 0)
    assert split.eval is not None
    assert (len(split.train), len(split.eval)) == (15, 5)


def test_one_prompt_cannot_be_split(source, tokenizer):
    rows = [{"prompt": "p", "chosen": f"good {i}", "rejected": "bad"} for i in range(12)]
    data = RewardData(train=(source("preference", rows),), eval_fraction=0.25)
    with pytest.raises(DataError, match=r"0\.25 cannot split 12 records of one prompt, .*data\.eval, or set eval_frac"):
        load_preferences(data, tokenizer, 0)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 7), min_size=2, max_size=40), st.floats(0.02, 0.98), st.integers(0, 5))
def test_groups_stay_whole_and_no_choice_of_groups_is_nearer(keys, fraction, seed):
    wanted = round(len(keys) * fraction)
    if not 0 < wanted < len(keys) or len(set(keys)) == 1:
        with pytest.raises(DataError, match="eval_fraction"):
            hold_out(keys, fraction, seed)
        return
    train, held_out = hold_out(keys, fraction, seed)
    assert sorted(train + held_out) == list(range(len(keys)))
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    assert not {keys[i] for i in held_out} & {keys[i] for i in train}
    sizes = [keys.count(key) for key in set(keys)]
    possible = {sum(some) for num in range(1, len(sizes)) for some in combinations(sizes, num)}
    assert abs(len(held_out) - wanted) == min(abs(size - wanted) for size in possible)


def test_records_that_share_nothing_are_the_first_of_the_drawn_order():
    """The draw of earlier releases: files without repeated prompts split as they did."""
    drawn = permutation(3, "data/eval_split", 0, 50).tolist()[:10]
    assert hold_out(list(range(50)), 0.2, 3)[1] == sorted(drawn)
