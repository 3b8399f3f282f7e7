"""Records that evaluation sets contain: runs of words shared with one of their records.

As GPT-3 did it (Brown et al. 2020, appendix C: runs of 8 to 13 words, lower-cased and without punctuation), with whole records
removed rather than pieces. A run is found by a 64-bit hash and confirmed word for word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_dist.curation.config.dedup import Decontamination
from rlhf_dist.curation.fingerprints import encoded, windows, word_hashes, words
from rlhf_dist.data.spool import Spool

_MATCHES_PER_TEXT = 8
"""Different evaluation records that a text is confirmed against; one is enough to remove it."""


@dataclass(frozen=True)
class EvaluationRow:
    """A record of an evaluation set."""

    set: str
    location: str
    words: str
    """With single spaces between them."""


@dataclass(frozen=True)
class Match:
    """A run of words that a text and an evaluation record share, by its hash."""

    text: int
    """Number of the text within its chunk."""
    row: int
    """Number of the evaluation record."""
    run: str
    num_runs: int
    """Runs of the text that are in any evaluation record."""


class EvaluationIndex:
    """Hashes of the runs of words of evaluation sets, in a folder that other processes read as well."""

    def __init__(self, folder: Path, settings: Decontamination) -> None:
        """Start an index; the folder must be there, and empty."""
        self.folder = folder
        self.settings = settings
        self.num_rows: dict[str, int] = {}
        """Records of each set."""
        self.num_too_short: dict[str, int] = {}
        """Those of them that are not looked for: fewer than `min_words` words."""
        self.num_common = 0
        """Different runs that are not looked for, since too many records of a set have them."""
        self._rows = Spool(folder / "rows.jsonl")
        self._found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def add(self, name: str, rows: Iterable[tuple[str, str]]) -> None:
        """Take in a set: place and text of each of its records."""
        short = self.num_too_short.get(name, 0)
        hashes: dict[int, list[np.ndarray]] = {}
        owners: dict[int, list[np.ndarray]] = {}
        first = len(self._rows)
        for location, text in rows:
            found = words(text)
            size = min(self.settings.num_words, len(found))
            if size < self.settings.min_words:
                short += 1
            else:
                runs = np.unique(windows(word_hashes(found), np.array([len(found)]), size)[0])
                hashes.setdefault(size, []).append(runs)
                owners.setdefault(size, []).append(np.full(len(runs), len(self._rows), dtype=np.uint32))
            row = EvaluationRow(name, location, " ".join(found))
            self._rows.append(encoded(json.dumps(asdict(row))))
        self.num_rows[name] = self.num_rows.get(name, 0) + len(self._rows) - first
        self.num_too_short[name] = short
        for size, parts in hashes.items():
            self._found.setdefault(size, []).append(self._without_common(parts, owners[size]))

    def _without_common(self, hashes: list[np.ndarray], owners: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The different runs of a set, sorted, each with the first record that has it."""
        runs, first, count = np.unique(np.concatenate(hashes), return_index=True, return_counts=True)
        rare = count <= self.settings.max_common
        self.num_common += int((~rare).sum())
        return runs[rare], np.concatenate(owners)[first[rare]]

    def finish(self) -> None:
        """Write the hashes down; nothing can be added after that."""
        for size, parts in self._found.items():
            runs, first = np.unique(np.concatenate([runs for runs, _ in parts]), return_index=True)
            np.save(self.folder / f"runs_{size}.npy", runs)
            np.save(self.folder / f"owners_{size}.npy", np.concatenate([owners for _, owners in parts])[first])
        self._found.clear()

    def row(self, number: int) -> EvaluationRow:
        """An evaluation record by its number."""
        return EvaluationRow(**json.loads(self._rows[number]))

    def confirmed(self, matches: Sequence[Match]) -> Match | None:
        """The first match whose run is in the record word for word: hashes may agree by chance."""
        return next((match for match in matches if f" {match.run} " in f" {self.row(match.row).words} "), None)

    def report(self) -> dict[str, Any]:
        """What was looked for."""
        return {
            "sets": {
                name: {"records": num, "too short to be looked for": self.num_too_short[name]}
                for name, num in self.num_rows.items()
            },
            "runs in too many records of a set to be looked for": self.num_common,
        }

    def close(self) -> None:
        """Let go of the rows."""
        self._rows.close()


def matches(texts: Sequence[str], index: Path) -> dict[int, list[Match]]:
    """The texts of a chunk that share a run with an evaluation record, by their hashes.

    Args:
        texts: as they are, not normalized.
        index: folder of a finished `EvaluationIndex`.
    """
    rows = [words(text) for text in texts]
    hashes = [word_hashes(row) for row in rows]
    hits: dict[int, list[tuple[int, int, int]]] = {}
    """Text → place, length and evaluation record of each run."""
    for size, (runs, owners) in _loaded(index).items():
        chosen = [i for i, row in enumerate(rows) if len(row) >= size]
        if not chosen or not len(runs):
            continue
        lengths = np.array([len(rows[i]) for i in chosen], dtype=np.int64)
        found, counts = windows(np.concatenate([hashes[i] for i in chosen]), lengths, size)
        places = np.minimum(np.searchsorted(runs, found), len(runs) - 1)
        starts = np.concatenate(([0], np.cumsum(counts)))
        for hit in np.flatnonzero(runs[places] == found).tolist():
            k = int(np.searchsorted(starts, hit, side="right")) - 1
            hits.setdefault(chosen[k], []).append((hit - int(starts[k]), size, int(owners[places[hit]])))
    return {text: _matches_of(text, rows[text], found) for text, found in sorted(hits.items())}


def _matches_of(text: int, row: Sequence[str], hits: Sequence[tuple[int, int, int]]) -> list[Match]:
    """One match for each of the first evaluation records, the first in the text first."""
    by_owner: Mapping[int, tuple[int, int]] = {owner: (at, size) for at, size, owner in sorted(hits, reverse=True)}
    first = sorted(by_owner.items(), key=lambda item: item[1])[:_MATCHES_PER_TEXT]
    return [Match(text, owner, " ".join(row[at : at + size]), len(hits)) for owner, (at, size) in first]


@lru_cache(maxsize=1)
def _loaded(index: Path) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Length of a run → sorted hashes, and the record of each; mapped, so that processes share them."""
    sizes = sorted((int(path.stem.removeprefix("runs_")) for path in index.glob("runs_*.npy")), reverse=True)
    return {
        size: (
            np.load(index / f"runs_{size}.npy", mmap_mode="r"),
            np.load(index / f"owners_{size}.npy", mmap_mode="r"),
        )
        for size in sizes
    }
