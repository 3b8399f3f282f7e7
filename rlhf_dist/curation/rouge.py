"""ROUGE-L between short texts, and the nearest of many kept texts without comparing with each.

ROUGE-L (Lin 2004) of two token sequences of lengths m and n with a longest common subsequence of L tokens: P = L/m, R = L/n,
F = 2PR/(P + R) = 2L/(m + n).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_dist.core.errors import ConfigError

_BY_CHARACTER = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Han. Their tokens are characters."""
_TOKEN = re.compile(f"[{_BY_CHARACTER}]|[^\\W_{_BY_CHARACTER}]+")
_WORD = re.compile(f"[{_BY_CHARACTER}]|[^\\s{_BY_CHARACTER}]+")


def rouge_tokens(text: str) -> list[str]:
    """Lower-case runs of letters and digits, as Google's rouge_score has them (without stemming), but of any script."""
    return _TOKEN.findall(text.lower())


def words(text: str) -> list[str]:
    """What stands between white space; single characters of scripts that put none between words."""
    return _WORD.findall(text)


def rouge_l(a: Sequence[Any], b: Sequence[Any]) -> float:
    """F of ROUGE-L between two token sequences; 0 where one is empty."""
    return 2 * _lcs()(a, b) / (len(a) + len(b)) if a and b else 0.0


class Near(NamedTuple):
    """A kept text and how similar it is."""

    number: int
    """In the order in which texts were added, from 0."""
    similarity: float
    """F of ROUGE-L."""


class SimilarityIndex:
    """Finds, exactly, the kept text that is most similar to a new one, if any has F > threshold.

    How it is spared comparing with all: F > threshold asks for a common subsequence of at least
    L(m, n) = ⌊threshold · (m + n)/2⌋ + 1 tokens. Then (1) neither text is shorter than L(m, n), which bounds n by m; and
    (2) the texts share at least L(m, n) tokens, counted with their repetitions, so that with the tokens of each sorted by one
    order the first m − L + 1 of one and the first n − L + 1 of the other have one in common (prefix filter: Chaudhuri et al.
    2006; Bayardo et al. 2007). The order is from rare to frequent, so an inverted index over those few rare tokens,
    split by length, leaves a handful of texts to compare. Nothing is approximate.
    """

    def __init__(self, threshold: float) -> None:
        """`threshold`: in (0, 1].

        Raises:
            ConfigError: the package rapidfuzz is missing.
        """
        self.threshold = threshold
        self._lcs = _lcs()
        self._ids: dict[str, int] = {}
        self._texts: list[list[int]] = []
        self._ranks: dict[tuple[int, int], int] = {}
        self._postings: dict[int, dict[tuple[int, int], list[tuple[int, int]]]] = {}
        self._ranked_at = 0
        self._needed: dict[int, int] = {}
        self._prefixes: dict[int, int] = {}
        self.num_compared = 0
        """Pairs of texts compared so far."""

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, tokens: Sequence[str]) -> int:
        """Keep a text; returns its number."""
        text = [self._ids.setdefault(token, len(self._ids)) for token in tokens]
        self._texts.append(text)
        if len(self._texts) > 2 * self._ranked_at:
            self._rank()
        else:
            self._post(len(self._texts) - 1)
        return len(self._texts) - 1

    def nearest(self, tokens: Sequence[str]) -> Near | None:
        """The kept text with the highest F, the first of several; None where none is above the threshold."""
        # Tokens that no kept text has need no number, but count as tokens that are not shared.
        text = [self._ids.get(token, -1 - i) for i, token in enumerate(tokens)]
        best = None
        for number in sorted(self._candidates(text)):
            other = self._texts[number]
            total = len(text) + len(other)
            needed = self._common(total) if best is None else max(1, int(best.similarity * total / 2))
            similarity = 2 * self._lcs(text, other, score_cutoff=needed) / total
            self.num_compared += 1
            if similarity > (self.threshold if best is None else best.similarity):
                best = Near(number, similarity)
        return best

    def _candidates(self, text: list[int]) -> set[int]:
        """Kept texts that may be above the threshold: all that are, and some that are not."""
        found: set[int] = set()
        if not text:
            return found
        elements, length = self._sorted(text), len(text)
        for other, postings in self._postings.items():
            common = self._common(length + other)
            if common > min(length, other):
                continue
            prefix = other - common + 1
            for element in elements[: length - common + 1]:
                found.update(number for place, number in postings.get(element, ()) if place < prefix)
        return found

    def _common(self, total: int) -> int:
        """The fewest common tokens with which F of two texts of `total` tokens is above the threshold."""
        if total not in self._needed:
            common = int(self.threshold * total / 2)
            while common > 0 and 2 * (common - 1) / total > self.threshold:
                common -= 1
            while 2 * common / total <= self.threshold:
                common += 1
            self._needed[total] = common
        return self._needed[total]

    def _prefix(self, length: int) -> int:
        """How many of a text's rarest tokens any search may ask for: those for the shortest text it can be compared with."""
        if length not in self._prefixes:
            shortest = next((m for m in range(1, length + 1) if self._common(m + length) <= m), None)
            self._prefixes[length] = 0 if shortest is None else length - self._common(shortest + length) + 1
        return self._prefixes[length]

    def _post(self, number: int) -> None:
        text = self._texts[number]
        postings = self._postings.setdefault(len(text), {})
        for place, element in enumerate(self._sorted(text)[: self._prefix(len(text))]):
            postings.setdefault(element, []).append((place, number))

    def _sorted(self, text: list[int]) -> list[tuple[int, int]]:
        """Tokens with the number of their repetition, rare ones first; ones never seen before are the rarest."""
        ranks = self._ranks
        elements = _with_repetitions(text)
        for element in elements:
            if element[0] >= 0 and element not in ranks:
                ranks[element] = -len(ranks) - 1  # from now on until the next ranking
        return sorted(elements, key=lambda e: ranks[e] if e in ranks else e[0] - 2**60)

    def _rank(self) -> None:
        """Order the tokens anew by how frequent they are now. Done whenever the number of texts has doubled."""
        counts = Counter(element for text in self._texts for element in _with_repetitions(text))
        self._ranks = {element: rank for rank, element in enumerate(sorted(counts, key=lambda e: (counts[e], e)))}
        self._ranked_at = len(self._texts)
        self._postings = {}
        for number in range(len(self._texts)):
            self._post(number)


