from __future__ import annotations

import datetime
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.rows import GOOD

from rlhf_dist.config.data import DataSettings, DataSource
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.fields import Fields
from rlhf_dist.data.kinds import KINDS
from rlhf_dist.data.loading import load_sequences
from rlhf_dist.data.reader import read_fields, read_preferences, read_prompts, read_sequences
from rlhf_dist.data.records import Conversation, Preference, Prompt
from rlhf_dist.run.run_summary import describe_data


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def bot(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def one(source, records, kind="preference", **settings):
    read = {"preference": lambda s: list(read_preferences(s, 0))}.get(kind, read_sequences)
    [record] = read(source(kind, records, **settings))
    return record


def test_instruction(source):
    record = {"instruction": "Dịch", "input": "hello", "output": "xin chào", "demonstration": "a → b", "other": 1}
    assert one(source, [record], "instruction").messages == (user("a → b\n\nDịch\n\nhello"), bot("xin chào"))
    for empty in ({}, {"input": ""}, {"input": None}, {"input": " "}):
        assert one(source, [{"instruction": "i", "output": "o", **empty}], "instruction").messages == (
            user("i"),
            bot("o"),
        )


def test_mapped_and_nested_columns(source):
    record = {"question": "q", "cases": [{"in": "x", "out": "y"}]}
    fields = {"instruction": "question", "input": "cases.0.in", "output": "cases.0.out"}
    assert one(source, [record], "instruction", fields=fields).messages == (user("q\n\nx"), bot("y"))


def test_messages_and_text(source):
    messages = [{"role": "system", "content": ""}, user("u"), bot("a")]
    assert one(source, [{"messages": messages}], "messages").messages == tuple(messages)
    record = one(source, [{"text": "nội dung"}], "text")
    assert record.text == "nội dung"
    assert record.location.endswith("data.jsonl:1")


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: so?\n\nAssistant:"
DIALOGUE = (user("hi"), bot("hello"), user("so?"))


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "p", "chosen": "good", "rejected": "bad"}, (user("p"),)),
        ({"prompt": [*DIALOGUE], "chosen": "good", "rejected": "bad"}, DIALOGUE),
        ({"prompt": [user("p")], "chosen": [bot("good")], "rejected": [bot("bad")]}, (user("p"),)),
        ({"prompt": HH, "chosen": "good", "rejected": "bad"}, DIALOGUE),
        ({"chosen": HH + " good", "rejected": HH + " bad"}, DIALOGUE),
        ({"chosen": [*DIALOGUE, bot("good")], "rejected": [*DIALOGUE, bot("bad")]}, DIALOGUE),
        ({"prompt": "so?", "chosen": [*DIALOGUE, bot("good")], "rejected": [*DIALOGUE, bot("bad")]}, DIALOGUE),
        ({"prompt": HH, "chosen": HH + " good", "rejected": HH + " bad"}, DIALOGUE),
    ],
)
def test_preference_forms(source, record, prompt):
    pair = one(source, [record])
    assert (pair.prompt, pair.responses) == (prompt, ((bot("good"),), (bot("bad"),)))
    assert (pair.ratings, pair.ranks) == (None, (0, 1))


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "p", "responses": ["a", "b", "c"]}, (user("p"),)),
        ({"prompt": [user("p")], "responses": [[bot("a")], "b", [bot("c")]]}, (user("p"),)),
        ({"responses": [HH + " a", HH + " b", HH + " c"]}, DIALOGUE),
        ({"responses": [[*DIALOGUE, bot(x)] for x in "abc"], "chosen": None, "ratings": None}, DIALOGUE),
    ],
)
def test_ranking_forms(source, record, prompt):
    ranking = one(source, [record])
    assert (ranking.prompt, ranking.responses) == (prompt, ((bot("a"),), (bot("b"),), (bot("c"),)))
    assert (ranking.ratings, ranking.ranks) == (None, (0, 1, 2))


def test_ratings_of_a_ranking_give_its_ties(source):
    fields = {"responses": "completions", "ratings": "scores"}
    record = {"prompt": "p", "completions": list("abcde"), "scores": [4, "2.5", 2.5, 1, 1]}
    ranking = one(source, [record], fields=fields)
    assert ranking.ratings == (4, 2.5, 2.5, 1, 1)
    assert ranking.ranks == (0, 1, 1, 3, 3)


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def test_a_pair_may_have_unrelated_columns(source):
    for responses in (["c", "a", "b"], "the judge's answer", 3):
        record = PAIR | {"responses": responses, "ratings": [1, 5]}
        pair = one(source, [record])
        assert (pair.responses, pair.ratings, pair.ranks) == (((bot("a"),), (bot("b"),)), None, (0, 1))
        assert next(iter(read_prompts(source("preference", [record])))).messages == (user("p"),)


def test_a_ranking_may_have_unrelated_columns_when_it_is_mapped(source):
    record = PAIR | {"responses": ["c", "a", "b"], "ratings": [3, 3, 1], "margin": -1}
    ranking = one(source, [record], fields={"responses": "responses"})
    assert ranking.responses == ((bot("c"),), (bot("a"),), (bot("b"),))
    assert (ranking.ratings, ranking.ranks) == ((3, 3, 1), (0, 0, 2))
    assert len(one(source, [{"prompt": "p", "responses": ["a", "b"], "margin": "n/a"}]).responses) == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"responses": "all", "chosen": "chosen"}, r"'responses' \(column 'all'\) is in a row with chosen"),
        ({"responses": "all", "margin": "margin"}, r"'responses' \(column 'all'\) is in a row with margin"),
        (
            {"ratings": "scores"},
            r"'ratings' \(column 'scores'\) is mapped in a row with chosen and rejected, .*map responses",
        ),
    ],
)
def test_both_forms_mapped_and_filled_are_invalid(source, fields, words):
    with pytest.raises(DataError, match=words):
        one(source, [PAIR | {"all": ["a", "b"], "scores": [2, 1], "margin": 1}], fields=fields)


