"""What a text is compared by: its normalized form, its shingles, its MinHash signature in bands.

Runs in processes of their own, so it imports neither torch nor the data package. Texts come in chunks, and numpy works on a
chunk at a time: a text's length costs, its number does not.

MinHash (Broder 1997): the share of equal values in two signatures estimates the Jaccard similarity of two sets. The signatures
are rensa's (a variant of C-MinHash, Li & Li 2022: unbiased, and of smaller variance than independent permutations), which
makes them 9 times as fast as datasketch 2 at the same recall (measured; both are maintained).
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.curation.config.dedup import NearDuplicates

SEPARATOR = "\0"
"""Between the fields of a compared text. It is no whitespace, so normalization keeps it."""

_INVISIBLE: dict[int, None] = {0x00AD: None, 0x200B: None, 0xFEFF: None}
"""Soft hyphen, zero-width space and byte-order mark, which NFKC leaves."""
_PUNCTUATION = re.compile(rf"[^\w\s{SEPARATOR}]+")
# Scripts without spaces between words: each character counts as a word.
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SIGNATURE_SEED = 1


def normalized(text: str, steps: Sequence[str]) -> str:
    """`text` without the differences that `steps` (of `DedupSettings.normalize`) name; in a fixed order."""
    if "unicode" in steps and not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_INVISIBLE)
    if "case" in steps:
        text = text.casefold()
    if "punctuation" in steps:
        text = _PUNCTUATION.sub(" ", text)
    if "whitespace" in steps:
        text = SEPARATOR.join(" ".join(part.split()) for part in text.split(SEPARATOR))
    return text


def words(text: str) -> list[str]:
    """Its words without case and punctuation; where a script has no spaces, its characters."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_INVISIBLE)
    return _WORD.findall(text.casefold())


def encoded(text: str) -> bytes:
    """As UTF-8; half a character, which JSON can hold, is kept."""
    return text.encode("utf-8", "surrogatepass")


def windows(values: np.ndarray, lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of `size` values within each row.

    Args:
        values: [Σ lengths] unsigned, the rows end to end.
        lengths: [rows] of each row, all at least `size`.

    Returns:
        [Σ (lengths − size + 1)] uint64 hashes, row after row, and the [rows] number of each row.
    """
    num = max(len(values) - size + 1, 0)
    hashes = np.zeros(num, dtype=np.uint64)
    for k in range(size):
        hashes = hashes * _FACTOR + values[k : k + num].astype(np.uint64)
    inside = np.ones(len(hashes), dtype=bool)
    ends = np.cumsum(lengths)
    for k in range(1, size):
        inside[ends[:-1] - k] = False
    return _mixed(hashes[inside]), lengths - size + 1


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every bit depends on every bit."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def word_hashes(found: Sequence[str]) -> np.ndarray:
    """[len(found)] uint32."""
    return np.fromiter((zlib.crc32(encoded(word)) for word in found), dtype=np.uint32, count=len(found))


def shingles(texts: Sequence[str], settings: NearDuplicates) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the shingles of normalized texts, text after text, repeated ones too, and the number of each text.

    A text that is shorter than a shingle is one shingle.
    """
    size = settings.shingle_size
    if settings.shingle == "characters":
        padded = [text.ljust(size, SEPARATOR) for text in texts]
        lengths = np.array([len(text) for text in padded], dtype=np.int64)
        values = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    else:
        rows = [found + [SEPARATOR] * (size - len(found)) for found in (text.split() for text in texts)]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        values = word_hashes([word for row in rows for word in row])
    return windows(values, lengths, size)


def shingle_set(text: str, settings: NearDuplicates) -> np.ndarray:
    """Sorted hashes of the different shingles of a normalized text."""
    return np.unique(shingles([text], settings)[0])


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted sets of hashes."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


@dataclass(frozen=True)
class Banding:
    """A signature cut into `num_bands` bands of `num_rows` values. Two texts of similarity s have an equal band, and so are
    candidates, with probability 1 − (1 − s^r)^b (Leskovec, Rajaraman & Ullman, "Mining of Massive Datasets", 3.4)."""

    num_bands: int
    num_rows: int

    def probability(self, similarity: float) -> float:
        """That two texts of this similarity become candidates."""
        return 1 - (1 - similarity**self.num_rows) ** self.num_bands


def banding(settings: NearDuplicates) -> Banding:
    """The longest bands that make a pair at the threshold a candidate with probability `recall` or more.

    Raises:
        ConfigError: no bands do, with so few permutations.
    """
    total = settings.num_permutations
    for num_rows in range(total, 0, -1):
        found = Banding(total // num_rows, num_rows)
        if found.probability(settings.threshold) >= settings.recall:
            return found
    raise ConfigError(
        f"near.num_permutations {total} cannot find pairs of similarity {settings.threshold:g} with probability "
        f"{settings.recall:g}; raise num_permutations or threshold, or lower recall"
    )


@dataclass(frozen=True)
class Signatures:
    """Of a chunk of n texts."""

    bands: np.ndarray
    """[num_bands, n] uint64 hash of each band."""
    low_bytes: np.ndarray
    """[n, num_permutations] uint8, the last byte of each value: b-bit MinHash (Li & König 2010)."""


def signatures(texts: Sequence[str], settings: NearDuplicates) -> Signatures:
    """MinHash signatures of normalized texts.

    Raises:
        ConfigError: rensa is not installed.
    """
    try:
        from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue] (compiled, without stubs)
    except ImportError as error:
        raise ConfigError(
            "near-duplicates need the package rensa, which is not installed; pip install 'rlhf-dist[curation]', or set near "
            "to null"
        ) from error
    hashes, counts = shingles(texts, settings)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.uint64)
    total = settings.num_permutations
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, total, _SIGNATURE_SEED)
    values = np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(texts), total)
    shape = banding(settings)
    used = values[:, : shape.num_bands * shape.num_rows].reshape(len(texts), shape.num_bands, shape.num_rows)
    bands = np.zeros((len(texts), shape.num_bands), dtype=np.uint64)
    for k in range(shape.num_rows):
        bands = bands * _FACTOR + used[:, :, k]
    return Signatures(np.ascontiguousarray(_mixed(bands).T), values.astype(np.uint8))
