"""Rows that cannot be used, kept with their place and the reason instead of ending the run (`on_bad_row: skip`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rlhf_dist.config.data import BadRowPolicy
from rlhf_dist.core.errors import DataError


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    reason: str
    """Place, value, constraint and remedy: the text of the error that `on_bad_row: error` would have ended with."""
    row: Any = None
    """What was read: columns, the raw line where it could not be parsed, or the record where it could not be encoded."""


@dataclass
class Quarantine:
    """The bad rows of one or more sources, in the order in which they were read."""

    rows: list[BadRow] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    """Places of rows that nothing is wrong with, but that no template of their source wanted (`when`)."""

    def __len__(self) -> int:
        return len(self.rows)

    def pass_over(self, location: str) -> None:
        """Note a row that no template wanted."""
        self.passed_over.append(location)

    def lines(self) -> Iterator[str]:
        """A JSON line for each row: `reason` and, as text where it is not JSON, `row`."""
        for bad in self.rows:
            yield json.dumps({"reason": bad.reason, "row": bad.row}, ensure_ascii=False, default=repr) + "\n"

    def add(self, policy: BadRowPolicy, error: DataError, row: Any = None) -> None:
        """Keep a bad row under `skip`.

        Raises:
            DataError: `error` itself under `error`.
        """
        if policy == "error":
            raise error
        self.rows.append(BadRow(str(error), row))

    @contextmanager
    def guard(self, policy: BadRowPolicy, row: Any = None) -> Iterator[None]:
        """The block makes something of a row; a `DataError` in it ends the block and goes where `add` says."""
        try:
            yield
        except DataError as error:
            self.add(policy, error, row)