def test_pairs_and_rankings_in_one_file_with_every_field_mapped(source):
    fields = {"chosen": "win", "rejected": "lose", "margin": "by", "responses": "all", "ratings": "scores"}
    rows = [
        {"prompt": "p", "win": "a", "lose": "b", "by": 2, "all": None, "scores": None},
        {"prompt": "p", "win": None, "lose": None, "by": None, "all": ["a", "b"], "scores": [5, 4]},
    ]
    pair, ranking = read_preferences(source("preference", rows, fields=fields), 0)
    assert (pair.ratings, ranking.ratings) == ((2, 0), (5, 4))


@pytest.mark.parametrize("margin", [-0.5, "n/a", float("nan"), [1], 2])
def test_margins_that_nothing_uses_are_not_read(source, margin):
    [pair] = read_preferences(source("preference", [PAIR | {"margin": margin}]), 0, use_margins=False)
    assert pair.ratings is None


def test_ties_of_a_ranking_do_not_depend_on_margins_being_used(source):
    record = {"prompt": "p", "responses": ["a", "b", "c"], "ratings": [2, 1, 1]}
    [ranking] = read_preferences(source("preference", [record]), 0, use_margins=False)
    assert ranking.ranks == (0, 1, 1)


def test_responses_of_equal_text_are_one_with_the_better_rank(source):
    record = {"prompt": "p", "responses": ["a", "b", "a", "c", "c"], "ratings": [5, 4, 3, 3, 1]}
    ranking = one(source, [record])
    assert ranking.responses == ((bot("a"),), (bot("b"),), (bot("c"),))
    assert (ranking.ratings, ranking.ranks, ranking.num_repeated) == ((5, 4, 3), (0, 1, 2), 2)
    unrated = one(source, [{"responses": [[*DIALOGUE, bot(x)] for x in "abac"]}])
    assert (unrated.responses, unrated.ranks) == (((bot("a"),), (bot("b"),), (bot("c"),)), (0, 1, 2))
    assert unrated.prompt == DIALOGUE


def test_a_margin_of_0_is_not_a_tie(source):
    pair = one(source, [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0}])
    assert (pair.ratings, pair.ranks) == ((0, 0), (0, 1))


def test_a_response_may_talk_about_the_hh_form(source):
    pair = one(source, [{"prompt": "p", "chosen": "write\n\nHuman: x", "rejected": "no", "margin": 2}])
    assert pair.responses[0] == (bot("write\n\nHuman: x"),)
    assert pair.ratings == (2.0, 0.0)


@pytest.mark.parametrize(
    ("kind", "record", "words"),
    [
        (
            "instruction",
            {"instruction": "i"},
            r"data\.jsonl:1: field 'output' is missing; the row has 'instruction'; add it",
        ),
        (
            "instruction",
            {"instruction": "", "output": "o"},
            r":1: field 'instruction' is '', which is blank",
        ),
        ("instruction", {"instruction": "i", "output": 3}, r"field 'output' is 3, a int, not a string; write it as"),
        ("instruction", {"instruction": "i", "output": "o", "input": [1]}, r"field 'input' is \[1\], a list"),
        ("text", {"text": " \n"}, "is blank"),
        ("messages", {"messages": "hi"}, "not a list of messages; write it as"),
        ("messages", {"messages": []}, "not a list of messages"),
        ("messages", {"messages": ["hi"]}, r"'messages\[0\]' is 'hi', without \"role\" and"),
        (
            "messages",
            {"messages": [{"role": "judge", "content": "x"}]},
            r"'messages\[0\]\.role' is 'judge'; use one of",
        ),
        ("messages", {"messages": [user("u"), bot("")]}, r"'messages\[1\]\.content' is ''"),
        (
            "preference",
            {"prompt": "p", "chosen": "a", "rejected": "a"},
            r":1: field 'chosen' equals its rejected \('a'\)",
        ),
        ("preference", {"chosen": "a", "rejected": "b"}, "field 'prompt' is missing, .* map it with fields"),
        (
            "preference",
            {"prompt": "p", "chosen": HH + " a", "rejected": "b"},
            "'chosen' is a whole dialogue and 'rejected'",
        ),
        (
            "preference",
            {"chosen": HH + " a", "rejected": "\n\nHuman: x\n\nAssistant: b"},
            "part after 0 messages, not at an assistant's turn; make",
        ),
        (
            "preference",
            {"prompt": "z", "chosen": HH + " a", "rejected": HH + " b"},
            "'prompt' is 'z', which the dialogues",
        ),
        ("preference", {"chosen": HH, "rejected": HH + " b"}, r"'chosen \(turn 4\)' is '', which is blank"),
        (
            "preference",
            {"prompt": "p", "chosen": [user("x")], "rejected": "b"},
            "does not end with an assistant message; add",
        ),
        (
            "preference",
            {"prompt": [bot("x")], "chosen": "a", "rejected": "b"},
            "'prompt' does not end with a user message",
        ),
        (
            "preference",
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "x"},
            "'margin' is 'x', which is not a",
        ),
        (
            "preference",
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": -0.5},
            r":1: field 'margin' is -0.5, less than 0, though .*; exchange chosen and rejected, .*reward\.margin_coef",
        ),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "inf"}, "not a finite number"),
        ("preference", {"prompt": "p", "responses": ["a"]}, r":1: field 'responses' has 1, .*at least 2"),
        ("preference", {"prompt": "p", "responses": "a"}, "'responses' is 'a', a str, not a list; write"),
        ("preference", {"prompt": "p", "responses": ["a", ""]}, r"'responses\[1\]' is '', which is blank"),
        (
            "preference",
            {"prompt": "p", "responses": ["a", "a", "a"], "ratings": [3, 2, 1]},
            r":1: field 'responses\[0\]' equals its responses\[1\] \('a'\).*; remove the row",
        ),
        (
            "preference",
            {"prompt": "p", "responses": ["a", "b", "b", "a"], "ratings": [2, 2, 1, 1]},
            "'ratings' are all 2, so nothing can be learnt",
        ),
        (
            "preference",
            {"prompt": "p", "responses": ["a", "b"], "chosen": "a", "margin": 1},
            r"'responses' is in a row with chosen, .*; keep either .*fields: \{responses: responses\}",
        ),
        ("preference", {"responses": ["a", "b", "c"]}, r"is missing, and responses\[0\] to responses\[2\] are not"),
        (
            "preference",
            {"prompt": "p", "responses": ["a", "b"], "ratings": [2]},
            "'ratings' has 1 numbers for 2 responses",
        ),
        (
            "preference",
            {"prompt": "p", "responses": ["a", "b", "c"], "ratings": [3, 1, 2]},
            r"'ratings\[1\]' is 1, less than the 2 of the next response.*; order responses",
        ),
        (
            "preference",
            {"prompt": "p", "responses": ["a", "b"], "ratings": [1, float("nan")]},
            r"'ratings\[1\]' is nan, which is not a finite number",
        ),
        ("preference", {"prompt": "p", "responses": ["a", "b"], "ratings": [1, 1]}, "are all 1, so nothing .*; remove"),
    ],
)
def test_errors_name_place_and_remedy(source, kind, record, words):
    with pytest.raises(DataError, match=words):
        one(source, [record], kind)


