"""Near-duplicates among many texts: MinHash bands on disk, buckets by sorting, candidates compared by their true similarity.

What is in memory grows by a few bytes a text: one band is sorted at a time (16 bytes a text), and of the buckets only those
with two texts or more are kept (24 bytes a text and bucket). Signatures, bands and texts are on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import Self

from rlhf_dist.curation.config.dedup import NearDuplicates
from rlhf_dist.curation.fingerprints import Signatures, banding, jaccard, shingle_set

_DEVIATIONS = 4
"""A candidate whose estimated similarity is so many standard deviations below the threshold is not looked at further: one in
thirty thousand of the pairs at the threshold."""
_SETS_IN_MEMORY = 8192
"""Shingle sets that are not computed anew when a text is compared again; some 2 kB each for texts of 300 characters."""


class BandFiles:
    """Signatures on disk: a file for each band, and one of the signatures' last bytes. A context manager."""

    def __init__(self, folder: Path, settings: NearDuplicates) -> None:
        """Make the files in a folder that is there."""
        self.settings = settings
        self._bands = [folder / f"band_{band}.u64" for band in range(banding(settings).num_bands)]
        self._low_bytes = folder / "low_bytes.u8"
        self._files: list[Any] = [path.open("xb") for path in [*self._bands, self._low_bytes]]
        self._num_texts = 0

    def append(self, chunk: Signatures) -> None:
        """Add the signatures of the next texts."""
        for file, column in zip(self._files, [*chunk.bands, chunk.low_bytes], strict=True):
            file.write(column.tobytes())
        self._num_texts += len(chunk.low_bytes)

    def columns(self) -> Iterator[np.ndarray]:
        """Band after band: [texts] uint64."""
        self._flush()
        for path in self._bands:
            yield np.fromfile(path, dtype=np.uint64)

    def low_bytes(self) -> np.ndarray:
        """[texts, num_permutations] uint8, left on disk until it is read."""
        self._flush()
        shape = (self._num_texts, self.settings.num_permutations)
        return np.memmap(self._low_bytes, dtype=np.uint8, mode="r", shape=shape) if self._num_texts else np.zeros(shape)

    def _flush(self) -> None:
        for file in self._files:
            file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()


