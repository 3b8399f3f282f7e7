"""What `data inspect` shows on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from rlhf_dist.curation.examples import Example, ShownSequence
from rlhf_dist.curation.inspection import SetReport
from rlhf_dist.curation.text_quality import visible
from rlhf_dist.curation.token_spans import runs
from rlhf_dist.run.console import print_styled, print_table, shows_colors

_BARS = " ▁▂▃▄▅▆▇█"
_COUNTS = (
    "records read",
    "records used",
    "records skipped",
    "bad rows",
    "records with a cut response",
    "sequences",
    "tokens",
    "tokens learnt from",
    "tokens of responses",
    "unknown tokens",
    "repeated prompts",
)
_MAX_ROWS = 12
"""Of a table; the rest is in the report."""


def show(summary: Mapping[str, str], reports: Sequence[SetReport]) -> None:
    """Print everything."""
    print_table("data", list(summary.items()))
    for report in reports:
        _show_numbers(report)
        for example in report.examples:
            print_styled(*_example(report.kind, example))


def _show_numbers(report: SetReport) -> None:
    numbers, name = report.numbers, report.name
    rows = [(key, f"{numbers[key]:,}") for key in _COUNTS if key in numbers]
    rows += _lengths(numbers["lengths"]) + _duplicates(numbers["duplicates"])
    rows += [(key, f"{value:,}") for key, value in numbers.get("overlap", {}).items() if isinstance(value, int)]
    for key, value in numbers.get("preferences", {}).items():
        if isinstance(value, (int, float)):
            rows.append((key, f"{value:.1%}" if key.startswith("share") else f"{value:,}"))
    rows += [(what, f"{number:,} rows") for what, number in numbers.get("notes", {}).items()]
    print_table(name, rows)
    for key in ("sources", "tasks"):
        shares = [
            (
                row["name"],
                f"{row['sequences']:,}",
                f"{row['share']:.1%}",
                f"{row['tokens']:,}",
                f"{row['share of tokens']:.1%}",
            )
            for row in numbers[key]
        ]
        _table(f"{name}: {key}", shares, ("name", "sequences", "share", "tokens", "share of tokens"))
    if "mixing" in numbers:
        mixed = [tuple(map(str, row.values())) for row in numbers["mixing"]]
        _table(f"{name}: an epoch, as it is mixed", mixed, tuple(numbers["mixing"][0]))
    scripts = [
        (
            row["script"],
            f"{row['share of letters']:.2%}",
            f"{row['records mostly in it']:,}",
            ", ".join(row["first places"] if number else ()),
        )
        for number, row in enumerate(numbers["scripts"])
    ]
    _table(f"{name}: scripts", scripts, ("script", "share of letters", "records mostly in it", "first places"))
    odd = [
        (row["oddity"], f"{row['records']:,}", row["places"][0]["location"], row["places"][0]["excerpt"])
        for row in numbers["oddities"]
    ]
    _table(f"{name}: odd characters", odd, ("what", "records", "first", "there"))
    same = [(row["location"], row["same as"], row["reason"]) for row in numbers["duplicates"]["first"]]
    _table(f"{name}: duplicates", same, ("record", "same as", "how"))
    bad = [(f"{row['rows']:,}", row["first"]) for row in numbers.get("kinds of bad rows", ())]
    _table(f"{name}: bad rows", bad, ("rows", "the first of the kind"))


def _table(title: str, rows: Sequence[Sequence[str]], header: Sequence[str]) -> None:
    if rows:
        more = [("…", f"{len(rows) - _MAX_ROWS} more in the report")] if len(rows) > _MAX_ROWS else []
        print_table(title, [*rows[:_MAX_ROWS], *more], header=header)


def _lengths(lengths: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = lengths["histogram"]["counts"]
    most = max(counts)
    bars = "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] for count in counts)
    quantiles = " · ".join(
        f"{key} {lengths[key]:,}" for key in ("shortest", "p5", "p50", "mean", "p95", "p99", "longest")
    )
    return [("length in tokens", quantiles), ("", f"{lengths['shortest']:,} {bars} {lengths['longest']:,}")]


def _duplicates(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    near = "not looked for" if found["near"] is None else f"{found['near']:,}"
    note = [("", found["note"])] if "note" in found else []
    return [("exact duplicates", f"{found['exact']:,}"), ("near-duplicates", near), *note]


def _example(kind: str, example: Example) -> Iterator[Table | Text]:
    title = Text()
    title.append(f"\n{example.why}", style="bold")
    about = [example.source, f"task {example.task}" if example.task not in ("", example.source) else ""]
    about += ["" if example.margin is None else f"margin {example.margin:.4g}", *example.oddities, example.location]
    title.append("".join(f"  {part}" for part in about if part), style="dim")
    yield title
    if len(example.sequences) == 1:
        yield _tokens(kind, example.sequences[0])
        return
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in example.sequences[:2]:
        table.add_column(ratio=1, overflow="fold")
    pairs = [example.sequences[i : i + 2] for i in range(0, len(example.sequences), 2)]
    for pair in pairs:
        table.add_row(*(_tokens(kind, sequence) for sequence in pair))
    yield table


def _tokens(kind: str, sequence: ShownSequence) -> Text:
    """The tokens in colors: learnt green, context plain, special violet; without colors, what is learnt is in ⟦ ⟧."""
    rating = "" if sequence.rating is None else f", rated {sequence.rating:.4g}"
    word = {"sequences": "learnt", "preferences": "of the response", "prompts": ""}[kind]
    targets = f", {sequence.num_targets:,} {word}" if word else ""
    cut = ", cut" if sequence.cut else ""
    text = Text()
    text.append(f"{sequence.label}{rating}{': ' if sequence.label else ''}", style="bold")
    text.append(f"{sequence.num_tokens:,} tokens{targets}{cut}\n", style="dim")
    colored, inside = shows_colors(), False
    for run in runs(sequence.pieces):
        first = run[0]
        if not colored and first.target != inside:
            text.append("⟦" if first.target else "⟧")
        inside = first.target
        style = "black on green" if first.target else "default"
        if first.special:
            style = "bold white on magenta" if first.target else "bold magenta"
        if first.unknown:
            style = "bold white on red"
        if first.skipped:
            style = "dim italic"
        for part, is_mark in visible("".join(piece.text for piece in run)):
            text.append(part, style=f"{style} underline" if is_mark and colored else style)
    if not colored and inside:
        text.append("⟧")
    return text
