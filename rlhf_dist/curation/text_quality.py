"""What is odd about a text before any model has read it: characters that nobody typed, encodings that went wrong, scripts.

Nothing here is an error by itself: an Arabic text has its direction marks, and a bug report its control characters. What is
found is counted and shown, so that somebody can look.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

MAX_PLACES = 5
"""Places of an oddity that a report names; the rest is only counted."""
_AROUND = 24
"""Characters before and behind an oddity in its excerpt."""

MIXED_ENDS, MOJIBAKE, DECOMPOSED = "mixed line ends", "mojibake", "not in composed form"
SPELLED_OUT = "special tokens spelled out"
_PATTERNS: dict[str, tuple[str, str]] = {
    "replacement character": (
        "\ufffd",
        "U+FFFD stands where a character was lost: the file was decoded with errors ignored; read the original again",
    ),
    "control characters": (
        r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f]",
        "terminal codes, null bytes and the like; C1 codes (U+0080 to U+009F) are mostly Windows-1252 read as Latin-1",
    ),
    "zero-width characters": (
        "[\u200b\u2060\ufeff\u00ad]|(?<=[\x20-\u024f])[\u200c\u200d](?=[\x20-\u024f])",
        "invisible, yet tokens: zero-width spaces, byte-order marks, soft hyphens, joiners between Latin letters",
    ),
    "bidirectional controls": (
        "[\u202a-\u202e\u2066-\u2069]",
        "change the order in which text is displayed, so that it reads otherwise than the model reads it",
    ),
    "invisible tag characters": (
        "(?:^|[^\U0001f3f4\U000e0000-\U000e007f])[\U000e0000-\U000e007f]",
        "unseen letters, a way to hide instructions in text",
    ),
    MIXED_ENDS: (r"(?<!\r)\n", "CR LF and LF in one text; make them one"),
    "carriage returns": (r"\r", "line ends of Windows or of old files, a token of its own in most vocabularies"),
    "unusual line separators": ("[\u0085\u2028\u2029]", "line ends that are no line feed"),
    "private-use characters": (
        "[\ue000-\uf8ff\U000f0000-\U0010ffff]",
        "characters without a meaning outside the font they were made for, as PDF extraction leaves them",
    ),
    "words of mixed scripts": (
        r"[A-Za-z][\u0370-\u03ff\u0400-\u04ff](?=[A-Za-z\u0370-\u04ff])|[\u0370-\u03ff\u0400-\u04ff][A-Za-z](?=[A-Za-z\u0370-\u04ff])",
        "a Latin letter beside a Greek or Cyrillic one: look-alikes, or a typing error",
    ),
    "HTML left in": (
        r"&(?:amp|lt|gt|quot|nbsp|#\d{1,6}|#x[0-9a-fA-F]{1,6});|</?(?:p|br|div|span|b|i|a|li|ul|td|tr|table)\b[^<>]{0,200}>",
        "entities and tags; leave them where the data are about HTML",
    ),
    "very long words": (
        r"[^\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\uffef]{120,}",
        "base64, long URLs, lost spaces",
    ),
}
_COMPILED = {name: re.compile(pattern) for name, (pattern, _) in _PATTERNS.items()}
MEANINGS = {name: meaning for name, (_, meaning) in _PATTERNS.items()} | {
    MOJIBAKE: "UTF-8 that was read as another encoding (ftfy's badness heuristic), such as Ã© for é; ftfy.fix_text fixes it",
    SPELLED_OUT: "marks such as </s> in people's text: they are tokenized as text, and no token of the model's",
    DECOMPOSED: "letters and accents apart (not NFC): the same word then has two spellings in tokens",
}
"""Oddity → what it means."""
_ASCII_MATTERS = frozenset({"control characters", MIXED_ENDS, "carriage returns", "HTML left in", "very long words"})


@dataclass
class OddityCounts:
    """How many texts have an oddity, and where the first are."""

    num_texts: int = 0
    places: list[tuple[str, str]] = field(default_factory=list)
    """Place and excerpt of the first `MAX_PLACES`."""


@lru_cache(maxsize=1)
def _mojibake() -> Callable[[str], re.Match[str] | None] | None:
    """ftfy's search; None where it is not installed."""
    try:
        from ftfy.badness import BADNESS_RE
    except ImportError:
        return None
    return BADNESS_RE.search


def looks_for_mojibake() -> bool:
    """Whether ftfy is installed (the extra `curation`)."""
    return _mojibake() is not None