def test_lone_surrogate(write):
    path = write("data.jsonl", '{"text": "a\\ud800"}')
    with pytest.raises(DataError, match=r"data\.jsonl:1: field 'text' has a lone surrogate .*at position 1"):
        list(read_sequences(DataSource(path=path, kind="text")))


def test_prompts_of_each_kind(source):
    def prompts(kind, record):
        return [prompt.messages for prompt in read_prompts(source(kind, [record]))]

    assert prompts("prompt", {"prompt": "p"}) == [(user("p"),)]
    assert prompts("prompt", {"prompt": [*DIALOGUE]}) == [DIALOGUE]
    assert prompts("instruction", {"instruction": "i", "input": "x"}) == [(user("i\n\nx"),)]
    assert prompts("messages", {"messages": [*DIALOGUE]}) == [DIALOGUE[:1]]
    assert prompts("messages", {"messages": [user("u")]}) == [(user("u"),)]
    assert prompts("preference", {"chosen": HH + " a", "rejected": HH + " b"}) == [DIALOGUE]
    assert prompts("preference", {"prompt": "p", "responses": ["a", "b", "c"]}) == [(user("p"),)]
    with pytest.raises(DataError, match="does not end with a user message"):
        prompts("prompt", {"prompt": [user("u"), bot("a")]})


def test_prompt_type(source):
    [prompt] = read_prompts(source("prompt", [{"prompt": "p"}]))
    assert isinstance(prompt, Prompt)
    assert prompt.location.endswith(":1")


def test_kinds_and_fields_that_are_not_supported(source):
    with pytest.raises(ConfigError, match=r"kind 'text' .* reward modeling; use one of preference, ratings"):
        list(read_preferences(source("text", [{"text": "a"}]), 0))
    with pytest.raises(ConfigError, match=r"fields maps 'instrction', .*nearest: 'instruction'"):
        list(read_sequences(source("instruction", [{}], fields={"instrction": "q"})))
    with pytest.raises(DataError, match=r"no row has the column 'inputs' that fields names"):
        list(read_sequences(source("instruction", [{"instruction": "i", "output": "o"}], fields={"input": "inputs"})))


def test_ratings_become_pairs_within_a_prompt(source):
    rows = [{"prompt": p, "response": f"{p}{r}", "rating": r} for p in "ab" for r in (1, 2, 3, "4.0")]
    pairs = list(read_preferences(source("ratings", rows, min_margin=1), 0))
    assert len(pairs) == 4
    for pair in pairs:
        [prompt], ([chosen], [rejected]) = pair.prompt, pair.responses
        high, low = (float(side["content"][1:]) for side in (chosen, rejected))
        assert chosen["content"][0] == rejected["content"][0] == prompt["content"]
        assert pair.ratings == (high, low)
        assert high - low >= 1
        assert " over " in pair.location
    assert pairs == list(read_preferences(source("ratings", rows, min_margin=1), 0))


def test_ratings_without_prompt_and_without_pairs(source):
    rows = [{"response": "good", "rating": 2}, {"response": "bad", "rating": -2}]
    [pair] = read_preferences(source("ratings", rows), 0)
    assert (pair.prompt, pair.responses) == ((), ((bot("good"),), (bot("bad"),)))
    with pytest.raises(DataError, match=r"differ in rating by min_margin 9\.0 or more; lower"):
        list(read_preferences(source("ratings", rows, min_margin=9), 0))
    with pytest.raises(DataError, match=r":1: field 'rating' is 'x', which is not a finite number"):
        list(read_preferences(source("ratings", [{"response": "a", "rating": "x"}]), 0))


