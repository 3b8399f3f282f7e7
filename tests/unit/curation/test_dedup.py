from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.core.errors import DataError
from rlhf_dist.curation.config.dedup import Decontamination, DedupSettings, NearDuplicates
from rlhf_dist.curation.decontamination import EvaluationIndex
from rlhf_dist.curation.dedup import compared_text, find_duplicates

EXACT = DedupSettings(near=None)
STORY = (
    "The tide had gone out and left the harbour to the gulls, who walked about in the mud as if they had been sent to "
    "inspect it, and found it wanting in every respect but one."
)


def texts(*values: str) -> list[dict[str, str]]:
    return [{"text": value} for value in values]


def substrings(text: str) -> set[str]:
    text = " ".join(text.casefold().split()).ljust(5, "\0")
    return {text[i : i + 5] for i in range(len(text) - 4)}


def similarity(a: str, b: str) -> float:
    one, other = substrings(a), substrings(b)
    return len(one & other) / len(one | other)


def kept_by_hand(rows: Sequence[Mapping[str, str]], threshold: float) -> list[int]:
    """Every text against every earlier one that is kept."""
    kept: list[int] = []
    for i, row in enumerate(rows):
        if all(similarity(row["text"], rows[j]["text"]) < threshold for j in kept):
            kept.append(i)
    return kept


