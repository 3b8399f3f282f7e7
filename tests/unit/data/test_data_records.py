"""Duplicate records, and pairs that contradict each other: counted, with places, and shown at the start."""

from __future__ import annotations

import pytest

from rlhf_dist.config.data import DataSettings, DataSource
from rlhf_dist.data.loading import load_pairs, load_prompts, load_sequences
from rlhf_dist.data.records import arranged
from rlhf_dist.run.run_summary import describe_data


def lines(places) -> list[list[str]]:
    """Line numbers of `PLACE as PLACE`."""
    return [
        [place.rpartition(":")[2] for place in both.split(" as " if " as " in both else " against ")] for both in places
    ]


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("kind", "rows", "expected"),
    [
        (
            "instruction",
            [{"instruction": i, "output": o} for i, o in (("a", "b"), ("a", "c"), ("a", "b"), ("b", "a"), ("a", "b"))],
            [["3", "1"], ["5", "1"]],
        ),
        ("messages", [{"messages": CHAT}, {"messages": [*CHAT, *CHAT]}, {"messages": CHAT}], [["3", "1"]]),
        ("text", [{"text": "a"}, {"text": "b"}, {"text": "b"}], [["3", "2"]]),
        ("text", [{"text": "a"}, {"text": "A"}, {"text": "a b"}], []),
    ],
)
def test_records_that_are_duplicates_are_counted_and_trained_on(source, tokenizer, kind, rows, expected):
    data = load_sequences([source(kind, rows)], DataSettings(), tokenizer)
    assert (len(data), data.report.num_duplicates) == (len(rows), len(expected))
    assert lines(data.report.duplicates) == expected
    assert ("training records: duplicates" in describe_data(training_records=data)) == bool(expected)


def test_duplicates_across_files_and_of_prompts(source, write, tokenizer):
    first = source("prompt", [{"prompt": "a"}, {"prompt": "b"}])
    second = DataSource(path=write("second.jsonl", [{"prompt": "b"}]), kind="prompt")
    data = load_prompts([first, second], tokenizer, 100, DataSettings())
    assert data.report.duplicates == (f"{second.path}:1 as {first.path}:2",)
    summary = describe_data(prompts=data)
    assert summary["prompts: duplicates"] == f"1 ({second.path}:1 as {first.path}:2, ...)"


def test_a_file_given_twice_and_a_text_in_chunks(source, tokenizer):
    text = source("text", [{"text": "một hai ba bốn năm sáu bảy tám chín mười " * 5}])
    settings = DataSettings(max_length_tokens=16)
    once, twice = (load_sequences([text] * times, settings, tokenizer) for times in (1, 2))
    assert len(once) > 2
    assert (once.report.num_duplicates, twice.report.num_duplicates) == (0, 1)


def test_pairs_that_are_duplicates_and_pairs_that_contradict(source, tokenizer):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},  # against the first
        {"prompt": "q", "chosen": "b", "rejected": "a"},  # of another prompt
        {"prompt": "p", "chosen": "a", "rejected": "b"},  # twice, and against the second
        {"prompt": "p", "chosen": "a", "rejected": "c"},
        {"prompt": "q", "responses": ["c", "a", "b"]},  # a over b, against the third
        {"prompt": "q", "responses": ["d", "b", "a"], "ratings": [2, 1, 1]},  # a tie contradicts nothing
    ]
    report = load_pairs([source("preference", rows)], DataSettings(), tokenizer, 0).report
    assert (report.num_duplicates, lines(report.duplicates)) == (1, [["4", "1"]])
    assert report.num_contradictions == 3
    assert lines(report.contradictions) == [["2", "1"], ["4", "2"], ["6", "3"]]
    assert set(report.losses()) == {"duplicates", "contradicting pairs"}


def test_a_ranking_with_other_ranks_is_no_duplicate(source, tokenizer):
    rows = [{"prompt": "p", "responses": ["a", "b", "c"], "ratings": ratings} for ratings in ([3, 2, 1], [3, 2, 2])]
    report = load_pairs([source("preference", rows)], DataSettings(), tokenizer, 0).report
    assert (report.num_duplicates, report.num_contradictions) == (0, 0)


def test_many_are_counted_and_the_first_are_listed(source, tokenizer):
    report = load_sequences([source("text", [{"text": "a"}] * 50)], DataSettings(), tokenizer).report
    assert (report.num_duplicates, len(report.duplicates)) == (49, 20)


S, U, A = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))


def joined(*messages):
    return {"role": messages[-1]["role"], "content": "\n\n".join(message["content"] for message in messages)}


@pytest.mark.parametrize(
    ("messages", "settings", "expected", "moved"),
    [
        ((S, U, A, U, A), ("keep", "keep"), (S, U, A, U, A), [0, 1, 2, 3, 4]),
        ((S, U, A, U, A), ("merge_into_user", "keep"), (joined(S, U), A, U, A), [0, 0, 1, 2, 3]),
        ((S, S, A, U, A), ("merge_into_user", "keep"), (A, joined(S, S, U), A), [0, 0, 0, 1, 2]),
        ((U, S), ("merge_into_user", "keep"), (U, S), [0, 1]),
        ((U, U, A, A, U), ("keep", "merge"), (joined(U, U), joined(A, A), U), [0, 0, 1, 1, 2]),
        ((S, U, U), ("merge_into_user", "merge"), (joined(S, U, U),), [0, 0, 0]),
        ((U, A | {"tool_calls": [1]}, A), ("keep", "merge"), (U, A | {"tool_calls": [1]}, A), [0, 1, 2]),
    ],
)
def test_messages_as_a_template_is_to_get_them(messages, settings, expected, moved):
    assert arranged(messages, *settings) == (expected, moved)
