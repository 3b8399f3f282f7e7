"""The gold score: what people think of the words of a response, measured from their ratings and not by the reward model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rlhf_dist.quickstart.lexicon import RatedWord, human_ratings

_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class GoldScore:
    """The words of one response against the lexicon."""

    valence: float
    """Mean human valence in [-4, 4] over the *distinct* lexicon words, so that repeating a loved word gains nothing; 0
    (what a word nobody feels anything about has) when the response holds no lexicon word."""
    num_words: int
    """Runs of letters in the response."""
    num_real_words: int
    """Those that are lexicon words."""
    num_distinct_words: int
    """Different words among `num_words`."""


def gold_score(text: str, lexicon: Mapping[str, RatedWord] | None = None) -> GoldScore:
    """Score one response. Words are compared in lower case; what is not a letter separates words."""
    lexicon = human_ratings() if lexicon is None else lexicon
    words = [word.lower() for word in _WORD.findall(text)]
    distinct = dict.fromkeys(words)
    valences = [lexicon[word].valence for word in distinct if word in lexicon]
    return GoldScore(
        valence=sum(valences) / len(valences) if valences else 0.0,
        num_words=len(words),
        num_real_words=sum(word in lexicon for word in words),
        num_distinct_words=len(distinct),
    )


@dataclass(frozen=True)
class GoldSummary:
    """Gold scores of a set of responses."""

    num_responses: int
    gold_mean: float
    """Mean over responses of `GoldScore.valence`."""
    gold_stderr: float
    """Standard error of `gold_mean` over responses."""
    real_word_share: float
    """Lexicon words among all generated words."""
    distinct_word_share: float
    """Different words among the words of one response, averaged over responses; 1 when no response repeats itself."""
    vocabulary_size: int
    """Different lexicon words over all responses: how far the policy has narrowed."""
    words_per_response: float

    def to_dict(self) -> dict[str, float]:
        """For `summary.json`."""
        return asdict(self)


def summarize_gold(texts: Sequence[str], lexicon: Mapping[str, RatedWord] | None = None) -> GoldSummary:
    """Gold scores of `texts` with their standard error. A response without any word counts: valence 0, share 0."""
    lexicon = human_ratings() if lexicon is None else lexicon
    scores = [gold_score(text, lexicon) for text in texts]
    num = len(scores)
    if not num:
        return GoldSummary(0, 0.0, 0.0, 0.0, 0.0, 0, 0.0)
    mean = sum(s.valence for s in scores) / num
    variance = sum((s.valence - mean) ** 2 for s in scores) / max(num - 1, 1)
    num_words = sum(s.num_words for s in scores)
    used = {word.lower() for text in texts for word in _WORD.findall(text)}
    return GoldSummary(
        num_responses=num,
        gold_mean=mean,
        gold_stderr=math.sqrt(variance / num),
        real_word_share=sum(s.num_real_words for s in scores) / max(num_words, 1),
        distinct_word_share=sum(s.num_distinct_words / max(s.num_words, 1) for s in scores) / num,
        vocabulary_size=sum(word in lexicon for word in used),
        words_per_response=num_words / num,
    )
