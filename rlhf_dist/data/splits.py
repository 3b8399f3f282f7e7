"""Splits: which records are held out, and which part of a divided set a record is in.

Both keep the records of one subject (`Record.subject`, `Kind.subject`: a prompt, a text, or a labeled row) together, and
depend on their arguments only:

- `hold_out` draws `eval_fraction` of a run's training records by the seed: exactly the nearest number that whole subjects
  add up to.
- `divide` cuts the parts of a pipeline's set from an order that depends on each subject alone, so that records which are
  added later do not move the others. `write_set` writes the parts as JSONL with all their columns:

    FOLDER/reviews.train/0.jsonl     set `reviews`, part `train`, its first source
    FOLDER/prompts/0.jsonl           set `prompts`, not divided

A source has a file of its own, so that its mapping of fields is true of the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rlhf_dist.config.data_set import DataSet
from rlhf_dist.core.errors import DataError
from rlhf_dist.core.json_lines import json_line
from rlhf_dist.core.random import permutation
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.fields import Fields
from rlhf_dist.data.kinds import KINDS
from rlhf_dist.data.reader import read_fields
from rlhf_dist.data.spool import RecordStore

H = TypeVar("H", bound=Hashable)


def hold_out(subjects: Sequence[Hashable], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions of the records to train on and of the held-out records, both increasing.

    Args:
        subjects: of each record. A subject is never divided; the number of records held out is the nearest to `fraction` that
            whole subjects add up to, the lower of two.
        fraction: share to hold out.
        seed: draws which.

    Raises:
        DataError: a side would be empty.
    """
    num_records = len(subjects)
    num_eval = round(num_records * fraction)
    if not 0 < num_eval < num_records:
        raise DataError(
            f"data.eval_fraction {fraction} of {num_records} records holds out {num_eval} and leaves "
            f"{num_records - num_eval} to train on; both must be at least 1: change eval_fraction or give more records"
        )
    groups = _grouped(subjects)
    if len(groups) == 1:
        raise DataError(
            f"data.eval_fraction {fraction} cannot split {num_records} records of one prompt, text or labeled row, "
            "which would be on both sides; give records of others, name held-out sets in data.eval, or set eval_fraction to 0"
        )
    members = list(groups.values())
    drawn = [members[i] for i in permutation(seed, "data/eval_split", 0, len(members)).tolist()]
    held = {i for number in _nearest_sum([len(group) for group in drawn], num_eval) for i in drawn[number]}
    # In file order on both sides, so that neither depends on how the other was drawn.
    return [i for i in range(num_records) if i not in held], sorted(held)


def divide(subjects: Iterable[Hashable], shares: Mapping[str, float], stream: str) -> dict[str, list[int]]:
    """Positions of the records of each part, increasing; those of one subject are in one part.

    Subjects are put in an order that depends on themselves and on `stream` only, and the parts are cut from it one after
    the other. When records are added, the others stay in their parts, but for those at the boundaries; what was held out
    stays held out.

    Args:
        subjects: of each record.
        shares: part → its share of the records; they add up to 1 at most.
        stream: names the draw.
    """
    # By their digests, which are in the order of the draw and do not fill the memory as the subjects would.
    digests = [hashlib.sha256(f"{stream}/{subject!r}".encode()).digest() for subject in subjects]
    groups = _grouped(digests)
    drawn = sorted(groups)
    borders: list[tuple[str, float]] = []
    for part, share in shares.items():
        borders.append((part, (borders[-1][1] if borders else 0.0) + share))
    parts: dict[str, list[int]] = {part: [] for part in shares}
    before = 0
    for subject in drawn:
        middle = (before + len(groups[subject]) / 2) / len(digests)
        before += len(groups[subject])
        # A last share that rounding leaves a hair below 1 loses no record: a middle is never that near to 1.
        part = next((part for part, border in borders if middle < border), None)
        if part is not None:
            parts[part] += groups[subject]
    return {part: sorted(chosen) for part, chosen in parts.items()}


def _grouped(subjects: Sequence[H]) -> dict[H, list[int]]:
    """Positions of the records of each subject; subjects in the order of their first records."""
    groups: dict[H, list[int]] = {}
    for i, subject in enumerate(subjects):
        groups.setdefault(subject, []).append(i)
    return groups


