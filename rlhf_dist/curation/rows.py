"""Rows of sources as records under the field names of their kind, and with the columns that are no fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_dist.config.data import DataSource
from rlhf_dist.core.errors import DataError
from rlhf_dist.core.json_lines import json_line
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.fields import Fields
from rlhf_dist.data.kinds import KINDS
from rlhf_dist.data.reader import read_fields

Record = dict[str, Any]


@dataclass(frozen=True)
class SourceRow:
    """A usable record of one of several sources."""

    source: int
    location: str
    record: Record
    """Its fields under the names of its kind, then its other columns; all of it can be written as JSON."""
    line: str
    """`record` as a JSON line, with its line end."""
    texts: tuple[str, str] = ("", "")
    """What `texts` made of it."""


def read_records(
    sources: Sequence[DataSource],
    bad_rows: BadRows,
    change: Callable[[int, Fields, Record], Record] | None = None,
    texts: Callable[[DataSource, Fields, Record], tuple[str, str]] | None = None,
) -> Iterator[SourceRow]:
    """The records of sources, one after the other, checked as far as every use of their kind needs.

    Args:
        sources: where they are.
        bad_rows: takes the rows that cannot be used, under `on_bad_row: skip`.
        change: what a record is written as, from the number of its source, the row and the record.
        texts: of a record, for `SourceRow.texts`. A `DataError` in it or in `change` makes a bad row.

    Raises:
        DataError: what cannot be read or used, with its place; a source of which no row can be used.
    """
    for number, source in enumerate(sources):
        used, known = False, len(bad_rows)
        for row in read_fields(source, bad_rows):
            found = None
            with bad_rows.guard(source.on_bad_row, row.values):
                KINDS[source.kind].subject(row)
                record = source_record(source, row)
                made = ("", "") if texts is None else texts(source, row, record)
                record = record if change is None else change(number, row, record)
                found = SourceRow(number, row.location, record, _line(row.location, record), made)
            if found is not None:
                used = True
                yield found
        if not used:
            raise DataError(
                f"{source.path}: none of its {len(bad_rows) - known} rows can be used, the first since "
                f"{bad_rows.rows[known].reason}"
            )


def source_record(source: DataSource, row: Fields) -> Record:
    """A row's fields and other columns; a column that a field was mapped to appears under the field's name only."""
    fields = {field: row.get(field) for field in KINDS[source.kind].fields}
    record = {field: value for field, value in fields.items() if value is not None}
    mapped = set(source.fields.values())
    return record | {name: value for name, value in row.values.items() if name not in fields and name not in mapped}


def _line(location: str, record: Record) -> str:
    try:
        return json_line(record, default=_plain)
    except (TypeError, RecursionError) as error:
        raise DataError(
            f"{location}: a column cannot be written as JSON ({error}); leave it out of the data"
        ) from error


def _plain(value: Any) -> Any:
    """Arrow's dates and decimals, as text."""
    if isinstance(value, bytes):
        raise TypeError("it holds bytes")
    return str(value)
