from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_dist.config.data import DataSource
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.curation.candidates import Item, item_id, read_items, shown_text
from rlhf_dist.curation.journal import Journal
from rlhf_dist.curation.judgements import (
    WITHDRAWN,
    Judgement,
    check_items,
    latest,
    parse_judgement,
    preference_records,
    read_judgements,
    tallies,
)
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.reader import read_preferences

GOOD = {"item": "i", "annotator": "ann", "choice": "a", "shown": [0, 1]}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source(path: Path, kind: Any = "candidates", **settings: Any) -> DataSource:
    return DataSource(path=str(path), kind=kind, **settings)


def item(name: str = "i", texts: tuple[str, ...] = ("zero", "one"), prompt: str = "p") -> Item:
    candidates = tuple(({"role": "assistant", "content": text},) for text in texts)
    return Item(name, ({"role": "user", "content": prompt},), candidates, ("m",) * len(texts), "f:1")


def votes(*choices: str, name: str = "i", shown: tuple[int, int] = (0, 1)) -> list[Judgement]:
    return [Judgement(name, f"ann{n}", choice, shown) for n, choice in enumerate(choices)]


def records(judgements: list[Judgement], policy: Any = "majority", **settings: Any) -> list[dict[str, Any]]:
    return list(preference_records({"i": item()}, judgements, policy, **settings))


def test_a_judgement_goes_through_a_journal(tmp_path: Path):
    said = Judgement("i", "ann", "b", (2, 0), {"helpful": "tie"}, "é\n", 1.5, "2026-01-01T00:00:00+00:00")
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append(said.entry())
        assert read_judgements(tmp_path / "j.jsonl") == [said]
    assert (said.preferred, said.pair, said.is_vote) == (0, (0, 2), True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"item": ""}, "item is ''"),
        ({"annotator": None}, "annotator is None"),
        ({"choice": "c"}, "choice is 'c'.*one of a, b, tie, both_bad, skip"),
        ({"shown": [1, 1]}, "two different candidates"),
        ({"shown": [0]}, "two different candidates"),
        ({"shown": [0, True]}, "two different candidates"),
        ({"criteria": {"helpful": "both"}}, "criteria"),
        ({"seconds": -1}, "seconds is -1"),
        ({"seconds": True}, "seconds is True"),
        ({"comment": 3}, "comment is 3"),
    ],
)
def test_a_line_that_is_no_judgement_is_rejected_with_its_place(tmp_path: Path, change: dict[str, Any], problem: str):
    path = write(tmp_path / "j.jsonl", [GOOD, GOOD | change])
    with pytest.raises(DataError, match=rf"j\.jsonl:2: .*{problem}"):
        read_judgements(path)
    assert parse_judgement(GOOD, "x").criteria == {}


def test_nothing_judged_yet_is_said(tmp_path: Path):
    with pytest.raises(DataError, match="nothing has been judged yet"):
        read_judgements(tmp_path / "none.jsonl")


def test_the_last_word_counts_whichever_way_round_and_can_be_taken_back():
    ann = Judgement("i", "ann", "a", (0, 1))
    bob = Judgement("i", "bob", "tie", (0, 1))
    changed = Judgement("i", "ann", "a", (1, 0))
    other_pair = Judgement("i", "ann", "a", (0, 2))
    gone = Judgement("i", "ann", WITHDRAWN, (0, 1))
    assert latest([ann, bob, other_pair, changed]) == [bob, other_pair, changed]
    assert latest([ann, bob, gone]) == [bob]
    assert latest([ann, gone, changed]) == [changed]


@pytest.mark.parametrize(
    ("choices", "majority", "plurality", "unanimous"),
    [
        ("a", 0, 0, 0),
        ("aa", 0, 0, 0),
        ("ab", None, None, None),
        ("aab", 0, 0, None),
        ("abb", 1, 1, None),
        ("at", None, 0, None),
        ("aat", 0, 0, None),
        ("aattx", None, 0, None),
        ("as", 0, 0, 0),
        ("tt", None, None, None),
    ],
)
def test_policies(choices: str, majority: int | None, plurality: int | None, unanimous: int | None):
    names = {"a": "a", "b": "b", "t": "tie", "x": "both_bad", "s": "skip"}
    (tally,) = tallies(votes(*(names[letter] for letter in choices)))
    assert tally.winner("majority") == majority
    assert tally.winner("plurality") == plurality
    assert tally.winner("unanimous") == unanimous