def _with_repetitions(text: Sequence[int]) -> list[tuple[int, int]]:
    seen: Counter[int] = Counter()
    elements = []
    for token in text:
        elements.append((token, seen[token]))
        seen[token] += 1
    return elements


def _lcs() -> Any:
    try:
        from rapidfuzz.distance import LCSseq
    except ImportError as error:
        raise ConfigError(
            "ROUGE-L needs the package rapidfuzz, which is not installed; run `pip install 'rlhf-dist[curation]'`"
        ) from error
    return LCSseq.similarity


def nearest_of(texts: Sequence[Sequence[str]], asked: Sequence[int]) -> list[Near]:
    """For each text of the numbers `asked` the most similar other one, by comparing with all (in C++).

    Where there is no other text, nothing is returned.
    """
    from rapidfuzz.distance import Indel
    from rapidfuzz.process import extractOne

    if len(texts) < 2:
        return []
    # One character a token lets rapidfuzz compare strings. Tokens that no asked text has match nothing: they share one.
    known: dict[str, str] = {}
    for token in (token for number in asked for token in texts[number]):
        known.setdefault(token, chr(0xE000 + len(known)))
    coded: list[str | None] = ["".join(known.get(token, " ") for token in text) for text in texts]
    found = []
    for number in asked:
        own, coded[number] = coded[number], None  # not compared with itself
        best = extractOne(own, coded, scorer=Indel.normalized_similarity)
        coded[number] = own
        found.append(Near(best[2], best[1]))
    return found
