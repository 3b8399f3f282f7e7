"""Held-out records: whole prompts of preferences, near the share asked for, drawn by the seed."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.algo.random import permutation
from rlhf_dist.config import RewardData
from rlhf_dist.data import load_preferences
from rlhf_dist.data.splitting import hold_out
from rlhf_dist.errors import DataError


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
    records = list(enumerate(keys))
    wanted = round(len(records) * fraction)
    if not 0 < wanted < len(records) or len(set(keys)) == 1:
        with pytest.raises(DataError, match="eval_fraction"):
            hold_out(records, fraction, seed, lambda record: record[1])
        return
    train, held_out = hold_out(records, fraction, seed, lambda record: record[1])
    assert sorted(train + held_out) == records
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    assert not {key for _, key in held_out} & {key for _, key in train}
    sizes = [keys.count(key) for key in set(keys)]
    possible = {sum(some) for num in range(1, len(sizes)) for some in combinations(sizes, num)}
    assert abs(len(held_out) - wanted) == min(abs(size - wanted) for size in possible)


@pytest.mark.parametrize("together", [None, lambda record: record])
def test_records_that_share_nothing_are_the_first_of_the_drawn_order(together):
    """The draw of releases before prompts were kept whole: files without repeated prompts split as they did."""
    drawn = permutation(3, "data/eval_split", 0, 50).tolist()[:10]
    assert hold_out(list(range(50)), 0.2, 3, together)[1] == sorted(drawn)