def test_votes_of_annotators_who_saw_the_pair_the_other_way_round_add_up():
    said = [Judgement("i", "ann", "a", (0, 1)), Judgement("i", "bob", "b", (1, 0)), Judgement("i", "cat", "a", (1, 0))]
    (tally,) = tallies(said)
    assert (tally.preferring(0), tally.preferring(1)) == (2, 1)
    (record,) = records(said, source="pilot")
    assert record["chosen"] == "zero"
    assert record["rejected"] == "one"
    assert record["source"] == "pilot"
    assert record["margin"] == pytest.approx(1 / 3)
    assert record["provenance"]["annotators"] == ["ann", "bob", "cat"]
    assert record["provenance"]["votes"] == {"chosen": 2, "rejected": 1, "tie": 0, "both_bad": 0}


def test_one_vote_gives_no_margin_and_ties_count_in_one():
    assert "margin" not in records(votes("a"))[0]
    assert records(votes("b", "b", "tie", "skip"))[0]["margin"] == pytest.approx(2 / 3)

    assert "margin" not in records(votes("b", "b"), margins=False)[0]


def test_each_vote_can_be_a_record():
    found = records(votes("a", "b", "tie", "a"), "each")
    assert [(record["chosen"], record["rejected"]) for record in found] == [
        ("zero", "one"),
        ("one", "zero"),
        ("zero", "one"),
    ]
    assert all("margin" not in record for record in found)


def test_criteria_are_told_by_chosen_and_rejected():
    said = [
        Judgement("i", "ann", "b", (0, 1), {"helpful": "b", "harmless": "a"}, "short"),
        Judgement("i", "bob", "a", (1, 0), {"helpful": "a", "harmless": "tie"}),
    ]
    provenance = records(said)[0]["provenance"]
    assert provenance["criteria"] == {
        "helpful": {"chosen": 2, "rejected": 0, "tie": 0},
        "harmless": {"chosen": 0, "rejected": 1, "tie": 1},
    }
    assert provenance["comments"] == ["short"]


def test_exported_records_are_read_back_as_they_were(tmp_path: Path):
    """Also a text that looks like a dialogue of the HH form, and a prompt of several turns."""
    turns = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "r"},
        {"role": "user", "content": "p"},
    )
    dialogue = item("j", ("Human: hello", "no"), prompt="Human: say so")
    several = Item("k", turns, item().candidates, ("", ""), "f:2")
    said = votes("a") + votes("a", name="j") + votes("b", name="k")
    found = list(preference_records({"i": item(), "j": dialogue, "k": several}, said, "majority"))
    read = list(read_preferences(source(write(tmp_path / "p.jsonl", found), "preference"), seed=0))
    assert read[0].prompt == item().prompt
    assert read[0].responses == item().candidates
    assert (read[1].prompt, read[1].responses) == (dialogue.prompt, dialogue.candidates)
    assert read[2].prompt == turns
    assert read[2].responses == item().candidates[::-1]


def test_an_empty_response_cannot_be_trained_on():
    assert not list(preference_records({"i": item(texts=("", "one"))}, votes("b"), "majority"))


def test_judgements_of_other_prompts_are_rejected(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"j\.jsonl holds 2 judgements of items that are not in the sources \(such as x\)"
    ):
        check_items(votes("a", "b", name="x") + votes("a"), {"i": item()}, tmp_path / "j.jsonl")
    with pytest.raises(DataError, match=r"candidates \[0, 2\] of item i, which has 2"):
        check_items(votes("a", shown=(0, 2)), {"i": item()}, tmp_path / "j.jsonl")
    check_items(votes("a"), {"i": item()}, tmp_path / "j.jsonl")


# Candidates.


def test_items_of_candidates_and_of_preferences(tmp_path: Path):
    rows = [
        {"prompt": "p", "candidates": [{"text": "x", "model": "m"}, {"text": ""}]},
        {"prompt": [{"role": "user", "content": "q"}], "candidates": ["x", "y", "x"]},
    ]
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "z"}])
    found = read_items([source(write(tmp_path / "c.jsonl", rows)), source(pairs, "preference")])
    assert [len(item.candidates) for item in found] == [2, 3, 2]
    assert found[0].models == ("m", "")
    assert found[0].id == item_id("p", ["x", ""])
    assert found[1].id == item_id([{"role": "user", "content": "q"}], ["x", "y", "x"])
    assert len({item.id for item in found} | {item_id("p", ["", "x"]), item_id("p ", ["x", ""])}) == 5
    assert all(len(item.id) == 16 and int(item.id, 16) >= 0 for item in found)