def test_bad_rows_are_skipped_with_place_and_reason_and_the_others_used(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"instruction": "i", "output": "o"}\n'
    bad = [b"{broken\n", b"\xff\n", b"[1]\n", b'{"instruction": "i"}\n', b'{"instruction": "i", "output": 3}\n']
    path.write_bytes(b"".join(good + line for line in bad))
    bad_rows = BadRows()
    source = DataSource(path=str(path), kind="instruction", on_bad_row="skip")
    assert len(list(read_sequences(source, bad_rows))) == len(bad)
    places = [f"{path}:{2 * n}" for n in range(1, 1 + len(bad))]
    assert [row.reason.startswith(f"{place}: ") for row, place in zip(bad_rows.rows, places, strict=True)] == [True] * 5
    assert bad_rows.rows[0].row == "{broken"
    assert bad_rows.rows[4].row == {"instruction": "i", "output": 3}
    assert [json.loads(line)["row"] for line in bad_rows.lines()][3] == {"instruction": "i"}
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        list(read_sequences(source.model_copy(update={"on_bad_row": "error"})))


def test_bad_rows_of_tables_keep_the_line_numbers_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,chosen,rejected\np,a,b\np,\xff,b\np,a\np,a,a\np,c,d\n")
    bad_rows = BadRows()
    source = DataSource(path=str(path), kind="preference", on_bad_row="skip")
    found = list(read_preferences(source, 0, bad_rows=bad_rows))
    assert [pair.location for pair in found] == [f"{path}:2", f"{path}:6"]
    assert [row.reason.split(": ")[0] for row in bad_rows.rows] == [f"{path}:{n}" for n in (3, 4, 5)]


def test_a_source_of_bad_rows_only_is_invalid_with_the_first_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for content, problem in (("{\n", "not JSON"), ('{"text": ""}\n', "is blank")):
        path.write_text(content)
        with pytest.raises(DataError, match=problem):
            list(read_sequences(DataSource(path=str(path), kind="text", on_bad_row="skip")))


USER, BOT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


def noted(source, kind, record, read=read_sequences):
    """(the record, what was noted of its row)."""
    bad_rows = BadRows()
    [found] = read(source(kind, [record]), bad_rows=bad_rows)
    return found, dict(bad_rows.notes)


@pytest.mark.parametrize("leading", [[], [{"from": "gpt", "value": "before"}]])
def test_sharegpt(source, leading):
    turns = [{"from": "system", "value": "s"}, *leading, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    found, notes = noted(source, "messages", {"conversations": turns, "id": "7"})
    assert found.messages == ({"role": "system", "content": "s"}, USER, BOT)
    assert notes == {
        "column 'conversations' taken for messages": 1,
        "ShareGPT turns (from, value)": 1,
        **({"assistant turns before the first user turn, which are dropped": 1} if leading else {}),
    }


def test_content_in_parts(source):
    parts = [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]
    found, notes = noted(source, "messages", {"messages": [{"role": "user", "content": parts}, BOT]})
    assert found.messages[0] == {"role": "user", "content": "uv"}
    assert notes == {"content in parts": 1}
    image = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(DataError, match=r"messages\[0\]\.content\[1\]' is a part of type 'image_url'"):
        noted(source, "messages", {"messages": [{"role": "user", "content": [*parts[:1], image]}, BOT]})


@pytest.mark.parametrize("kind", ["messages", "instruction"])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("u", "a"), ([USER, BOT, USER], [BOT])], ids=["text", "conversational"]
)
def test_prompt_and_completion(source, kind, prompt, completion):
    """TRL's; of a conversation only the completion is trained on."""
    found, notes = noted(source, kind, {"prompt": prompt, "completion": completion})
    assert found.messages[-1] == BOT
    assert found.targets == (len(found.messages) - 1,)
    assert notes == {"columns 'prompt' and 'completion'": 1}
    asked, _ = noted(source, kind, {"prompt": prompt, "completion": completion}, read_prompts)
    assert asked.messages == found.messages[:-1]


SYSTEM = {"role": "system", "content": "s"}
CHATS = [USER, BOT, USER]
PLAIN_CHAT = [*CHATS, BOT]


def whole(record) -> tuple[Any, ...]:
    """All messages of a record, of a preference with its best response."""
    if isinstance(record, Preference):
        return (*record.prompt, *record.responses[0])
    return record.messages


@pytest.mark.parametrize(
    ("kind", "row", "read"),
    [
        ("instruction", {"instruction": "u", "output": "a"}, read_sequences),
        ("instruction", {"prompt": "u", "completion": "a"}, read_sequences),
        ("instruction", {"instruction": "u", "output": "a"}, read_prompts),
        ("messages", {"messages": PLAIN_CHAT}, read_sequences),
        ("messages", {"messages": PLAIN_CHAT}, read_prompts),
        (
            "messages",
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            read_sequences,
        ),
        ("messages", {"prompt": CHATS, "completion": [BOT]}, read_sequences),
        ("preference", {"prompt": "u", "chosen": "a", "rejected": "b"}, partial(read_preferences, seed=0)),
        ("preference", {"prompt": "u", "responses": ["a", "b"]}, partial(read_preferences, seed=0)),
        ("preference", {"chosen": PLAIN_CHAT, "rejected": [*CHATS, bot("b")]}, partial(read_preferences, seed=0)),
        ("preference", {"chosen": "Human: u\n\nAssistant: a", "rejected": "Human: u\n\nAssistant: b"}, read_prompts),
        ("prompt", {"prompt": "u"}, read_prompts),
        ("prompt", {"prompt": CHATS}, read_prompts),
    ],
)
@pytest.mark.parametrize("column", ["system", "system_prompt", "mine"])
def test_a_system_message_in_a_column_is_the_same_as_one_in_the_chat(source, kind, row, read, column):
    settings = {"fields": {"system": "mine"}} if column == "mine" else {}
    [without] = read(source(kind, [row]))
    bad_rows = BadRows()
    [found] = read(source(kind, [row | {column: "s"}], **settings), bad_rows=bad_rows)
    assert whole(found) == (SYSTEM, *whole(without))
    if isinstance(found, Conversation) and without.targets is not None:
        assert [whole(found)[i] for i in found.targets] == [whole(without)[i] for i in without.targets]
    taken = {f"column {column!r} taken for the system message": 1}
    assert dict(bad_rows.notes).items() >= ({} if column == "mine" else taken).items()
    for nothing in ("", None, " ", *([] if column == "mine" else [3, ["s"]])):
        [same] = read(source(kind, [row | {column: nothing}, row | {column: "s"}], **settings, limit=1))
        assert whole(same) == whole(without)


