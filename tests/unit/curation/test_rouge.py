"""ROUGE-L and the exact search for the nearest text."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Indel

from rlhf_dist.curation.rouge import Near, SimilarityIndex, rouge_l, rouge_tokens


def lcs_table(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence by the table of every textbook."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def nearest_by_brute_force(kept: list[list[str]], new: list[str], threshold: float) -> Near | None:
    scores = [Fraction(2 * lcs_table(new, old), len(new) + len(old)) if new and old else Fraction(0) for old in kept]
    above = [(score, -number) for number, score in enumerate(scores) if float(score) > threshold]
    return Near(-max(above)[1], float(max(above)[0])) if above else None


def test_by_hand() -> None:
    # Lin 2004, section 3: "police killed the gunman" / "police kill the gunman" / "the gunman kill police".
    reference = ["police", "killed", "the", "gunman"]
    assert rouge_l(reference, ["police", "kill", "the", "gunman"]) == 0.75
    assert rouge_l(reference, ["the", "gunman", "kill", "police"]) == 0.5
    assert rouge_l(["a", "b", "c"], ["a", "c"]) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert rouge_l([], ["a"]) == rouge_l([], []) == 0


def test_it_is_rapidfuzz_similarity_of_sequences() -> None:
    draw = random.Random(0)
    for _ in range(200):
        a, b = ([draw.choice("abcde") for _ in range(draw.randint(1, 12))] for _ in range(2))
        assert rouge_l(a, b) == pytest.approx(Indel.normalized_similarity(a, b), abs=1e-12)
        assert rouge_l(a, b) == pytest.approx(2 * lcs_table(a, b) / (len(a) + len(b)), abs=1e-12)


def test_tokens() -> None:
    assert rouge_tokens("Don't re-write: 3.5 a_b!") == ["don", "t", "re", "write", "3", "5", "a", "b"]
    assert rouge_tokens("Überprüfe ÉTÉ") == ["überprüfe", "été"]
    assert rouge_tokens("GPT翻訳する") == ["gpt", "翻", "訳", "す", "る"]
    assert rouge_tokens("?!") == []


WORDS = st.lists(st.sampled_from("abcdefgh"), max_size=14)


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(WORDS, min_size=1, max_size=25),
    threshold=st.sampled_from([0.05, 0.3, 0.5, 2 / 3, 0.7, 0.75, 0.9, 0.99, 1.0]),
)
def test_the_search_finds_what_brute_force_finds(texts: list[list[str]], threshold: float) -> None:
    """Few different words, so that texts of every similarity come up, ties and exact thresholds among them."""
    index = SimilarityIndex(threshold)
    for number, text in enumerate(texts):
        assert index.nearest(text) == nearest_by_brute_force(texts[:number], text, threshold)
        assert index.add(text) == number


def test_the_search_finds_what_brute_force_finds_in_longer_texts() -> None:
    """Zipf's law and perturbed copies, over several doublings of the index; some 60,000 pairs."""
    draw = random.Random(1)
    vocabulary = [f"w{i}" for i in range(400)]
    weights = [1 / (i + 1) for i in range(400)]
    texts: list[list[str]] = []
    for _ in range(350):
        if texts and draw.random() < 0.6:
            rate = draw.random() * 0.5
            text = [t for t in draw.choice(texts) if draw.random() > rate / 2]
            text = [draw.choices(vocabulary, weights)[0] if draw.random() < rate / 2 else t for t in text]
        else:
            text = draw.choices(vocabulary, weights, k=draw.randint(3, 40))
        texts.append(text)
    index = SimilarityIndex(0.7)
    found = []
    for number, text in enumerate(texts):
        near = index.nearest(text)
        assert near == nearest_by_brute_force(texts[:number], text, 0.7)
        found.append(near)
        index.add(text)
    assert 60 < sum(near is not None for near in found) < 290
    assert index.num_compared < 0.2 * len(texts) ** 2 / 2


def test_a_threshold_of_1_finds_nothing_since_nothing_is_above_it() -> None:
    index = SimilarityIndex(1.0)
    index.add(["a", "b"])
    assert index.nearest(["a", "b"]) is None
