"""The gold score against hand-made ratings."""

from __future__ import annotations

import pytest

from rlhf_dist.quickstart.gold import GoldScore, gold_score, summarize_gold
from rlhf_dist.quickstart.lexicon import RatedWord

LEXICON = {word: RatedWord(word, valence, 0.5, ()) for word, valence in (("love", 3.0), ("calm", 1.0), ("hate", -3.0))}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("love, hate.", GoldScore(0.0, 2, 2, 2)),
        ("Love, CALM.", GoldScore(2.0, 2, 2, 2)),
        # A loved word repeated counts once, and shows in the number of different words.
        ("love, love, love, calm.", GoldScore(2.0, 4, 4, 2)),
        # A word that is not in the lexicon is no reason for a valence, but lowers the share of real words.
        ("love, lovex.", GoldScore(3.0, 2, 1, 2)),
        ("xyz, abc.", GoldScore(0.0, 2, 0, 2)),
        ("", GoldScore(0.0, 0, 0, 0)),
        ("123 ... !", GoldScore(0.0, 0, 0, 0)),
        ("tình yêu, love", GoldScore(3.0, 3, 1, 3)),
    ],
)
def test_gold_score(text: str, score: GoldScore):
    assert gold_score(text, LEXICON) == score


def test_the_installed_lexicon_is_the_default():
    assert gold_score("love").valence > 3


def test_summary_has_the_standard_error_over_responses():
    summary = summarize_gold(["love.", "hate.", "calm, calm.", "zzz."], LEXICON)
    assert summary.num_responses == 4
    assert summary.gold_mean == pytest.approx((3 - 3 + 1 + 0) / 4)
    variance = sum((v - 0.25) ** 2 for v in (3, -3, 1, 0)) / 3
    assert summary.gold_stderr == pytest.approx((variance / 4) ** 0.5)
    assert summary.real_word_share == pytest.approx(4 / 5)
    assert summary.distinct_word_share == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert summary.vocabulary_size == 3


def test_a_collapse_to_nothing_is_visible_and_does_not_divide_by_zero():
    assert summarize_gold(["", ""], LEXICON).real_word_share == 0
    assert summarize_gold([], LEXICON).num_responses == 0