@pytest.mark.parametrize(("turn", "notes"), [("other", 1), ("s", 0), ("", 0)])
def test_a_system_message_in_a_column_and_in_the_chat(source, turn, notes):
    found, said = noted(
        source, "messages", {"messages": [{"role": "system", "content": turn}, USER, BOT], "system": "s"}
    )
    assert found.messages == ({"role": "system", "content": turn or "s"}, USER, BOT)
    assert said.get("column 'system' beside a system turn, which is not used", 0) == notes


def test_system_messages_of_ratings_belong_to_their_prompts(source):
    rows = [{"prompt": "u", "response": r, "rating": i, "system": s} for s in "st" for i, r in enumerate("ab")]
    pairs = list(read_preferences(source("ratings", rows), 0))
    assert [pair.prompt for pair in pairs] == [(SYSTEM, USER), (SYSTEM | {"content": "t"}, USER)]
    subjects = {KINDS["ratings"].subject(Fields("x", row, {})) for row in rows}
    assert subjects == {pair.subject for pair in pairs}


@pytest.mark.parametrize("history", [[["u", "a"], ["v", "b"]], [USER, BOT, user("v"), bot("b")]])
@pytest.mark.parametrize("column", ["history", "before"])
def test_the_turns_before_an_instruction(source, history, column):
    settings = {"fields": {"history": "before"}} if column == "before" else {}
    row = {"instruction": "i", "output": "o", "system": "s", column: history}
    bad_rows = BadRows()
    [found] = read_sequences(source("instruction", [row], **settings), bad_rows)
    assert found.messages == (SYSTEM, USER, BOT, user("v"), bot("b"), user("i"), bot("o"))
    assert found.targets == (6,)
    assert bad_rows.notes["column 'history' taken for the turns before the instruction"] == (column == "history")
    [prompt] = read_prompts(source("instruction", [row], **settings))
    assert prompt.messages == found.messages[:-1]
    for broken in ([["u"]], ["u", "a"], [["u", ""]], [["u", 1]]):
        with pytest.raises(DataError, match=r"'history\[0\]'"):
            one(source, [row | {column: broken}], "instruction", **settings)


@pytest.mark.parametrize("history", [None, [], "of the library", 3])
def test_no_turns_before_an_instruction(source, history):
    found, _ = noted(source, "instruction", {"instruction": "u", "output": "a", "history": history})
    assert (found.messages, found.targets) == ((USER, BOT), None)


def test_weights_choose_what_is_trained_on(source):
    chat = [USER, BOT | {"weight": 0}, USER, BOT | {"weight": 1}, USER, BOT]
    found, notes = noted(source, "messages", {"messages": chat})
    assert found.messages == (USER, BOT) * 3
    assert found.targets == (3, 5)
    assert notes == {}
    with pytest.raises(DataError, match=r"messages\[1\]\.weight' is 0\.5; use"):
        noted(source, "messages", {"messages": [USER, BOT | {"weight": 0.5}]})


def test_tools(source):
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    chat = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    chat += [{"role": "tool", "tool_call_id": "c", "content": "4"}, BOT | {"reasoning_content": "r", "logprobs": 1}]
    found, notes = noted(source, "messages", {"messages": chat, "tools": '[{"name": "add"}]'})
    plain = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}, "id": "c"}
    assert found.messages == (
        USER,
        {"role": "assistant", "content": "", "tool_calls": [plain]},
        {"role": "tool", "content": "4", "tool_call_id": "c"},
        BOT | {"reasoning_content": "r"},
    )
    assert found.tools == ({"name": "add"},)
    assert notes == {"key 'logprobs' of messages, which is not used": 1}
    for calls in ("add", [{"function": {}}], [{"function": {"name": "add", "arguments": "{"}}]):
        with pytest.raises(DataError, match=r"tool_calls"):
            noted(source, "messages", {"messages": [USER, BOT | {"tool_calls": calls}]})


ARGUMENTS = {"city": "Paris", "days": [1, 2]}


