"""What a run shows on the terminal: a progress bar with the current phase, one line an iteration, tables at the end.

Where stdout is not a terminal (a log file, a pipe, a Slurm job) there is no bar and there are no control characters:
only the lines and tables.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typing_extensions import Self

_LOG_WIDTH = 120
"""Columns of a table that no terminal bounds."""


def _console() -> Console:
    """A console on the current stdout (looked up late: tests and notebooks replace it)."""
    terminal = sys.stdout.isatty()
    return Console(
        file=sys.stdout,
        highlight=False,
        soft_wrap=False,
        force_terminal=terminal,
        no_color=None if terminal else True,
        width=None if terminal else _LOG_WIDTH,
    )


class RunProgress:
    """A bar over the steps of a run. A context manager; the bar goes away when it is left.

    with RunProgress("ppo", total=100) as progress:
        with progress.phase("generate"):
            ...
        progress.advance()
        progress.line(step, metrics, ["reward/score_mean", "kl/ref_mean"])
    """

    def __init__(self, description: str, total: int, completed: int = 0) -> None:
        """`total` steps, of which `completed` were done before a resume."""
        self.description = description
        self.total = total
        self._completed = completed
        self._phases: list[str] = []
        self._console = _console()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = bar = Progress(
                TextColumn("{task.description}", style="bold"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[phase]}", style="dim"),
                console=self._console,
                transient=True,
            )
            self._task = bar.add_task(description, total=total, completed=completed, phase="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show `name` beside the bar while the block runs; phases nest, as in "update > mini-batches"."""
        self._phases.append(name)
        self._show_phase()
        try:
            yield
        finally:
            self._phases.pop()
            self._show_phase()

    def advance(self, steps: int = 1) -> None:
        """Count steps as done."""
        self._completed += steps
        if self._bar is not None:
            self._bar.update(self._task, completed=self._completed)

    def line(self, step: int, metrics: Mapping[str, float], names: Sequence[str]) -> None:
        """One compact line above the bar: the step, and those of `names` that were measured."""
        width = len(str(self.total))
        parts = [f"{_short(name, names)} {format_number(metrics[name])}" for name in names if name in metrics]
        self._print(f"{self.description} {step:>{width}}/{self.total}  " + "  ".join(parts))

    def message(self, text: str) -> None:
        """A line of plain text above the bar."""
        self._print(text)

    def _print(self, text: str) -> None:
        # Text, not markup: a sample or path may hold square brackets.
        self._console.print(Text(text), soft_wrap=True)
        if not self._console.is_terminal:
            sys.stdout.flush()

    def _show_phase(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, phase=" > ".join(self._phases))


def print_table(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print rows of equal width under a title. Long cells wrap; nothing is cut off."""
    console = _console()
    columns = max((len(row) for row in [header, *rows]), default=0)
    table = Table(title=Text(title, style="bold"), title_justify="left", show_header=bool(header))
    if not console.is_terminal:
        from rich.box import ASCII

        table.box = ASCII
    for i in range(columns):
        table.add_column(Text(header[i]) if i < len(header) else "", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console.print(table)


def print_styled(*content: RenderableType) -> None:
    """Print Rich's texts and tables, wrapped; where stdout is no terminal, without colors."""
    console = _console()
    for part in content:
        console.print(part)


def shows_colors() -> bool:
    """Whether what is printed has colors: a terminal that has some, and no `NO_COLOR`."""
    console = _console()
    return console.color_system is not None and not console.no_color


def format_number(value: float) -> str:
    """Four significant digits; whole numbers below a million as they are."""
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def _short(name: str, names: Sequence[str]) -> str:
    """The part after the slash where that is unique among `names`, else the whole name."""
    leaf = name.partition("/")[2] or name
    return leaf if sum((other.partition("/")[2] or other) == leaf for other in names) == 1 else name
