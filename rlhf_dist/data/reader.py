"""Sources → typed records: the one reader. File formats are in `files.py`, kinds in `kinds.py`."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from rlhf_dist.config.data import DataSource
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.fields import Fields, unused_note
from rlhf_dist.data.files import read_rows
from rlhf_dist.data.kinds import KINDS, kind_of
from rlhf_dist.data.records import Conversation, Preference, Prompt, Text
from rlhf_dist.data.templates.render import templated_rows

R = TypeVar("R")

MAX_NOTED = 10
"""Unused columns of a source that are noted by name."""
MAX_COUNTED = 1000
"""Unused columns of a source that are counted: some rows have keys of their own."""


def read_fields(source: DataSource, bad_rows: BadRows | None = None) -> Iterator[Fields]:
    """The rows of a source, by field.

    Args:
        source: path, kind and mapping of fields to columns.
        bad_rows: takes the rows that cannot be parsed, under `source.on_bad_row: skip`.

    Raises:
        ConfigError: `source.fields` maps a field that the kind does not have.
        DataError: as `read_rows`; a mapped column that no row has, since an optional field would hide the misspelling.
    """
    known = KINDS[source.kind].fields
    for field in source.fields if source.templates is None else ():
        if field not in known:
            near = difflib.get_close_matches(field, known, 1)
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise ConfigError(
                f"{source.path}: fields maps {field!r}, which kind {source.kind!r} does not have{hint}; map one of "
                f"{', '.join(known)} to a column"
            )
    unseen = set(source.fields.values())
    bad_rows = BadRows() if bad_rows is None else bad_rows
    for location, values in read_rows(source, bad_rows):
        row = Fields(location, values, source.fields, bad_rows.notes)
        unseen = {column for column in unseen if not row.has_column(column)}
        valid = False
        with bad_rows.guard(source.on_bad_row, values):
            if source.templates is None and source.kind != "text":
                row.check_is_text()
            valid = True
        if valid:
            yield row
    if unseen:
        raise DataError(
            f"{source.path}: no row has the column {', '.join(map(repr, sorted(unseen)))} that fields names; give the "
            "name of a column, or remove the mapping"
        )


def read_sequences(
    source: DataSource, bad_rows: BadRows | None = None, with_tasks: bool | None = False
) -> Iterator[Conversation | Text]:
    """Records to train a language model on, one by one as they are read.

    Args:
        source: of a kind for supervised training.
        bad_rows: takes the invalid rows, under `source.on_bad_row: skip`.
        with_tasks: whether to read the field `task`. False: an unrelated column of that name is ignored. None: it is read
            where it is text, and ignored otherwise.

    Raises:
        DataError: an invalid source or row, with its place.
        ConfigError: a kind or field name that is not supported.
    """
    kind = kind_of(source, "supervised training")

    def record(row: Fields) -> Conversation | Text:
        task = row.optional_text("task").strip() if with_tasks else ""
        if with_tasks is None and isinstance(found := row.get("task"), str):
            task = found.strip()
        return replace(kind.sequence(row, task), on_bad_row=source.on_bad_row)

    return _read(source, bad_rows, record)


def read_preferences(
    source: DataSource, seed: int, use_margins: bool = True, bad_rows: BadRows | None = None
) -> Iterator[Preference]:
    """Pairs and rankings, one by one as they are read; `seed` draws the pairs of kind `ratings`, whose rows are read first.

    `use_margins` False: the field `margin` of pairs is not read, so that an unrelated column of that name is ignored.
    `bad_rows` and errors as in `read_sequences`.
    """
    kind = kind_of(source, "reward modeling")
    found = _read(source, bad_rows, lambda row: kind.preference(row, use_margins))
    return (replace(pair, on_bad_row=source.on_bad_row) for pair in kind.paired(found, source, seed))


def read_prompts(source: DataSource, bad_rows: BadRows | None = None) -> Iterator[Prompt]:
    """Prompts, or the prompts of records of other kinds. `bad_rows` and errors as in `read_sequences`."""
    kind = kind_of(source, "prompts")
    return _read(source, bad_rows, lambda row: Prompt(kind.prompt(row), row.location, source.on_bad_row, row.tools()))


def _read(source: DataSource, bad_rows: BadRows | None, record: Callable[[Fields], R]) -> Iterator[R]:
    """What `record` makes of the valid rows.

    Raises:
        DataError: an invalid row under `error`; under `skip`, that no valid row is left.
    """
    bad_rows = BadRows() if bad_rows is None else bad_rows
    empty = True
    known = len(bad_rows)
    unused: Counter[str] = Counter()
    rows = read_fields(source, bad_rows)
    for row in rows if source.templates is None else templated_rows(source, rows, bad_rows):
        found = None
        with bad_rows.guard(source.on_bad_row, row.values):
            found = record(row)
        if found is not None:
            empty = False
            for column in row.unused(KINDS[source.kind].fields):
                if column in unused or len(unused) < MAX_COUNTED:
                    unused[column] += 1
            yield found
    _note_unused(bad_rows, unused)
    if empty:
        bad = bad_rows.rows[known:]
        if not bad:
            raise DataError(f"{source.path}: all templates filter out every row; give others, or fix their `when`")
        raise DataError(f"{source.path}: no row is valid ({len(bad)} are bad, the first: {bad[0].reason})")


def _note_unused(bad_rows: BadRows, unused: Counter[str]) -> None:
    """Note the columns that most rows have, and how many more there are."""
    columns = sorted(unused, key=lambda column: (-unused[column], column))
    for column in columns[:MAX_NOTED]:
        bad_rows.notes[unused_note(column)] += unused[column]
    if more := columns[MAX_NOTED:]:
        bad_rows.notes[f"{len(more)} more columns, which are not used"] += unused[more[0]]