@pytest.mark.parametrize("key", ["arguments", "parameters", "input"])
@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS)], ids=["object", "text"])
@pytest.mark.parametrize("nested", [True, False])
def test_arguments_of_a_call_under_all_their_names(source, key, arguments, nested):
    function = {"name": "get", key: arguments, "extra": None}
    call = {"type": "function", "function": function, "id": None} if nested else function
    found, _ = noted(source, "messages", {"messages": [USER, BOT | {"tool_calls": [call]}]})
    [made] = found.messages[1]["tool_calls"]
    assert made == {"type": "function", "function": {"name": "get", "arguments": ARGUMENTS}}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"name": "get", "args": {"a": 1}}, r"has 'args', which a call does not have; give it a name and arguments"),
        ({"name": "get", "arguments": {}, "kwargs": 1, "result": 2}, r"has 'kwargs', 'result', which"),
        ({"function": {"name": "get", "argument": {}}}, r"has 'argument', which"),
        ({"function": {"name": "get"}, "arguments": {"a": 1}}, r"has 'arguments', which"),
        ({"name": "get", "arguments": {"a": 1}, "parameters": {"a": 2}}, "has arguments and parameters, which mean"),
        ({"name": "get", "parameters": "{"}, "parameters' is no JSON"),
    ],
)
def test_a_call_of_which_something_would_be_lost_is_invalid(source, call, words):
    with pytest.raises(DataError, match=rf":1: field 'messages\[1\]\.tool_calls\[0\].*{words}"):
        noted(source, "messages", {"messages": [USER, BOT | {"tool_calls": [call]}]})


CALL = {"name": "get", "arguments": {"city": "Paris"}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
RESULT = {"role": "tool", "content": "9"}
LEGACY = "function_call of messages (OpenAI), taken for a call of a tool"


@pytest.mark.parametrize(
    ("turns", "note"),
    [
        (
            [
                {"from": "human", "value": "u"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "9"},
                {"from": "gpt", "value": "a"},
            ],
            "turns of the role 'function_call', taken for calls of tools",
        ),
        (
            [USER, {"role": "tool_call", "content": CALL}, {"role": "tool_response", "content": "9"}, BOT],
            "turns of the role 'tool_call', taken for calls of tools",
        ),
        (
            [
                {"role": "User", "content": "u"},
                {"role": "ASSISTANT", "content": None, "tool_calls": [{"function": CALL}]},
                {"role": " Tool", "content": "9"},
                {"role": "Assistant", "content": "a"},
            ],
            None,
        ),
        (
            [
                USER,
                {"role": "assistant", "content": None, "function_call": CALL | {"arguments": '{"city": "Paris"}'}},
                {"role": "function", "content": "9"},
                BOT | {"function_call": None},
            ],
            LEGACY,
        ),
        ([USER, {"role": "assistant", "function_call": CALL}, {"role": "ipython", "content": "9"}, BOT], LEGACY),
    ],
)
def test_published_shapes_of_calls_are_the_same_conversation(source, turns, note):
    found, notes = noted(source, "messages", {"messages": turns})
    assert found.messages == (USER, CALLING, RESULT, BOT)
    assert note is None or notes[note] == 1


def test_several_calls_in_a_sharegpt_turn(source):
    turns = [USER, {"role": "function_call", "content": json.dumps([CALL, CALL | {"name": "put"}])}]
    found, _ = noted(source, "messages", {"messages": turns})
    assert [call["function"]["name"] for call in found.messages[1]["tool_calls"]] == ["get", "put"]


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"role": "function_call", "content": "get(Paris)"}, r"content' is 'get\(Paris\)', no JSON, .*; write it as"),
        ({"role": "function_call", "content": None}, "is None, without the name of a function"),
        ({"role": "function_call", "content": "[]"}, r"is \[\], without the name of a function"),
        (CALLING | {"function_call": CALL}, "has tool_calls and function_call, which mean the same; keep one"),
        (CALLING | {"role": "function_call"}, "has tool_calls and the role function_call"),
        ({"role": "user", "content": "u", "function_call": CALL}, "of a user message"),
        ({"role": "assistant"}, 'without "role" and "content"'),
        ({"role": "assistant", "content": None, "refusal": 3}, r"refusal' is 3, a int"),
    ],
)
def test_published_shapes_of_calls_that_are_invalid(source, turn, words):
    with pytest.raises(DataError, match=rf":1: field 'messages\[1\].*{words}"):
        noted(source, "messages", {"messages": [USER, turn]})


@pytest.mark.parametrize(
    ("answer", "content", "note"),
    [
        ({"content": None, "refusal": "No."}, "No.", "refusals taken for content"),
        ({"refusal": "No."}, "No.", "refusals taken for content"),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No.", "content in parts"),
        ({"content": "Yes.", "refusal": None}, "Yes.", None),
        ({"content": "Yes.", "refusal": ""}, "Yes.", None),
        ({"content": "Yes.", "refusal": "No."}, "Yes.", "key 'refusal' of messages, which is not used"),
    ],
)
def test_refusals(source, answer, content, note):
    found, notes = noted(source, "messages", {"messages": [USER, {"role": "assistant", **answer}]})
    assert found.messages == (USER, bot(content))
    assert notes == ({note: 1} if note else {})


def test_sharegpt_turns_keep_their_other_keys(source):
    turns = [
        {"from": "human", "value": "u"},
        {"from": "gpt", "value": "bad", "weight": 0, "logprobs": 1},
        {"from": "human", "value": "v"},
        {"from": "gpt", "value": "good", "reasoning_content": "r"},
    ]
    found, notes = noted(source, "messages", {"conversations": turns, "system": "s"})
    assert found.messages == (
        {"role": "system", "content": "s"},
        user("u"),
        bot("bad"),
        user("v"),
        bot("good") | {"reasoning_content": "r"},
    )
    assert found.targets == (4,)
    assert notes["key 'logprobs' of messages, which is not used"] == 1
    assert notes["column 'system' taken for the system message"] == 1
    leading = {"mine": [{"from": "gpt", "value": "before"}, *turns[:2]]}
    [mapped] = read_sequences(source("messages", [leading], fields={"messages": "mine"}))
    assert mapped.messages == (user("u"), bot("bad"))


