"""Bad rows and the report of a data set: what was skipped, dropped, truncated or duplicated, with the places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rlhf_dist.config.data import BadRowPolicy
from rlhf_dist.core.errors import DataError
from rlhf_dist.core.json_lines import json_line

MAX_LISTED = 20
"""Places that a report lists of each class; the rest is only counted."""


@dataclass(frozen=True)
class BadRow:
    """An invalid row."""

    reason: str
    """Place, value, constraint and remedy: the message of the error that `on_bad_row: error` would have raised."""
    row: Any = None
    """What was read: the columns, the raw line where it could not be parsed, or the record where it could not be tokenized."""


@dataclass
class BadRows:
    """The invalid rows of one or more sources, in reading order, and what `bad_rows.jsonl` says of them."""

    rows: list[BadRow] = field(default_factory=list)
    filtered: list[str] = field(default_factory=list)
    """Places of valid rows that every template of their source filtered out (`when`)."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was recognized in rows, or is not used of them → number of rows."""

    def __len__(self) -> int:
        return len(self.rows)

    def lines(self) -> Iterator[str]:
        """One JSON line a row: `reason` and `row` (as text where it is not JSON)."""
        for bad in self.rows:
            try:
                yield json_line({"reason": bad.reason, "row": bad.row})
            except RecursionError:
                yield json_line({"reason": bad.reason, "row": "nested too deeply to be written"})

    def add(self, policy: BadRowPolicy, error: DataError, row: Any = None) -> None:
        """Record an invalid row under `skip`.

        Raises:
            DataError: `error` itself under `error`.
        """
        if policy == "error":
            raise error
        self.rows.append(BadRow(str(error), row))

    @contextmanager
    def guard(self, policy: BadRowPolicy, row: Any = None) -> Iterator[None]:
        """The block validates a row; a `DataError` in it ends the block and is handled by `add`."""
        try:
            yield
        except DataError as error:
            self.add(policy, error, row)


@dataclass(frozen=True)
class DataReport:
    """What became of the records of a data set."""

    num_records: int = 0
    """Valid records (pairs or rankings, for preferences)."""
    num_used: int = 0
    """Records in the data set."""
    num_skipped: int = 0
    """Records skipped: too long under `on_too_long: skip`, or with fewer than two distinct ranks after dropping responses."""
    num_truncated: int = 0
    """Records whose response was truncated at `max_length_tokens`."""
    num_tokens: int = 0
    """Tokens in the data set, prompts included."""
    skipped: tuple[str, ...] = ()
    """Places of the skipped records, the first `MAX_LISTED`."""
    num_dropped: int = 0
    """Responses dropped from rankings that are used: too long under `on_too_long: skip`, or equal to a better one."""
    dropped: tuple[str, ...] = ()
    """Places of those rankings, the first `MAX_LISTED`."""
    bad: tuple[BadRow, ...] = ()
    """Invalid rows skipped under `on_bad_row: skip`; not counted as records."""
    filtered: tuple[str, ...] = ()
    """Places of rows that every template filtered out; not counted as records."""
    notes: tuple[tuple[str, int], ...] = ()
    """What was recognized in rows, or is not used of them, and in how many."""
    num_duplicates: int = 0
    """Used records that equal an earlier one."""
    duplicates: tuple[str, ...] = ()
    """Places of those records and of the earlier ones, the first `MAX_LISTED`."""
    num_contradictions: int = 0
    """Used pairs and rankings that order two responses opposite to an earlier record of the same prompt."""
    contradictions: tuple[str, ...] = ()
    """Places of those records and of the earlier ones, the first `MAX_LISTED`."""

    def losses(self) -> dict[str, str]:
        """Each class of skipped, dropped, truncated and repeated data with its count and first places; empty where none."""
        found = {what: f"{number} rows" for what, number in self.notes}
        if self.bad:
            found["bad rows skipped"] = f"{len(self.bad)} ({self.bad[0].reason}; ...)"
        if self.filtered:
            found["filtered by templates"] = f"{len(self.filtered)} ({', '.join(self.filtered[:3])}, ...)"
        if self.num_skipped:
            found["skipped"] = f"{self.num_skipped} of {self.num_records} ({', '.join(self.skipped[:3])}, ...)"
        if self.num_dropped:
            found["responses dropped from rankings"] = f"{self.num_dropped} ({', '.join(self.dropped[:3])}, ...)"
        if self.num_truncated:
            found["truncated"] = f"{self.num_truncated} of {self.num_records}"
        if self.num_duplicates:
            found["duplicates"] = f"{self.num_duplicates} ({', '.join(self.duplicates[:3])}, ...)"
        if self.num_contradictions:
            found["contradicting pairs"] = f"{self.num_contradictions} ({', '.join(self.contradictions[:3])}, ...)"
        return found


class Tally:
    """Counts towards a `DataReport`."""

    def __init__(self, bad_rows: BadRows) -> None:
        self.bad_rows = bad_rows
        self.num_records = self.num_truncated = self.num_tokens = 0
        self._num_skipped = self._num_dropped = 0
        self._skipped: list[str] = []
        self._dropped: list[str] = []

    def skip(self, location: str) -> None:
        """Count a skipped record."""
        self._num_skipped += 1
        if len(self._skipped) < MAX_LISTED:
            self._skipped.append(location)

    def drop(self, num_responses: int, location: str) -> None:
        """Count responses dropped from a ranking that is used."""
        self._num_dropped += num_responses
        if num_responses and len(self._dropped) < MAX_LISTED:
            self._dropped.append(location)

    def report(self, duplicates: Sequence[str] = (), contradictions: Sequence[str] = ()) -> DataReport:
        """The counts so far, with the places of duplicates and contradictions."""
        return DataReport(
            num_records=self.num_records,
            num_used=self.num_records - self._num_skipped,
            num_skipped=self._num_skipped,
            num_truncated=self.num_truncated,
            num_tokens=self.num_tokens,
            skipped=tuple(self._skipped),
            num_dropped=self._num_dropped,
            dropped=tuple(self._dropped),
            bad=tuple(self.bad_rows.rows),
            filtered=tuple(self.bad_rows.filtered),
            notes=tuple(sorted(self.bad_rows.notes.items())),
            num_duplicates=len(duplicates),
            duplicates=tuple(duplicates[:MAX_LISTED]),
            num_contradictions=len(contradictions),
            contradictions=tuple(contradictions[:MAX_LISTED]),
        )

    def check_not_empty(self, num_rows: int, limit: str) -> None:
        """`limit`: name and value of the length limit, for the message.

        Raises:
            DataError: `num_rows` of the data set is 0; with the counts that explain it.
        """
        if num_rows:
            return
        report = self.report()
        bad = f", {len(report.bad)} bad, the first: {report.bad[0].reason}" if report.bad else ""
        raise DataError(
            f"none of {report.num_records + len(report.bad)} records can be used ({report.num_skipped} skipped under "
            f"{limit}, first {', '.join(report.skipped[:3]) or 'none'}{bad}); a data set needs at least one: raise the limit, "
            "or give other data"
        )
