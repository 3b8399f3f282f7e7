"""Human word ratings: the VADER lexicon (Hutto & Gilbert 2014, MIT), which ships inside the `vaderSentiment` package.

Ten people rated each of about 7,500 words and emoticons from -4 (very negative) to 4 (very positive).
"""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rlhf_dist.core.errors import DataError


@dataclass(frozen=True)
class RatedWord:
    """A word and what people felt about it."""

    word: str
    """Lower-case letters a-z only."""
    valence: float
    """Mean of `ratings`, in [-4, 4]."""
    std: float
    """Standard deviation of `ratings`."""
    ratings: tuple[int, ...]
    """Ten people's ratings, each in -4..4."""


def lexicon_path() -> Path:
    """The lexicon file of the installed `vaderSentiment` package; DataError when there is none."""
    spec = importlib.util.find_spec("vaderSentiment")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        path = Path(folder) / "vader_lexicon.txt"
        if path.is_file():
            return path
    raise DataError(
        f"vader_lexicon.txt was not found (package vaderSentiment: {folders or 'not installed'}), and the starter data is "
        "made from it; run `pip install vaderSentiment`"
    )


def read_lexicon(path: Path | None = None) -> dict[str, RatedWord]:
    """The lexicon's purely alphabetic words, in file order (sorted); emoticons and numbers are skipped.

    Raises DataError, naming the line, when a row is not `word TAB mean TAB std TAB [ten ratings]`.
    """
    path = path or lexicon_path()
    words = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            word, mean, std, ratings = line.split("\t")
            rated = RatedWord(word, float(mean), float(std), tuple(int(r) for r in json.loads(ratings)))
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: {line[:80]!r} is not `word TAB mean TAB std TAB [ratings]` ({error}); "
                "reinstall vaderSentiment"
            ) from error
        if word.isascii() and word.isalpha() and word.islower():
            words[word] = rated
    return words


@cache
def human_ratings() -> dict[str, RatedWord]:
    """`read_lexicon()` of the installed package, read once."""
    return read_lexicon()


def by_initial(words: Iterable[RatedWord], min_words: int) -> dict[str, tuple[RatedWord, ...]]:
    """Words grouped by first letter; letters with fewer than `min_words` words are skipped."""
    groups: dict[str, list[RatedWord]] = defaultdict(list)
    for word in words:
        groups[word.word[0]].append(word)
    return {letter: tuple(group) for letter, group in sorted(groups.items()) if len(group) >= min_words}