@pytest.mark.parametrize("kind", ["messages", "instruction"])
def test_weights_of_a_completion(source, kind):
    completion = [bot("no") | {"weight": 0}, user("u"), bot("yes")]
    found, _ = noted(source, kind, {"prompt": [user("p")], "completion": completion})
    assert found.targets == (3,)
    assert found.messages == (user("p"), bot("no"), user("u"), bot("yes"))


CALLED = [USER, bot("") | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}]
CALLED += [{"role": "tool", "content": "4"}]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("prompt", {"prompt": CALLED}),
        ("messages", {"messages": [*CALLED, BOT]}),
        ("messages", {"prompt": CALLED, "completion": [BOT]}),
        ("instruction", {"prompt": CALLED, "completion": "a"}),
        ("preference", {"prompt": CALLED, "chosen": "a", "rejected": "b"}),
        ("preference", {"prompt": CALLED, "responses": ["a", [bot("b")]]}),
        ("preference", {"chosen": [*CALLED, BOT], "rejected": [*CALLED, bot("b")]}),
    ],
)
def test_prompts_that_end_with_the_result_of_a_tool(source, kind, row):
    [prompt] = read_prompts(source(kind, [row]))
    assert prompt.messages == tuple(CALLED)
    if kind == "preference":
        [pair] = read_preferences(source(kind, [row]), 0)
        assert (pair.prompt, pair.responses) == (tuple(CALLED), ((BOT,), (bot("b"),)))


def test_tools_and_weights_of_preferences(source):
    rows = [{"prompt": [user("p") | {"weight": 0}], "chosen": "c", "rejected": "r", "tools": [{"name": "add"}]}]
    rows += [{"prompt": "p", "responses": ["a", "b"], "tools": '[{"name": "add"}]'}]
    bad_rows = BadRows()
    found = list(read_preferences(source("preference", rows), 0, bad_rows=bad_rows))
    assert [record.tools for record in found] == [({"name": "add"},)] * 2
    assert dict(bad_rows.notes) == {"weight 0 of messages, which only supervised training uses": 1}


def test_a_prompt_in_the_hh_format(source):
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    [prompt] = read_prompts(source("prompt", [{"prompt": text}]))
    assert prompt.messages == (user("a"), bot("b"), user("c"))
    found, _ = noted(source, "instruction", {"prompt": text, "completion": "d"})
    assert found.messages == (user("a"), bot("b"), user("c"), bot("d"))


DEEP: Any = "x"
for _ in range(600):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("tools", [{"name": "half \ud83d"}]),
        ("tools", '[{"name": "half \\ud83d"}]'),
        ("tools", [{"name": DEEP}]),
        ("tools", [{"name": float("nan")}]),
        ("tools", [{"name": datetime.date(2026, 1, 1)}]),
        ("tools", [{"name": b"x"}]),
        ("tools", [{1: "x"}]),
        ("calls", [{"name": "half \ud83d"}]),
        ("calls", [{"name": "f", "arguments": {"half \ud83d": 1}}]),
        ("calls", [{"name": "f", "arguments": {"a": DEEP}}]),
        ("calls", [{"name": "f", "arguments": '{"a": NaN}'}]),
        ("content", {"a": 1}),
        ("content", 5),
        ("content", "half \ud83d"),
    ],
)
def test_what_no_file_and_no_template_can_hold_is_invalid(place, value):
    """Rows as readers of Arrow give them: any object may be in them."""
    message = bot("a") | {"tool_calls": [{"name": "f"}]}
    message |= {"calls": {"tool_calls": value}, "content": {"content": value}, "tools": {}}[place]
    row = {"messages": [user("u"), message], "tools": value if place == "tools" else None}
    with pytest.raises(DataError, match=r"^x:1: field '(tools|messages\[1\])"):
        KINDS["messages"].sequence(Fields("x:1", row, {}), "")


def test_nan_in_messages_is_absent(source):
    nan = float("nan")
    found, notes = noted(
        source, "messages", {"messages": [user("u"), bot("a") | {"weight": nan, "name": nan, "x": nan}]}
    )
    assert found.messages == (user("u"), bot("a"))
    assert (found.targets, notes) == (None, {})


def test_scores_of_a_pair_are_its_margin(source):
    record = {"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": 8.5, "score_rejected": 7}
    bad_rows = BadRows()
    [pair] = read_preferences(source("preference", [record]), seed=0, bad_rows=bad_rows)
    assert pair.ratings == (1.5, 0.0)
    assert dict(bad_rows.notes) == {"margins of 'score_chosen' and 'score_rejected'": 1}
    [pair] = read_preferences(source("preference", [record | {"margin": 3}]), seed=0)
    assert pair.ratings == (3.0, 0.0)
    with pytest.raises(DataError, match="'score_chosen' is 6, less than score_rejected 7"):
        list(read_preferences(source("preference", [record | {"score_chosen": 6}]), seed=0))


def test_a_number_that_is_missing_in_a_table_is_absent(source):
    record = {"prompt": "p", "chosen": "c", "rejected": "r", "margin": float("nan")}
    [pair] = read_preferences(source("preference", [record]), seed=0)
    assert pair.ratings is None


def unused(*columns: str) -> dict[str, int]:
    return {f"column {column!r}, which is not used": 1 for column in columns}


KEPT = {
    "prompt_id": "x",
    "id": 1,
    "source": "web",
    "Task": "t",
    "created_at": "2026",
    "url": "u",
    "provenance": {"a": 1},
}
"""Where rows are from."""
EMPTY = {"a": None, "b": "", "c": " ", "d": [], "e": {}, "f": {"x": None}, "g": [""], "h": float("nan")}


