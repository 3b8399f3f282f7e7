"""Instruction records out of labeled data sets (as FLAN and promptsource make them), ready to be written.

The rendering itself is in `data/templates/render.py`, so that a trainer's source can use it without a file in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_dist.config.data import DataSource, source_names
from rlhf_dist.config.templates import TemplateSettings
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.fields import Fields
from rlhf_dist.data.reader import read_fields
from rlhf_dist.data.templates.render import instruction_rows


@dataclass
class TemplateReport:
    """What came of the rows."""

    num_rows: int = 0
    """Rows read."""
    num_records: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(task, template) → records made with it."""


def render_rows(
    rows: Iterable[Mapping[str, Any]],
    settings: TemplateSettings,
    fields: Mapping[str, str] | None = None,
    bad_rows: BadRows | None = None,
) -> Iterator[dict[str, Any]]:
    """Instruction records of rows in memory, such as a `datasets.Dataset`.

    Args:
        rows: mappings of column to value.
        settings: the templates.
        fields: name that a template uses → column.
        bad_rows: takes rows that cannot be rendered; None: the first ends the work.

    Raises:
        ConfigError: a template file or template that cannot be used.
        DataError: a row that cannot be rendered, by its number from 1.
    """
    numbered = (Fields(f"row {number}", row, fields or {}) for number, row in enumerate(rows, start=1))
    return instruction_rows(numbered, settings, "error" if bad_rows is None else "skip", bad_rows)


def render_sources(
    sources: Sequence[DataSource], bad_rows: BadRows, report: TemplateReport
) -> Iterator[dict[str, Any]]:
    """Instruction records of sources that name their templates, with the column `source`; counts into `report`.

    Errors as `render_rows`; bad rows go where each source's `on_bad_row` says.
    """
    for source, name in zip(sources, source_names(sources), strict=True):
        if source.templates is None:
            raise ValueError(f"{source.path} has no templates")
        rows = _counted(read_fields(source, bad_rows), report)
        for record in instruction_rows(rows, source.templates, source.on_bad_row, bad_rows):
            report.num_records[record["task"], record["provenance"]["template"]] += 1
            yield record | {"source": name}


def _counted(rows: Iterable[Fields], report: TemplateReport) -> Iterator[Fields]:
    for row in rows:
        report.num_rows += 1
        yield row