def variants(num: int, seed: int) -> list[dict[str, str]]:
    """Texts that are edits of a few others, more and less."""
    rng = np.random.default_rng(seed)
    words = STORY.split()
    bases = [" ".join(rng.permutation(words)) for _ in range(num // 8)]
    found = []
    for _ in range(num):
        text = bases[int(rng.integers(len(bases)))].split()
        for place in rng.integers(0, len(text), int(rng.integers(0, 6))):
            text[place] = f"word{rng.integers(1000)}"
        found.append(" ".join(text))
    return texts(*found)


def test_of_a_dataset_the_first_of_equal_texts_stays() -> None:
    dataset = datasets.Dataset.from_list(
        texts("One  sheep", "two sheep", "one sheep", "ＯＮＥ\nsheep ", "one sheep.", "two sheep")
    )
    verdicts = find_duplicates(dataset, EXACT, fields=("text",))
    assert dataset.select(verdicts.kept())["text"][:] == ["One  sheep", "two sheep", "one sheep."]
    assert verdicts.counts() == {
        "read": 6,
        "in an evaluation set": 0,
        "exact duplicate": 3,
        "near-duplicate": 0,
        "kept": 3,
    }
    removal = verdicts.removal(5)
    assert removal is not None
    assert (removal.reason, removal.of, removal.similarity) == ("exact duplicate", 1, None)
    assert verdicts.removal(4) is None


@given(st.lists(st.text(alphabet="aB \u3000", max_size=4), max_size=25))
def test_exact_duplicates_are_those_of_a_dictionary(values: list[str]) -> None:
    first: dict[str, int] = {}
    expected = []
    for i, value in enumerate(values):
        plain = " ".join(value.casefold().split())
        if not plain or first.setdefault(plain, i) == i:
            expected.append(i)
    assert find_duplicates(texts(*values), EXACT, fields=("text",)).kept().tolist() == expected


def test_what_is_taken_for_the_same_is_a_choice() -> None:
    rows = texts("if x:\n    y()", "if x:\n        y()", "IF X:\n    y()")
    as_they_are = DedupSettings(near=None, normalize=())
    assert find_duplicates(rows, as_they_are, fields=("text",)).kept().tolist() == [0, 1, 2]
    assert find_duplicates(rows, EXACT, fields=("text",)).kept().tolist() == [0]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_near_duplicates_are_those_of_comparing_all_with_all(seed: int) -> None:
    rows = variants(60, seed)
    near = NearDuplicates(threshold=0.8, recall=0.999999)
    verdicts = find_duplicates(rows, DedupSettings(near=near), fields=("text",))
    assert verdicts.kept().tolist() == kept_by_hand(rows, 0.8)
    for i in range(len(rows)):
        removal = verdicts.removal(i)
        if removal is not None:
            assert verdicts.removal(removal.of) is None, "what it is the same as is kept"
            true = similarity(rows[i]["text"], rows[removal.of]["text"])
            assert true >= 0.8
            assert removal.similarity is None or removal.similarity == pytest.approx(true, abs=1e-6)


def test_small_differences_do_not_add_up() -> None:
    """b is like a, c like b, but c not like a: b goes, and c has nothing beside it that stays."""
    words = STORY.split()
    a = STORY
    b = " ".join([*words[:-2], "now", "then"])
    c = " ".join(["Some", "other", *words[2:-2], "now", "then"])
    assert similarity(a, b) >= 0.85 <= similarity(b, c)
    assert similarity(a, c) < 0.85
    found = find_duplicates(texts(a, b, c), DedupSettings(near=NearDuplicates(threshold=0.85)), fields=("text",))
    assert found.kept().tolist() == [0, 2]


def test_a_copy_of_what_is_removed_names_what_stays() -> None:
    changed = STORY.replace("every respect", "all respects")
    found = find_duplicates(texts(STORY, changed, changed.upper()), DedupSettings(), fields=("text",))
    removal = found.removal(2)
    assert removal is not None
    assert (removal.reason, removal.of) == ("exact duplicate", 0)
    assert removal.similarity == pytest.approx(similarity(STORY, changed), abs=1e-6)


def test_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_dist.curation.dedup._CHUNK_TEXTS", 16)
    rows = variants(120, 1)
    here, there = (find_duplicates(rows, DedupSettings(), fields=("text",), num_processes=n) for n in (0, 2))
    assert here.kept().tolist() == there.kept().tolist()
    assert here.near.of.tolist() == there.near.of.tolist()
    assert 0 < len(here.kept()) < 120


def test_of_very_full_buckets_only_so_many_are_compared_and_that_is_said() -> None:
    rows = variants(200, 2)
    near = NearDuplicates(threshold=0.95, recall=0.9999, max_bucket=1)
    bounded = find_duplicates(rows, DedupSettings(near=near), fields=("text",))
    assert bounded.near.num_full_buckets > 0
    near = near.model_copy(update={"max_bucket": 1000})
    assert find_duplicates(rows, DedupSettings(near=near), fields=("text",)).near.num_full_buckets == 0


def test_of_very_many_candidates_the_likeliest_are_compared_and_that_is_said() -> None:
    """A copy but for a word, among many texts that are half as like it as that."""
    words = STORY.split()
    others = [" ".join([*words[:-6], *(f"w{i}{k}" for k in range(6))]) for i in range(40)]
    near = NearDuplicates(threshold=0.9, recall=0.9999, max_compared=2)
    rows = texts(*others, STORY, STORY.replace("one.", "two."))
    found = find_duplicates(rows, DedupSettings(near=near), fields=("text",))
    assert len(found.kept()) == 41
    assert found.near.of[41] == 40
    assert found.near.num_cut > 0


def test_records_without_text_in_the_chosen_fields_are_not_alike() -> None:
    rows = [
        {"input": "", "output": "a"},
        {"output": "b"},
        {"input": " ", "output": "c"},
        {"input": "x"},
        {"input": "X"},
    ]
    found = find_duplicates(rows, DedupSettings(), fields=("input",))
    assert found.kept().tolist() == [0, 1, 2, 3]
    assert found.num_empty == 3


def test_fields_are_told_apart_and_dialogues_compared_turn_by_turn() -> None:
    assert compared_text({"a": "x", "b": "y"}, ("a", "b")) != compared_text({"a": "xy"}, ("a", "b"))
    chat: list[dict[str, Any]] = [
        {"messages": [{"role": role, "content": "hi"}]} for role in ("user", "system", "user")
    ]
    assert find_duplicates(chat, EXACT, fields=("messages",)).kept().tolist() == [0, 1]
    with pytest.raises(DataError, match="'a' holds a bytes"):
        compared_text({"a": [b"x"]}, ("a",))
    with pytest.raises(TypeError, match="sequence of field names"):
        find_duplicates([], EXACT, fields="text")


def test_no_records_at_all() -> None:
    assert find_duplicates([], DedupSettings(), fields=("text",)).kept().tolist() == []


def index(folder: Path, *rows: str, **values: object) -> EvaluationIndex:
    chosen = Decontamination.model_validate({"against": {"e": {"path": "e.jsonl", "kind": "text"}}} | values)
    folder.mkdir()
    found = EvaluationIndex(folder, chosen)
    found.add("e", ((f"e.jsonl:{i}", text) for i, text in enumerate(rows, start=1)))
    found.finish()
    return found


def test_shared_runs_of_words_remove_a_record_whatever_their_case_and_punctuation(tmp_path: Path) -> None:
    evaluation = index(tmp_path / "i", "An owl and a cat went to sea, in a beautiful pea-green boat.", num_words=8)
    rows = texts(
        "Poem:\nTHE OWL AND A CAT WENT TO SEA in a boat!",
        "the owl and a cat went to sea",
        "owl and a dog went to sea in a beautiful pea",
        "x y went to sea in a beautiful, pea green boat",
        STORY,
        STORY,
    )
    found = find_duplicates(rows, EXACT, fields=("text",), evaluation=evaluation)
    assert found.kept().tolist() == [1, 2, 4]
    removal = found.removal(0)
    assert removal is not None
    assert (removal.reason, removal.run) == ("in an evaluation set", "owl and a cat went to sea in")
    assert evaluation.row(removal.of).location == "e.jsonl:1"
    evaluation.close()


def test_short_evaluation_records_are_looked_for_whole_and_shorter_ones_counted(tmp_path: Path) -> None:
    evaluation = index(tmp_path / "i", "how many legs does a dog have", "name a bird", num_words=13, min_words=5)
    rows = texts("Q: How many legs does a dog have?", "how many legs does a cat have", "name a bird")
    assert find_duplicates(rows, EXACT, fields=("text",), evaluation=evaluation).kept().tolist() == [1, 2]
    assert evaluation.report()["sets"] == {"e": {"records": 2, "too short to be looked for": 1}}
    evaluation.close()


def test_the_template_of_an_evaluation_set_is_not_its_content(tmp_path: Path) -> None:
    template = "Classify the sentiment of the following review as positive or negative"
    reviews = ["it was a dull afternoon and nothing helped it along", "a merry film of sheep and of what they think"]
    rows = [f"{template}: {review}" for review in (*reviews, *map(str, range(20)))]
    evaluation = index(tmp_path / "i", *rows, num_words=8, max_common=10)
    found = find_duplicates(
        texts(f"{template}: mine", f"Say this: {reviews[1]}"), EXACT, fields=("text",), evaluation=evaluation
    )
    assert found.kept().tolist() == [0]
    assert evaluation.num_common == 4  # eleven words, eight at a time
    evaluation.close()


def test_what_an_evaluation_set_contains_is_out_before_duplicates_are_looked_for(tmp_path: Path) -> None:
    """The first of two near-duplicates is contaminated; the second is not, and so stays."""
    evaluation = index(tmp_path / "i", "as if they had been sent to inspect it", num_words=8)
    clean = STORY.replace("been sent", "come")
    assert similarity(STORY, clean) > 0.8
    found = find_duplicates(texts(STORY, clean), DedupSettings(), fields=("text",), evaluation=evaluation)
    assert found.kept().tolist() == [1]
    evaluation.close()


def test_a_hash_that_agrees_by_chance_is_told_by_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_dist.curation.fingerprints.zlib.crc32", lambda data: 7)
    evaluation = index(tmp_path / "i", "one two three four five six seven eight", num_words=8)
    rows = texts("a b c d e f g h", "ONE two three four five six seven eight")
    assert find_duplicates(rows, EXACT, fields=("text",), evaluation=evaluation).kept().tolist() == [0]
    evaluation.close()


def test_a_digest_that_agrees_by_chance_is_told_by_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Same:
        def digest(self) -> bytes:
            return b"12345678"

    monkeypatch.setattr("rlhf_dist.curation.dedup.hashlib.blake2b", lambda *_, **__: Same())
    found = find_duplicates(texts("one", "two", "ONE"), EXACT, fields=("text",))
    assert found.kept().tolist() == [0, 1]