def oddities(text: str, special: re.Pattern[str] | None = None) -> dict[str, str]:
    """Each oddity of a text, with the words around the first place as an excerpt. `special` matches what spells a special token
    of the tokenizer."""
    found: dict[str, str] = {}
    match = special.search(text) if special is not None else None
    if match is not None:
        found[SPELLED_OUT] = _excerpt(text, match.start(), match.end())
    ascii_only = text.isascii()
    for name, pattern in _COMPILED.items():
        if not ascii_only or name in _ASCII_MATTERS:
            match = pattern.search(text)
            if match is not None and (name != MIXED_ENDS or "\r\n" in text):
                found[name] = _excerpt(text, match.start(), match.end())
    if MIXED_ENDS in found:
        found.pop("carriage returns", None)
    if not ascii_only:
        search = _mojibake()
        match = search(text) if search is not None else None
        if match is not None:
            found[MOJIBAKE] = _excerpt(text, match.start(), match.end())
        if not unicodedata.is_normalized("NFC", text):
            composed = unicodedata.normalize("NFC", text)
            at = next((i for i, (a, b) in enumerate(zip(text, composed, strict=False)) if a != b), 0)
            found[DECOMPOSED] = _excerpt(text, at, at + 2)
    return found


def count_oddities(
    texts: Iterable[tuple[str, str]], special: re.Pattern[str] | None = None
) -> tuple[dict[str, OddityCounts], list[tuple[str, ...]]]:
    """Oddities of (place, text) pairs, the most frequent first; and which each text has. `special` as in `oddities`."""
    counts: dict[str, OddityCounts] = {}
    of_texts: list[tuple[str, ...]] = []
    for place, text in texts:
        found = oddities(text, special)
        of_texts.append(tuple(found))
        for name, excerpt in found.items():
            count = counts.setdefault(name, OddityCounts())
            count.num_texts += 1
            if len(count.places) < MAX_PLACES:
                count.places.append((place, excerpt))
    return dict(sorted(counts.items(), key=lambda item: -item[1].num_texts)), of_texts


def _excerpt(text: str, start: int, end: int) -> str:
    end = min(end, start + _AROUND)
    before, behind = text[max(start - _AROUND, 0) : start], text[end : end + _AROUND]
    return (
        f"{'…' if start > _AROUND else ''}{before}{text[start:end]}{behind}{'…' if end + _AROUND < len(text) else ''}"
    )


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str:
    """The script of a letter, by the first word of its Unicode name (`Latin`, `Cyrillic`, `Cjk`, ...); "" for what is no
    letter."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    name = unicodedata.name(character, "unnamed")
    first = name.split(" ")[0].removesuffix("-")
    if first in ("FULLWIDTH", "HALFWIDTH", "MATHEMATICAL", "MODIFIER", "SUPERSCRIPT", "FEMININE", "MASCULINE", "MICRO"):
        return "Latin" if "LATIN" in name else first.capitalize()
    return {"CJK": "Han"}.get(first, first.capitalize())


def scripts(text: str) -> Counter[str]:
    """Letters of each script in a text."""
    counts: Counter[str] = Counter()
    if text.isascii():
        letters = sum(map(str.isalpha, text))
        return Counter({"Latin": letters}) if letters else counts
    for character, number in Counter(text).items():
        script = script_of(character)
        if script:
            counts[script] += number
    return counts


def visible(text: str) -> Iterator[tuple[str, bool]]:
    """A text in parts that show what would be unseen or act on the display: (part, whether it stands for a character).

    A line feed is given as a mark and then as itself. Control, format, private-use and unassigned characters, lone surrogates,
    and white space that is no space become ⟨U+....⟩: nothing in such a text can move a cursor or turn the reading direction.
    Joiners stay, for Persian and Indic scripts and emoji are spelt with them.
    """
    plain: list[str] = []
    for character in text:
        mark = _mark(character)
        if not mark:
            plain.append(character)
            continue
        if plain:
            yield "".join(plain), False
            plain = []
        yield mark, True
        if character == "\n":
            yield "\n", False
    if plain:
        yield "".join(plain), False


def printable(text: str) -> str:
    """As `visible`, on one line."""
    return "".join(part for part, _ in visible(text) if part != "\n")


@lru_cache(maxsize=1 << 14)
def _mark(character: str) -> str:
    if character in "\n\t\r":
        return {"\n": "↵", "\t": "⇥", "\r": "⟨CR⟩"}[character]
    if character in "\u200c\u200d":
        return ""
    category = unicodedata.category(character)
    unusual_space = category == "Zs" and character not in " \u3000"
    return f"⟨U+{ord(character):04X}⟩" if category[0] == "C" or category in ("Zl", "Zp") or unusual_space else ""