def _nearest_sum(sizes: Sequence[int], wanted: int) -> list[int]:
    """Positions of two or more sizes, but not of all, whose sum is the nearest to `wanted`."""
    totals = np.cumsum(sizes)
    if (first := int(np.searchsorted(totals, wanted))) < len(totals) and totals[first] == wanted:
        return list(range(first + 1))  # always so where each size is 1
    # Where a sum up to `wanted` exists, one above twice `wanted` is farther off; else the smallest size is the nearest.
    most = min(max(2 * wanted, min(sizes)), sum(sizes) - 1)
    last = np.full(most + 1, -1)
    """Of each sum that some of the sizes so far add up to, the last of them; -1: none do."""
    reached = np.zeros(most + 1, dtype=bool)
    reached[0] = True
    for number, size in enumerate(sizes):
        sums = np.flatnonzero(reached[: max(most + 1 - size, 0)] & ~reached[size:]) + size
        last[sums] = number
        reached[sums] = True
        if reached[wanted]:
            break
    sums = np.flatnonzero(reached)[1:]
    left = int(sums[np.abs(sums - wanted).argmin()])
    chosen = []
    while left:
        chosen.append(int(last[left]))
        left -= sizes[chosen[-1]]
    return chosen


@dataclass(frozen=True)
class WrittenSet:
    """What became of a set."""

    num_records: int
    """Valid records."""
    num_unassigned: int
    """Records in no part: the shares add up to less than 1."""
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    """Part ("" where the set is not divided) → file, relative to the stage's folder → its number of records."""
    bad: BadRows = field(default_factory=BadRows)
    """Rows skipped under `on_bad_row: skip`."""


def set_path(name: str, part: str, source: int) -> str:
    """Where the records of a set's source are, relative to the folder of all sets."""
    return f"{name}.{part}/{source}.jsonl" if part else f"{name}/{source}.jsonl"


def write_set(wanted: DataSet, seed: int, folder: Path) -> WrittenSet:
    """Read, validate, divide and write a set.

    Args:
        wanted: the set.
        seed: draws which records are in which part.
        folder: of all sets; the set's own folders are made in it.

    Raises:
        DataError: an invalid source or record (with its place), or a part that would be empty.
    """
    bad = BadRows()

    def valid() -> Iterator[tuple[int, str, Hashable]]:
        for number, source in enumerate(wanted.sources):
            for row in read_fields(source, bad):
                found = None
                with bad.guard(source.on_bad_row, row.values):
                    found = number, _line(row), KINDS[source.kind].subject(row)
                if found is not None:
                    yield found

    rows = RecordStore(valid())
    """Source, line and subject of each record."""
    if not rows:
        raise DataError(f"set {wanted.name!r}: none of its {len(bad)} rows is valid, the first: {bad.rows[0].reason}")
    if not wanted.parts:
        return WrittenSet(len(rows), 0, {"": _write(wanted, "", rows, folder)}, bad)
    parts = divide((subject for *_, subject in rows), wanted.parts, f"{seed}/{wanted.name}")
    files = {}
    for part, chosen in parts.items():
        if not chosen:
            num_subjects = len({hash(subject) for *_, subject in rows})
            raise DataError(
                f"part {part!r} of set {wanted.name!r} would be empty: its share {wanted.parts[part]:g} of {len(rows)} "
                f"records, which are of {num_subjects} prompts or texts that stay together, rounds to none; raise the "
                "share, or give more records"
            )
        files[part] = _write(wanted, part, rows.select(chosen), folder)
    return WrittenSet(len(rows), len(rows) - sum(map(len, parts.values())), files, bad)


def _write(wanted: DataSet, part: str, rows: RecordStore[tuple[int, str, Hashable]], folder: Path) -> dict[str, int]:
    """A file for each source, also where none of its records is in the part: file → number of records."""
    names = [set_path(wanted.name, part, number) for number in range(len(wanted.sources))]
    files = dict.fromkeys(names, 0)
    with ExitStack() as opened:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        written = [opened.enter_context((folder / name).open("w", encoding="utf-8")) for name in names]
        for number, line, _ in rows:
            written[number].write(line)
            files[names[number]] += 1
    return files


def _line(row: Fields) -> str:
    try:
        return json_line(dict(row.values), default=_plain)
    except (TypeError, RecursionError) as error:
        raise DataError(
            f"{row.location}: a column cannot be written as JSON ({error}); remove it from the data"
        ) from error


def _plain(value: Any) -> Any:
    """Arrow's dates and decimals, as text."""
    if isinstance(value, bytes):
        raise TypeError("it contains bytes")
    return str(value)