def test_an_item_with_a_system_message_in_a_column_and_one_that_ends_with_the_result_of_a_tool(tmp_path: Path):
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}, {"role": "tool", "content": "4"}]
    rows = [{"prompt": prompt, "candidates": ["x", "y"], "system": "s"} for prompt in ("p", turns)]
    found = read_items([source(write(tmp_path / "c.jsonl", rows))])
    assert [item.prompt for item in found] == [
        ({"role": "system", "content": "s"}, *messages) for messages in (turns[:1], turns)
    ]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"candidates": ["x", "y"]}, "'prompt' is missing"),
        ({"prompt": "p"}, "'candidates' is missing"),
        ({"prompt": "p", "candidates": "x"}, "not a list"),
        ({"prompt": "p", "candidates": ["x"]}, "holds 1, and a choice needs at least 2"),
        ({"prompt": "p", "candidates": ["x", "x"]}, "all the same text"),
        ({"prompt": "p", "candidates": ["x", {"txt": "y"}]}, r"candidates\[1\]\.text'.*None"),
        ({"prompt": [{"role": "assistant", "content": "q"}], "candidates": ["x", "y"]}, "does not end with a user"),
        ({"prompt": "q", "candidates": ["x", "y"]}, r"candidates of .*c\.jsonl:1; remove one"),
    ],
)
def test_rows_that_offer_no_choice_are_rejected_or_kept_aside(tmp_path: Path, row: dict[str, Any], problem: str):
    path = write(tmp_path / "c.jsonl", [{"prompt": "q", "candidates": ["x", "y"]}, row])
    with pytest.raises(DataError, match=rf"c\.jsonl:2: .*{problem}"):
        read_items([source(path)])
    bad_rows = BadRows()
    assert len(read_items([source(path, on_bad_row="skip")], bad_rows)) == 1
    assert [bad.row for bad in bad_rows.rows] == [row]


def test_a_source_without_choices_is_rejected(tmp_path: Path):
    path = write(tmp_path / "c.jsonl", [{"prompt": "p"}])
    with pytest.raises(ConfigError, match="'prompt' has no responses"):
        read_items([source(path, "prompt")])
    with pytest.raises(DataError, match="none of its 1 rows can be used"):
        read_items([source(path, on_bad_row="skip")])


def test_a_directory_of_datasets_is_a_source(tmp_path: Path):
    rows = [{"prompt": "p", "candidates": [{"text": "x", "model": "m"}, {"text": "y", "model": "n"}]}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    (found,) = read_items([source(tmp_path / "set")])
    assert found.models == ("m", "n")
    assert found.id == item_id("p", ["x", "y"])


# Messages that are more than their text.


def call(city: str, **more: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}], **more}


def test_ids_tell_everything_apart_and_those_of_texts_are_as_they_ever_were():
    assert item_id("p", ["x", "y"]) == "3cc830941a522cdf"
    variants = [[call("Ulm")], [call("Bonn")], [call("Ulm", reasoning_content="r")], [{**call("Ulm"), "content": "x"}]]
    ids = {item_id("p", [variant, "y"]) for variant in variants}
    ids |= {item_id("p", [variants[0], "y"], [{"name": tool}]) for tool in ("a", "b")}
    ids |= {item_id([{"role": "user", "content": "p", "name": "n"}], ["x", "y"])}
    assert len(ids) == 7


def test_a_preferred_call_of_a_tool_is_a_record_with_its_tools(tmp_path: Path):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    row = {"prompt": "How warm is it?", "chosen": [call("Ulm")], "rejected": [call("Bonn")], "tools": tools}
    (found,) = read_items([source(write(tmp_path / "p.jsonl", [row]), "preference")])
    assert found.id == item_id("How warm is it?", [[call("Ulm")], [call("Bonn")]], tools)
    (record,) = preference_records({found.id: found}, votes("b", name=found.id), "majority")
    assert (record["chosen"], record["rejected"], record["tools"]) == ([call("Bonn")], [call("Ulm")], tools)


def test_all_of_a_message_is_shown():
    told = shown_text({**call("Ulm"), "content": "Let me see.", "reasoning_content": "Ulm is a city."})
    assert re.search(r"Ulm is a city\..*Let me see\..*weather\(.*Ulm", told, re.DOTALL)
    assert shown_text({"role": "user", "content": " a\n"}) == " a\n"
