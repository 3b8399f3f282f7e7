"""The work without the page: pairs, shares, positions, and what survives."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_dist.core.errors import DataError, RunFolderError
from rlhf_dist.curation.candidates import Item, item_id
from rlhf_dist.curation.config.label import LabelConfig, checked_name
from rlhf_dist.curation.judgements import latest, read_judgements
from rlhf_dist.curation.label_report import agreement_rows, bias_text, label_report, progress_rows
from rlhf_dist.curation.labeling import LabelTask, judgements_of, open_folder, shared_out, tokens_of, units_of


def item(number: int, candidates: int = 2, same: bool = False) -> Item:
    texts = ["x" if same and k < 2 else f"response {k} to {number}" for k in range(candidates)]
    prompt = ({"role": "user", "content": f"prompt {number}"},)
    turns = tuple(({"role": "assistant", "content": text},) for text in texts)
    return Item(item_id(prompt, turns), prompt, turns, ("",) * candidates, f"f:{number}")


def config(out: Path, **settings: Any) -> LabelConfig:
    source = {"path": "c.jsonl", "kind": "candidates"}
    return LabelConfig.model_validate({"out_dir": str(out), "sources": [source]} | settings)


def task_of(out: Path, items: list[Item], **settings: Any) -> LabelTask:
    """Without a file."""
    return LabelTask(config(out, **settings), items, [], lambda entry: None)


def judge_all(task: LabelTask, annotator: str, choice: str = "a") -> None:
    while (shown := task.current(annotator)) is not None:
        task.judge(annotator, shown, choice)


# Pairs.


def test_every_policy_makes_its_pairs():
    items = [item(n, 4) for n in range(20)]
    every = units_of(items, "all", 0)
    chain = units_of(items, "chain", 0)
    one = units_of(items, "one", 0)
    assert [unit.pair for unit in every[:6]] == list(combinations(range(4), 2))
    assert (len(every), len(chain), len(one)) == (120, 60, 20)
    for thing in items:
        pairs = [unit.pair for unit in chain if unit.item is thing]
        assert {k for pair in pairs for k in pair} == {0, 1, 2, 3}
        assert max(Counter(k for pair in pairs for k in pair).values()) == 2
    assert len({unit.pair for unit in one}) == 6  # all are drawn, sooner or later
    assert units_of(items, "chain", 0) == chain != units_of(items, "chain", 1)


def test_equal_texts_never_meet():
    assert [unit.pair for unit in units_of([item(0, 3, same=True)], "all", 0)] == [(0, 2)]
    assert len(units_of([item(0, 3, same=True)], "chain", 0)) == 1


def test_draws_do_not_change_when_items_are_added(tmp_path: Path):
    items = [item(n, 3) for n in range(30)]
    few, many = task_of(tmp_path, items[:10]), task_of(tmp_path, items)
    kept = {unit.key for unit in few.units}
    assert [unit.key for unit in many.units if unit.key in kept] == [unit.key for unit in few.units]
    assert [unit.item.id for unit in few.units] != [unit.item.id for unit in units_of(items[:10], "all", 0)]
    places = {unit.key: many._places("ann", unit) for unit in many.units}
    assert all(few._places("ann", unit) == places[unit.key] for unit in few.units)


def test_positions_are_even_and_differ_between_annotators(tmp_path: Path):
    task = task_of(tmp_path, [item(n) for n in range(400)])
    ann = [task._places("ann", unit) for unit in task.units]
    bob = [task._places("bob", unit) for unit in task.units]
    assert 160 < sum(places == (0, 1) for places in ann) < 240
    assert 160 < sum(a == b for a, b in zip(ann, bob, strict=True)) < 240


def test_work_is_shared_out_evenly_with_the_overlap(tmp_path: Path):
    items = [item(n, 2 + n % 2) for n in range(60)]
    names = ["ann", "bob", "cat", "dan"]
    units = units_of(items, "all", 0)
    given = shared_out(units, names, 2, 0)
    assert Counter(i for ids in given.values() for i in ids) == {i.id: 2 for i in items}
    task = task_of(tmp_path, items, annotators=names, overlap=2)
    loads = [len(task.assigned(name)) for name in names]
    assert sum(loads) == 2 * len(units)
    assert max(loads) - min(loads) <= 6  # twice the pairs of the largest item
    # Each meets each, about equally often: 60 items make 10 meetings for each of the 6 couples.
    assert all(7 <= len(given[a] & given[b]) <= 13 for a, b in combinations(names, 2))
    assert shared_out(units, names, 2, 0) == given != shared_out(units, names, 2, 1)
    assert shared_out([], names, 2, 0) == dict.fromkeys(names, frozenset())
    everyone = task_of(tmp_path, items)
    assert len(everyone.assigned("anybody")) == len(units)
    with pytest.raises(ValueError, match="overlap 5"):
        shared_out(units, names, 5, 0)


def test_shares_do_not_change_when_items_are_appended_also_larger_ones():
    names = ["ann", "bob", "cat", "dan"]
    items = [item(n, 2 + n % 3) for n in range(40)] + [item(40, 12)]
    before = {i.id for i in items[:30]}
    few = shared_out(units_of(items[:30], "all", 0), names, 2, 0)
    many = shared_out(units_of(items, "all", 0), names, 2, 0)
    assert {name: ids & before for name, ids in many.items()} == few


# Judging.


def test_judging_goes_on_to_the_next_and_undo_comes_back(tmp_path: Path):
    task = task_of(tmp_path, [item(n) for n in range(3)])
    first = task.current("ann")
    assert first is not None
    said = task.judge("ann", first, "a", criteria={"helpful": "b"}, comment=" why ", seconds=1.234)
    assert said.preferred == first.left
    assert (said.comment, said.seconds) == ("why", 1.23)
    second = task.current("ann")
    assert second is not None
    assert second.unit != first.unit
    assert task.progress("ann") == (1, 3)
    assert task.progress("bob") == (0, 3)
    assert task.undo("bob") is None
    assert task.undo("ann") == said
    again = task.current("ann")
    assert again is not None
    assert (again.unit, again.left, again.before) == (first.unit, first.left, said)
    assert task.undo("ann") is None
    judge_all(task, "ann", "skip")
    assert (task.progress("ann"), task.skipped("ann")) == ((3, 3), 3)
    task.reopen_skipped("ann")
    assert (task.progress("ann"), task.skipped("ann")) == ((0, 3), 0)


def test_what_the_page_does_not_offer_is_rejected(tmp_path: Path):
    task = task_of(tmp_path, [item(0)])
    shown = task.current("ann")
    assert shown is not None
    for choice, more in (
        ("c", {}),
        ("withdrawn", {}),
        ("a", {"criteria": {"funny": "a"}}),
        ("a", {"comment": "x" * 10_001}),
    ):
        with pytest.raises(DataError):
            task.judge("ann", shown, choice, **more)
    with pytest.raises(DataError, match="criteria"):
        task.judge("ann", shown, "a", criteria={"helpful": "c"})
    assert task.judgements == []


def test_names_are_those_of_the_configuration_or_those_known(tmp_path: Path):
    named = task_of(tmp_path, [item(0)], annotators=["Ann"])
    assert named.annotator("aNN") == "Ann"
    with pytest.raises(DataError, match="'Bob' is none of the annotators"):
        named.annotator("Bob")
    free = task_of(tmp_path, [item(0)])
    judge_all(free, "Bob")
    assert free.annotator("bob") == "Bob"
    assert free.annotator("Cat") == "Cat"
    assert free.annotators == ["Bob"]


def test_work_goes_on_where_it_stood(tmp_path: Path):
    items = [item(n) for n in range(4)]
    by_id = {i.id: i for i in items}
    settings = config(tmp_path / "out")
    with open_folder(settings, by_id) as journal:
        task = LabelTask(settings, items, judgements_of(journal), journal.append)
        for choice in ("a", "b"):
            shown = task.current("ann")
            assert shown is not None
            task.judge("ann", shown, choice)
            # On disk when it returns.
            assert read_judgements(journal.path)[-1].choice == choice
        task.undo("ann")
        standing = task.current("ann")
    with open_folder(settings, by_id) as journal:
        again = LabelTask(settings, items, judgements_of(journal), journal.append)
        assert again.current("ann") == standing
        assert latest(again.judgements) == latest(task.judgements)


def test_a_disk_that_takes_nothing_ends_the_judging(tmp_path: Path):
    taken: list[Any] = []

    def append(entry: Any) -> None:
        if len(taken) == 1:
            raise OSError(28, "No space left on device")
        taken.append(entry)

    task = LabelTask(config(tmp_path), [item(n) for n in range(3)], [], append)
    for n in range(3):
        shown = task.current("ann")
        assert shown is not None
        if n == 0:
            task.judge("ann", shown, "a")
        else:
            taken += [None] * (n == 2)  # there would be room again, but a torn line may lie before it
            with pytest.raises(RunFolderError, match="No space left"):
                task.judge("ann", shown, "a")
    assert task.progress("ann") == (1, 3)


def test_a_folder_of_other_prompts_or_settings_or_things_is_rejected(tmp_path: Path):
    items = [item(n) for n in range(3)]
    by_id = {i.id: i for i in items}
    settings = config(tmp_path / "out")
    with open_folder(settings, by_id) as journal:
        judge_all(LabelTask(settings, items, [], journal.append), "ann")
    before = journal.path.read_bytes()
    with pytest.raises(DataError, match="1 judgements of items that are not in the sources"):
        open_folder(settings, {i.id: i for i in items[:2]})
    open_folder(settings, by_id | {item(9).id: item(9)}).close()  # more prompts are fine
    for change, key in (({"seed": 1}, "seed"), ({"pairs": "one"}, "pairs")):
        with pytest.raises(RunFolderError, match=f"was begun with {key}"):
            open_folder(config(tmp_path / "out", **change), by_id)
    with pytest.raises(RunFolderError, match="was begun with overlap None"):
        open_folder(config(tmp_path / "out", annotators=["ann"], overlap=1), by_id)
    open_folder(config(tmp_path / "out", criteria=["kind"], server={"port": 1}), by_id).close()
    assert journal.path.read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="holds no judgements"):
        open_folder(config(tmp_path / "other"), by_id)
    with pytest.raises(RunFolderError, match="is a file"):
        open_folder(config(tmp_path / "other" / "thesis.tex"), by_id)


def test_tokens_are_kept_and_only_for_the_user(tmp_path: Path):
    tokens = tokens_of(tmp_path)
    assert tokens_of(tmp_path) == tokens
    assert len(set(tokens.values())) == 2
    assert (tmp_path / "tokens.json").stat().st_mode & 0o077 == 0
    (tmp_path / "tokens.json").write_text(json.dumps({"annotator": "x", "organizer": ""}))
    with pytest.raises(RunFolderError, match="holds no tokens"):
        tokens_of(tmp_path)


# The report.


def test_the_report_adds_up(tmp_path: Path):
    task = task_of(tmp_path, [item(n) for n in range(20)], annotators=["ann", "bob", "cat"])
    judge_all(task, "ann", "a")
    judge_all(task, "bob", "a")
    shown = task.current("cat")
    assert shown is not None
    task.judge("cat", shown, "b", criteria={"helpful": "b", "honest": "tie"}, seconds=3.0)
    report = label_report(task)
    assert (report["pairs"], report["pairs_judged"], report["judgements"]) == (20, 20, 41)
    assert [(a["name"], a["judged"], a["assigned"]) for a in report["annotators"]] == [
        ("ann", 20, 20),
        ("bob", 20, 20),
        ("cat", 1, 20),
    ]
    assert report["all"]["choices"] == {"a": 40, "b": 1, "tie": 0, "both_bad": 0, "skip": 0}
    assert report["all"]["median_seconds"] == 3.0
    assert report["criteria"]["helpful"] == {"given": 1, "decided": 1, "with_the_choice": 1}
    assert report["criteria"]["honest"] == {"given": 1, "decided": 0, "with_the_choice": 0}
    # Both always took the left, which was drawn for each: they agree by chance.
    percent = report["agreement"]["all"]["two_annotators"][0]["percent"]
    same = sum(task._places("ann", unit) == task._places("bob", unit) for unit in task.units)
    assert percent == pytest.approx(same / 20)
    assert "ann: A (left), with A in 20 of 20" in bias_text(report)
    assert progress_rows(report)[0][:3] == ("ann", "20 of 20", "20")
    assert len(agreement_rows(report)) == 5
    json.dumps(report, allow_nan=False)


def test_the_report_of_nothing(tmp_path: Path):
    report = label_report(task_of(tmp_path, [item(0)]))
    assert bias_text(report) == "No judgement prefers a response yet."
    assert progress_rows(report) == [("all", "0", "0", "0", "0", "0", "0", "-", "-")]
    assert report["agreement"]["all"]["fleiss_kappa"] is None


# The configuration.


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"overlap": 2}, "overlap is 2 but annotators names 0"),
        ({"annotators": ["Ann", "ann"]}, "stands there twice"),
        ({"annotators": [" "]}, "is no name"),
        ({"criteria": ["a\u0000"]}, "is no name"),
        ({"server": {"host": "0.0.0.0"}}, "allowed_hosts is empty"),
        ({"server": {"port": 70000}}, "less than or equal to 65535"),
        ({"export": {"policy": "vote"}}, "majority"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_rejected(tmp_path: Path, settings: dict[str, Any], problem: str):
    with pytest.raises(ValidationError, match=problem):
        config(tmp_path, **settings)


def test_names_are_put_in_one_form():
    assert checked_name("  Zoe\u0301 ") == "Zo\u00e9"
    with pytest.raises(ValueError, match="is no name"):
        checked_name("x" * 61)
