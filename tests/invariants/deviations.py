"""How far two sets of weights are apart, and the table of it in tests/README.md."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from dataclasses import dataclass
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


class Table:
    """What a run measures."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}

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

    def write(self, readme: Path) -> None:
        """Replace what stands between the markers, if it changes and can be replaced. Whoever reads meanwhile finds the old
        file or the new one."""
        with contextlib.suppress(OSError):
            self._write(readme)

    def _write(self, readme: Path) -> None:
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
        if new == text or START not in text or END not in text:
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