@dataclass(frozen=True)
class Buckets:
    """Texts with an equal band: bucket g holds members[starts[g]:starts[g + 1]], rising. Only buckets of two or more."""

    members: np.ndarray
    """uint32: of a text in several buckets, once for each."""
    starts: np.ndarray
    """[buckets + 1] int64."""

    def of_texts(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each text that is in a bucket, rising, with its buckets."""
        order = np.argsort(self.members, kind="stable")
        texts = self.members[order]
        buckets = np.repeat(np.arange(len(self.starts) - 1, dtype=np.uint32), np.diff(self.starts))[order]
        if len(texts):
            borders = [0, *(np.flatnonzero(texts[1:] != texts[:-1]) + 1).tolist(), len(texts)]
            for begin, end in pairwise(borders):
                yield int(texts[begin]), buckets[begin:end]


def buckets(bands: Iterator[np.ndarray], active: np.ndarray) -> Buckets:
    """The buckets of all bands, by sorting each.

    Args:
        bands: of each, [texts] uint64.
        active: [texts] bool, the texts that take part.
    """
    texts = np.flatnonzero(active)
    members, sizes = [np.zeros(0, dtype=np.uint32)], [np.zeros(0, dtype=np.int64)]
    for column in bands:
        hashes = column[texts]
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        first = np.ones(len(ordered), dtype=bool)
        first[1:] = ordered[1:] != ordered[:-1]
        begins = np.flatnonzero(first)
        num = np.diff(begins, append=len(ordered))
        shared = np.repeat(num > 1, num)
        members.append(texts[order[shared]].astype(np.uint32))
        sizes.append(num[num > 1])
    starts = np.concatenate(([0], np.cumsum(np.concatenate(sizes))))
    return Buckets(np.concatenate(members), starts)


@dataclass
class NearVerdicts:
    """Which texts are near-duplicates of which."""

    of: np.ndarray
    """[texts] int64: the earlier, kept text that it is nearly the same as; −1 where there is none."""
    similarity: np.ndarray
    """[texts] float32: their Jaccard similarity; 0 where there is none."""
    num_compared: int = 0
    """Pairs compared by their true similarity."""
    num_full_buckets: int = 0
    """Buckets of which some kept texts were not compared, for there were more than `max_bucket`."""

    num_cut: int = 0
    """Texts with more candidates than `max_compared`."""

    @classmethod
    def none(cls, num_texts: int) -> NearVerdicts:
        """No text is like another."""
        return cls(np.full(num_texts, -1, dtype=np.int64), np.zeros(num_texts, dtype=np.float32))


def find_near(files: BandFiles, active: np.ndarray, text_of: Callable[[int], str]) -> NearVerdicts:
    """Texts that are nearly the same as an earlier one that is kept.

    In the order of the texts: a text is kept unless an earlier kept one has a true Jaccard similarity of `threshold` or more
    to it. So each removed text has a kept one beside it, and no chain of small differences removes what is like nothing that
    stays.

    Args:
        files: signatures of all texts.
        active: [texts] bool, those that take part.
        text_of: a normalized text by its number.
    """
    settings = files.settings
    found = buckets(files.columns(), active)
    low_bytes = files.low_bytes()
    shingles_of = lru_cache(_SETS_IN_MEMORY)(lambda text: shingle_set(text_of(text), settings))
    least = _least_estimate(settings)
    verdicts = NearVerdicts.none(len(active))
    # The kept texts of a bucket take the places of its members, from the front: there are never more of them.
    kept, filled = found.members.copy(), np.zeros(len(found.starts), dtype=np.int64)
    full: set[int] = set()
    for text, its in found.of_texts():
        begins = found.starts[its]
        parts = [kept[begin : begin + num] for begin, num in zip(begins, filled[its], strict=True) if num]
        near = None
        if parts:
            likely, num_cut = _likely(low_bytes, text, np.unique(np.concatenate(parts)), least, settings.max_compared)
            verdicts.num_cut += num_cut > 0
            for other in likely.tolist():
                verdicts.num_compared += 1
                similarity = jaccard(shingles_of(text), shingles_of(other))
                if similarity >= settings.threshold:
                    near = (other, similarity)
                    break
        if near is not None:
            verdicts.of[text], verdicts.similarity[text] = near
            continue
        room = filled[its] < settings.max_bucket
        full.update(its[~room].tolist())
        kept[(begins + filled[its])[room]] = text
        filled[its[room]] += 1
    verdicts.num_full_buckets = len(full)
    return verdicts


def _least_estimate(settings: NearDuplicates) -> float:
    """Share of equal bytes below which a pair is not looked at: of unequal values one byte in 256 is equal all the same."""
    threshold = settings.threshold
    deviation = (threshold * (1 - threshold) / settings.num_permutations) ** 0.5
    lowest = max(threshold - _DEVIATIONS * deviation, 0)
    return lowest + (1 - lowest) / 256


def _likely(low_bytes: np.ndarray, text: int, others: np.ndarray, least: float, most: int) -> tuple[np.ndarray, int]:
    """Those of `others`, rising, whose signatures agree with that of `text` in a share of `least` or more; of more than `most`
    those that agree best. And how many that drops."""
    shares = (low_bytes[others] == low_bytes[text]).mean(axis=1)
    likely = np.flatnonzero(shares >= least)
    num_cut = max(len(likely) - most, 0)
    if num_cut:
        likely = np.sort(likely[np.argsort(-shares[likely], kind="stable")[:most]])
    return others[likely], num_cut