@pytest.mark.parametrize(
    ("kind", "row", "columns"),
    [
        ("instruction", {"instruction": "i", "output": "o", "answer": "x", "score": 0.0}, ["answer", "score"]),
        ("instruction", {"instruction": "i", "output": "o", "task": 3, "history": "of it"}, ["history"]),
        ("messages", {"messages": [USER, BOT], "prompt": "u"}, ["prompt"]),
        (
            "messages",
            {"messages": [USER, BOT], "conversations": [USER], "completion": "a"},
            ["completion", "conversations"],
        ),
        (
            "messages",
            {"messages": [USER, BOT], "chat_template_kwargs": {"enable_thinking": False}},
            ["chat_template_kwargs"],
        ),
        ("messages", {"prompt": "u", "completion": "a", "response": "b"}, ["response"]),
        ("messages", {"messages": [USER, BOT], "functions": "of the liver"}, ["functions"]),
        ("messages", {"messages": [USER, BOT], "system": 3, "system_prompt": ["s"]}, ["system", "system_prompt"]),
        ("text", {"text": "t", "title": "x", "image": "x.png"}, ["image", "title"]),
        ("preference", PAIR | {"score_chosen": 2.0, "score_rejected": 1.0}, []),
        (
            "preference",
            PAIR | {"responses": ["c", "d"], "ratings": [1, 5], "rank": 1},
            ["rank", "ratings", "responses"],
        ),
        ("preference", {"prompt": "p", "responses": ["a", "b"], "margin": 2}, ["margin"]),
        ("prompt", {"prompt": "p", "answer": "a"}, ["answer"]),
    ],
)
def test_columns_that_nothing_uses_are_noted(source, kind, row, columns):
    read = {"preference": partial(read_preferences, seed=0), "prompt": read_prompts}.get(kind, read_sequences)
    _, notes = noted(source, kind, row | KEPT | EMPTY, read)
    said = {note: number for note, number in notes.items() if "which is not used" in note}
    assert said == unused(*columns)


def test_columns_of_a_kind_that_one_use_does_not_need_are_not_noted(source):
    _, notes = noted(source, "instruction", {"instruction": "i", "output": "o"}, read_prompts)
    assert notes == {}
    mapped = source("instruction", [{"q": "i", "cases": [{"out": "o"}], "output": "x"}])
    bad_rows = BadRows()
    fields = {"instruction": "q", "output": "cases.0.out"}
    list(read_sequences(mapped.model_copy(update={"fields": fields}), bad_rows))
    assert dict(bad_rows.notes) == unused("output")


def test_of_many_unused_columns_the_commonest_are_named(source):
    rows = [{"text": "t", **{f"c{i:02}": 1 for i in range(number)}} for number in (15, 14, 2)]
    bad_rows = BadRows()
    assert len(list(read_sequences(source("text", rows), bad_rows))) == 3
    expected = {f"column 'c{i:02}', which is not used": 3 if i < 2 else 2 for i in range(10)}
    assert dict(bad_rows.notes) == expected | {"5 more columns, which are not used": 2}


def test_unused_columns_of_bad_rows_are_not_counted_and_all_are_in_the_run_summary(source, tokenizer):
    rows = [{"text": "t", "title": "x"}, {"text": "", "title": "y", "other": 1}, {"text": "u", "title": "z"}]
    data = load_sequences([source("text", rows, on_bad_row="skip")], DataSettings(), tokenizer)
    assert data.report.notes == (("column 'title', which is not used", 2),)
    assert describe_data(training_records=data)["training records: column 'title', which is not used"] == "2 rows"


@pytest.mark.parametrize("kind", ["instruction", "messages", "preference", "ratings", "prompt", "candidates"])
@pytest.mark.parametrize("column", ["image", "images", "audio", "video"])
def test_rows_about_what_a_model_does_not_get_are_invalid(source, kind, column):
    for value in ("x.png", ["x.png"], {"bytes": "x", "path": None}):
        with pytest.raises(DataError, match=rf":1: field '{column}' is .*, and only text is supported; remove the row"):
            list(read_fields(source(kind, [GOOD[kind] | {column: value}])))
    for value in (None, "", [], {"bytes": None, "path": None}, [None]):
        assert len(list(read_fields(source(kind, [GOOD[kind] | {column: value}])))) == 1
    bad_rows = BadRows()
    rows = [GOOD[kind] | {column: "x.png"}, GOOD[kind]]
    assert [row.location[-2:] for row in read_fields(source(kind, rows, on_bad_row="skip"), bad_rows)] == [":2"]
    assert len(bad_rows) == 1


def test_a_column_of_that_name_that_is_mapped_is_read(source):
    row = {"image": "of a tree", "output": "o"}
    assert one(source, [row], "instruction", fields={"instruction": "image"}).messages[0] == user("of a tree")


FUNCTION = {"name": "get", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("written", [[FUNCTION], json.dumps([FUNCTION])], ids=["list", "text"])
@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("messages", {"messages": [USER, BOT]}),
        ("instruction", {"instruction": "u", "output": "a"}),
        ("preference", PAIR),
        ("prompt", {"prompt": "p"}),
    ],
)
def test_functions_are_tools(source, kind, row, written):
    read = {"preference": partial(read_preferences, seed=0), "prompt": read_prompts}.get(kind, read_sequences)
    found, notes = noted(source, kind, row | {"functions": written}, read)
    expected, _ = noted(source, kind, row | {"tools": [{"type": "function", "function": FUNCTION}]}, read)
    assert found == expected
    assert notes["column 'functions' (OpenAI) taken for tools"] == 1
    both, notes = noted(source, kind, row | {"functions": written, "tools": [{"name": "put"}]}, read)
    assert both.tools == ({"name": "put"},)
    assert notes == unused("functions")
