"""Sets of records under a name: checked, divided into parts, and written as JSONL with all their columns.

    FOLDER/reviews.train/0.jsonl     set `reviews`, part `train`, its first source
    FOLDER/prompts/0.jsonl           set `prompts`, not divided

A source has a file of its own, so that what it says of its fields stays true of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_dist.config.data import DataSource
from rlhf_dist.config.data_set import DataSet
from rlhf_dist.core.errors import DataError
from rlhf_dist.data.dialogues import chat_messages, preference_messages
from rlhf_dist.data.fields import Fields
from rlhf_dist.data.quarantine import Quarantine
from rlhf_dist.data.records import read_fields, turns_of


@dataclass(frozen=True)
class WrittenSet:
    """What became of a set."""

    num_records: int
    """Records read that can be used."""
    num_left_out: int
    """Records that the shares of the parts leave."""
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    """Part ("" where the set is not divided) → file, relative to the stage's folder → its number of records."""
    bad: Quarantine = field(default_factory=Quarantine)
    """Rows left out under `on_bad_row: skip`."""


def set_path(name: str, part: str, source: int) -> str:
    """Where the records of a set's source are, relative to the folder of all sets."""
    return f"{name}.{part}/{source}.jsonl" if part else f"{name}/{source}.jsonl"


def write_set(wanted: DataSet, seed: int, folder: Path) -> WrittenSet:
    """Read, check and write a set.

    Args:
        wanted: the set.
        seed: draws which records come into which part.
        folder: of all sets; the set's own folders are made in it.

    Raises:
        DataError: a source or record that cannot be used (with its place), or a part that would be empty.
    """
    rows: list[tuple[int, str]] = []
    """Source and line of each record."""
    about: list[Hashable] = []
    bad = Quarantine()
    for number, source in enumerate(wanted.sources):
        for row in read_fields(source, bad):
            with bad.guard(source.on_bad_row, row.values):
                key, line = subject(source, row), _line(row)
                about.append(key)
                rows.append((number, line))
    if not rows:
        raise DataError(
            f"set {wanted.name!r}: none of its {len(bad)} rows can be used, the first since {bad.rows[0].reason}"
        )
    if not wanted.parts:
        return WrittenSet(len(rows), 0, {"": _write(wanted, "", rows, folder)}, bad)
    parts = divide(about, wanted.parts, f"{seed}/{wanted.name}")
    files = {}
    for part, chosen in parts.items():
        if not chosen:
            raise DataError(
                f"part {part!r} of set {wanted.name!r} would be empty: its share {wanted.parts[part]:g} of {len(rows)} "
                f"records, which are of {len(set(about))} prompts or texts that stay together, rounds to none; raise the "
                "share, or give more records"
            )
        files[part] = _write(wanted, part, [rows[i] for i in chosen], folder)
    return WrittenSet(len(rows), len(rows) - sum(map(len, parts.values())), files, bad)


def divide(about: Sequence[Hashable], shares: Mapping[str, float], stream: str) -> dict[str, list[int]]:
    """Positions of the records of each part, rising; those of one subject are in one part.

    Subjects are put in an order that depends on themselves and on `stream` only, and the parts are cut from it one after
    the other. So when records are added, the others stay where they are but for those at the borders; what was held out
    stays held out.

    Args:
        about: subject of each record.
        shares: part → its share of the records; they add up to 1 at most.
        stream: names the draw.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(about):
        groups.setdefault(key, []).append(i)
    drawn = sorted(groups, key=lambda key: hashlib.sha256(f"{stream}/{key!r}".encode()).digest())
    borders: list[tuple[str, float]] = []
    for part, share in shares.items():
        borders.append((part, (borders[-1][1] if borders else 0.0) + share))
    parts: dict[str, list[int]] = {part: [] for part in shares}
    before = 0
    for key in drawn:
        middle = (before + len(groups[key]) / 2) / len(about)
        before += len(groups[key])
        # A last share that rounding leaves a hair below 1 would lose no record: a middle is never that near to 1.
        part = next((part for part, border in borders if middle < border), None)
        if part is not None:
            parts[part] += groups[key]
    return {part: sorted(chosen) for part, chosen in parts.items()}


def subject(source: DataSource, row: Fields) -> Hashable:
    """What keeps records together in one part: the prompt, or the text where there is none. Checks the fields it reads.

    Raises:
        DataError: a field that every use of the kind needs is missing or not what it must be.
    """
    if source.kind == "instruction":
        if row.get("output") is not None:  # as prompts, instructions need none
            row.text("output")
        return row.optional_text("demonstration"), row.text("instruction").strip(), row.optional_text("input").strip()
    if source.kind == "messages":
        messages = chat_messages(row, "messages")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return turns_of(messages[: turns[-1]] if turns else messages)
    if source.kind == "preference":
        return turns_of(preference_messages(row)[0])
    if source.kind == "ratings":
        row.number("rating")
        return row.optional_text("prompt").strip() or row.text("response").strip()
    if source.kind == "candidates":
        row.items("candidates")
    field = "prompt" if source.kind == "candidates" else source.kind
    if field == "prompt" and not isinstance(row.required("prompt"), str):
        return turns_of(row.messages("prompt"))
    return row.text(field).strip()


def _write(wanted: DataSet, part: str, rows: Sequence[tuple[int, str]], folder: Path) -> dict[str, int]:
    """One file for each source, also where none of its records is in the part: file → number of records."""
    files = {}
    for number in range(len(wanted.sources)):
        lines = [line for source, line in rows if source == number]
        name = set_path(wanted.name, part, number)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
        files[name] = len(lines)
    return files


def _line(row: Fields) -> str:
    try:
        return json.dumps(dict(row.values), ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{row.location}: a column cannot be written as JSON ({error}); leave it out of the data"
        ) from error


def _plain(value: Any) -> Any:
    """Arrow's dates and decimals, as text."""
    if isinstance(value, bytes):
        raise TypeError("it holds bytes")
    return str(value)
