"""How far two sets of weights are apart, and the table of it in tests/README.md."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Case = tuple[int, int]
"""(number of ranks, ZeRO stage)."""

MAX_RELATIVE, MAX_LARGEST = 1e-4, 3e-5
"""‖Δ‖ / ‖update‖ and max |Δ|.

Sums are added in another order in every layout: gradients agree to about 1e-6 of their size. Adam divides a gradient by its
size (eps is 1e-5, see `layouts.OPTIMIZER`), so single parameters whose gradients almost cancel agree less well than that, and
four steps carry it on. Errors of logic move the weights by tenths of a percent of the update, or more.
"""

MEASURED = "RLHF_DIST_MEASURED_DEVIATIONS"
"""Environment variable with the file that a test run leaves its measurements in, for tests/support/publish_tables.py."""
START, END = "<!-- deviations -->", "<!-- end of deviations -->"
HEADER = ("what varied", "objective", "ranks × ZeRO stage", "steps", "max abs. Δ", "‖Δ‖/‖update‖", "tolerance")
KEY = 4
"""Columns that say what was measured."""


@dataclass(frozen=True)
class Deviation:
    """Of weights after training, from those of the reference loop."""

    largest: float
    """max |Δ| over all parameters."""
    relative: float
    """‖Δ‖ / ‖update‖: 1 would be as far away as not having trained at all."""


def deviation(actual: Weights, expected: Weights, start: Weights) -> Deviation:
    """Of `actual` from `expected`, both trained from `start`. Names and shapes must be the same."""
    assert actual.keys() == expected.keys() == start.keys()
    difference, update = [
        torch.cat([(a[name].double() - b[name].double()).flatten() for name in sorted(a)])
        for a, b in ((actual, expected), (expected, start))
    ]
    return Deviation(float(difference.abs().max()), float(difference.norm() / update.norm()))


@dataclass
class Row:
    """One line of the table: the largest deviations of several cases."""

    varied: str
    objective: str
    steps: int
    tolerance: str
    cases: set[Case]
    largest: float = 0.0
    relative: float = 0.0

    @property
    def key(self) -> tuple[str, ...]:
        """What tells rows apart."""
        return (self.varied, self.objective, ", ".join(f"{r}×{z}" for r, z in sorted(self.cases)), str(self.steps))


@dataclass
class Table:
    """What a run measures."""

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    def add(
        self,
        varied: str,
        objective: str,
        case: Case,
        steps: int,
        measured: Deviation,
        tolerance: str,
    ) -> None:
        """A measured case."""
        row = self.rows.setdefault((varied, objective), Row(varied, objective, steps, tolerance, set()))
        row.cases.add(case)
        row.largest = max(row.largest, measured.largest)
        row.relative = max(row.relative, measured.relative)

    def save(self, path: Path) -> None:
        """Write the rows as JSON."""
        rows = [dataclasses.asdict(row) | {"cases": sorted(row.cases)} for row in self.rows.values()]
        path.write_text(json.dumps(rows), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Table:
        """What `save` wrote."""
        table = cls()
        for row in json.loads(path.read_text(encoding="utf-8")):
            cases = {(ranks, stage) for ranks, stage in row.pop("cases")}
            table.rows[row["varied"], row["objective"]] = Row(**row, cases=cases)
        return table

    def write(self, readme: Path) -> None:
        """Replace what is between the markers, if it changes. Whoever reads meanwhile finds the old file or the new one.

        Raises:
            ValueError: the file has no such markers.
        """
        text = readme.read_text(encoding="utf-8")
        before, _, rest = text.partition(START)
        old, _, after = rest.partition(END)
        published = {tuple(cells[:KEY]): cells for cells in map(_cells, old.splitlines()) if len(cells) == len(HEADER)}
        lines = [HEADER, ("---",) * len(HEADER)]
        for row in sorted(self.rows.values(), key=lambda row: (row.varied, row.objective)):
            cells = published.get(row.key, [""] * len(HEADER))
            lines.append((*row.key, bound(row.largest, cells[KEY]), bound(row.relative, cells[KEY + 1]), row.tolerance))
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        new = f"{before}{START}\n\n{table}\n\n{END}{after}"
        if START not in text or END not in text:
            raise ValueError(f"{readme} has no lines {START} and {END} for the table to go between; put them back")
        if new == text:
            return
        aside = readme.with_name(f".{readme.name}.{os.getpid()}")
        try:
            aside.write_text(new, encoding="utf-8")
            shutil.copymode(readme, aside)
            aside.replace(readme)
        finally:
            aside.unlink(missing_ok=True)


def bound(measured: float, published: str = "") -> str:
    """Rounded up to 1, 2 or 5 times a power of ten, as `≤ 2e-06`; `0` for bit equality. What was published stands as long as
    it is true and within a factor of 10: another machine's last bits are no news."""
    if measured == 0:
        return "0"
    match = re.fullmatch(r"≤ (\de-?\d+)", published)
    if match and measured <= float(match[1]) <= 10 * measured:
        return published
    power = 10.0 ** math.floor(math.log10(measured))
    return f"≤ {next(digit * power for digit in (1, 2, 5, 10) if measured <= digit * power):.0e}"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
