from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.curation.config.dedup import NearDuplicates
from rlhf_dist.curation.fingerprints import (
    banding,
    jaccard,
    normalized,
    shingle_set,
    shingles,
    signatures,
    windows,
    words,
)

TEXTS = st.text(alphabet="abc \n", max_size=30)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], "Ｆｕｌｌ\u200b  Straße!\0B"),
        (["unicode"], "Full  Straße!\0B"),
        (["case"], "ｆｕｌｌ\u200b  strasse!\0b"),
        (["whitespace"], "Ｆｕｌｌ\u200b Straße!\0B"),
        (["punctuation", "whitespace", "unicode", "case"], "full strasse\0b"),
    ],
)
def test_only_the_differences_that_are_named_are_taken_away(steps: list[str], expected: str) -> None:
    assert normalized("Ｆｕｌｌ\u200b  Straße!\0B", steps) == expected


def test_words_have_neither_case_nor_punctuation_and_scripts_without_spaces_count_characters() -> None:
    assert words("Don't PANIC, e.g. ｎｏｗ_!") == ["don", "t", "panic", "e", "g", "now"]
    assert words("我爱 NLP です") == ["我", "爱", "nlp", "で", "す"]


@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=9), min_size=1, max_size=6))
def test_windows_are_equal_where_the_runs_are_and_never_cross_a_row(rows: list[list[int]]) -> None:
    flat = np.array([value for row in rows for value in row], dtype=np.uint32)
    hashes, counts = windows(flat, np.array([len(row) for row in rows]), 3)
    runs = [tuple(row[i : i + 3]) for row in rows for i in range(len(row) - 2)]
    assert counts.tolist() == [len(row) - 2 for row in rows]
    assert [[a == b for b in hashes] for a in hashes] == [[a == b for b in runs] for a in runs]


@given(TEXTS, TEXTS)
def test_similarity_is_that_of_the_sets_of_substrings(a: str, b: str) -> None:
    settings = NearDuplicates(shingle_size=3)

    def plain(text: str) -> set[str]:
        text = text.ljust(3, "\0")
        return {text[i : i + 3] for i in range(len(text) - 2)}

    expected = len(plain(a) & plain(b)) / len(plain(a) | plain(b))
    assert jaccard(shingle_set(a, settings), shingle_set(b, settings)) == expected


def test_shingles_of_words_are_of_words() -> None:
    settings = NearDuplicates(shingle="words", shingle_size=2)
    a, b = (shingle_set(text, settings) for text in ("the cat sat down", "the  cat sat up"))
    assert jaccard(a, b) == 2 / 4  # "the cat", "cat sat" of those and "sat down", "sat up"
    assert shingles(["one", ""], settings)[1].tolist() == [1, 1]


def test_bands_are_the_longest_that_find_pairs_at_the_threshold_surely_enough() -> None:
    shape = banding(NearDuplicates(threshold=0.8, num_permutations=128, recall=0.99))
    assert (shape.num_bands, shape.num_rows) == (21, 6)
    assert shape.probability(0.8) == pytest.approx(1 - (1 - 0.262144) ** 21)
    assert 1 - (1 - 0.8**7) ** 18 < 0.99  # what the next longer band would do
    with pytest.raises(ConfigError, match=r"num_permutations 16 cannot find pairs of similarity 0\.1"):
        banding(NearDuplicates(threshold=0.1, num_permutations=16))


def test_signatures_estimate_similarity_and_bands_meet_as_often_as_the_curve_says() -> None:
    """On pairs of texts of 100 random words that share 70 to 100 of them."""
    settings = NearDuplicates(shingle="words", shingle_size=1, threshold=0.8, recall=0.9)
    shape = banding(settings)
    rng = np.random.default_rng(0)
    one, other, similarity = [], [], []
    for pair in range(3000):
        shared = int(rng.integers(70, 101))
        both = [f"w{pair}-{n}" for n in range(200 - shared)]
        one.append(" ".join(both[:100]))
        other.append(" ".join(both[100 - shared : 200 - shared]))
        assert len(other[pair].split()) == 100
        similarity.append(shared / (200 - shared))
    a, b = signatures(one, settings), signatures(other, settings)
    true = np.array(similarity)
    estimated = ((a.low_bytes == b.low_bytes).mean(axis=1) - 1 / 256) / (1 - 1 / 256)
    assert abs((estimated - true).mean()) < 0.003
    assert np.abs(estimated - true).max() < 0.25
    met = (a.bands == b.bands).any(axis=0)
    for low in (0.5, 0.6, 0.7, 0.8):
        here = (true >= low) & (true < low + 0.1)
        expected = np.array([shape.probability(s) for s in true[here]])
        deviation = (expected * (1 - expected)).sum() ** 0.5 / here.sum()
        assert abs(met[here].mean() - expected.mean()) < 4 * deviation + 0.01
