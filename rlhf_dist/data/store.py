"""Rows of token ids kept compactly, and the account of what was kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.data.quarantine import BadRow, Quarantine

MAX_LISTED = 20
"""Left-out records that a report names; the rest is only counted."""


@dataclass(frozen=True)
class DataReport:
    """What became of the records of a data set."""

    num_records: int = 0
    """Records (pairs or rankings, for preferences) read."""
    num_used: int = 0
    """Records that are trained on."""
    num_skipped: int = 0
    """Records left out: too long under on_too_long=skip, or fewer than two responses of different rank are left."""
    num_truncated: int = 0
    """Records whose response was cut at max_length_tokens."""
    num_tokens: int = 0
    """Tokens kept, prompts included."""
    skipped: tuple[str, ...] = ()
    """Places of the records left out, the first `MAX_LISTED`."""
    num_dropped: int = 0
    """Responses left out of rankings that are used: too long under on_too_long=skip, or the same as a better one."""
    dropped: tuple[str, ...] = ()
    """Places of those rankings, the first `MAX_LISTED`."""
    bad: tuple[BadRow, ...] = ()
    """Rows that cannot be used and were left out under `on_bad_row: skip`; not counted as records."""
    passed_over: tuple[str, ...] = ()
    """Places of rows that no template wanted; not counted as records."""

    num_duplicates: int = 0
    """Records used that an earlier one equals."""
    duplicates: tuple[str, ...] = ()
    """Places of those records and of the earlier ones, the first `MAX_LISTED`."""
    num_contradictions: int = 0
    """Pairs and rankings used of which two responses stand in the opposite order in an earlier one, of the same prompt."""
    contradictions: tuple[str, ...] = ()
    """Places of those records and of the earlier ones, the first `MAX_LISTED`."""

    def losses(self) -> dict[str, str]:
        """What was left out or cut, or stands twice, each with its number and the first places; empty where nothing was."""
        found = {}
        if self.bad:
            found["bad rows left out"] = f"{len(self.bad)} ({self.bad[0].reason}; ...)"
        if self.passed_over:
            found["passed over by templates"] = f"{len(self.passed_over)} ({', '.join(self.passed_over[:3])}, ...)"
        if self.num_skipped:
            found["left out"] = f"{self.num_skipped} of {self.num_records} ({', '.join(self.skipped[:3])}, ...)"
        if self.num_dropped:
            found["responses left out of rankings"] = f"{self.num_dropped} ({', '.join(self.dropped[:3])}, ...)"
        if self.num_truncated:
            found["response cut"] = f"{self.num_truncated} of {self.num_records}"
        if self.num_duplicates:
            found["duplicates"] = f"{self.num_duplicates} ({', '.join(self.duplicates[:3])}, ...)"
        if self.num_contradictions:
            found["pairs in opposite orders"] = f"{self.num_contradictions} ({', '.join(self.contradictions[:3])}, ...)"
        return found


class Tally:
    """Counts towards a `DataReport`."""

    def __init__(self, quarantine: Quarantine | None = None) -> None:
        """`quarantine`: the bad rows that were left out of the records."""
        self._quarantine = quarantine
        self.num_records = self.num_truncated = self.num_tokens = 0
        self._num_skipped = 0
        self._skipped: list[str] = []
        self._num_dropped = 0
        self._dropped: list[str] = []

    def skip(self, location: str) -> None:
        """Count a record as left out."""
        self._num_skipped += 1
        if len(self._skipped) < MAX_LISTED:
            self._skipped.append(location)

    def drop(self, num_responses: int, location: str) -> None:
        """Count responses as left out of a ranking that is used."""
        self._num_dropped += num_responses
        if num_responses and len(self._dropped) < MAX_LISTED:
            self._dropped.append(location)

    def report(self, duplicates: Sequence[str] = (), contradictions: Sequence[str] = ()) -> DataReport:
        """The counts so far, and places of what stands twice or contradicts."""
        return DataReport(
            num_records=self.num_records,
            num_used=self.num_records - self._num_skipped,
            num_skipped=self._num_skipped,
            num_truncated=self.num_truncated,
            num_tokens=self.num_tokens,
            skipped=tuple(self._skipped),
            num_dropped=self._num_dropped,
            dropped=tuple(self._dropped),
            bad=() if self._quarantine is None else tuple(self._quarantine.rows),
            passed_over=() if self._quarantine is None else tuple(self._quarantine.passed_over),
            num_duplicates=len(duplicates),
            duplicates=tuple(duplicates[:MAX_LISTED]),
            num_contradictions=len(contradictions),
            contradictions=tuple(contradictions[:MAX_LISTED]),
        )


class Ragged:
    """Rows of different lengths in one array: a Python int takes 9 times the memory of an int32."""

    def __init__(self, rows: Sequence[Sequence[float]] | Sequence[np.ndarray], dtype: type = np.int32) -> None:
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        """[len] int64."""
        self._starts = np.concatenate(([0], np.cumsum(self.lengths)))
        self._flat = np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if rows else np.zeros(0, dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        """[length] tensor of row `index` (a view: not to be written to)."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return torch.from_numpy(self._flat[self._starts[index] : self._starts[index + 1]])

    def pick(self, indices: Sequence[int] | Tensor) -> list[Tensor]:
        """The rows `indices`."""
        return [self[int(index)] for index in indices]
