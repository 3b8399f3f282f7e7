"""What is published is true, stays put while it is, and never fails a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from deviations import END, START, Deviation, Table, bound, deviation
from whole_suite import expected_rows

TEXT = f"before\n\n{START}\n{END}\n\nafter\n"


def table(largest: float, relative: float) -> Table:
    made = Table()
    made.add("size", "SFT", (1, 2), 4, Deviation(largest / 3, relative / 3), "1e-04")
    made.add("size", "SFT", (3, 0), 4, Deviation(largest, relative), "1e-04")
    return made


@pytest.mark.parametrize(
    ("measured", "published", "expected"),
    [
        (0.0, "≤ 1e-06", "0"),
        (1.1e-6, "", "≤ 2e-06"),
        (2.1e-6, "≤ 2e-06", "≤ 5e-06"),
        (6e-6, "", "≤ 1e-05"),
        (3e-7, "≤ 2e-06", "≤ 2e-06"),
        (3e-7, "≤ 5e-06", "≤ 5e-07"),
    ],
)
def test_bounds(measured: float, published: str, expected: str):
    assert bound(measured, published) == expected


def test_deviations_are_relative_to_the_update():
    start = {"a": torch.zeros(2), "b": torch.zeros(1)}
    expected = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    actual = {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([4.0])}
    assert deviation(actual, expected, start) == Deviation(0.5, 0.1)


def test_only_what_stands_between_the_markers_changes(tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text(TEXT, encoding="utf-8")
    table(1.5e-6, 4e-5).write(readme)
    first = readme.read_text(encoding="utf-8")
    assert first.startswith(f"before\n\n{START}\n")
    assert first.endswith(f"{END}\n\nafter\n")
    assert "| size | SFT | 1×2, 3×0 | 4 | ≤ 2e-06 | ≤ 5e-05 | 1e-04 |" in first
    table(1.1e-6, 2e-5).write(readme)
    assert readme.read_text(encoding="utf-8") == first
    table(2.5e-6, 2e-5).write(readme)
    assert readme.read_text(encoding="utf-8") == first.replace("≤ 2e-06", "≤ 5e-06")


@pytest.mark.parametrize("text", ["no markers\n", f"only the first {START}\n"])
def test_without_both_markers_nothing_is_written(tmp_path: Path, text: str):
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(START)):
        table(1e-6, 1e-5).write(readme)
    assert readme.read_text(encoding="utf-8") == text


def test_what_a_run_measured_is_read_back(tmp_path: Path):
    made = table(1.5e-6, 4e-5)
    made.save(tmp_path / "measured.json")
    assert Table.load(tmp_path / "measured.json") == made


def test_the_published_rows_are_those_that_the_suite_measures():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.split(START)[1].split(END)[0].splitlines() if "×" in line][1:]
    published = {(cells[1].strip(), cells[2].strip()): cells[3].strip() for cells in rows}
    expected = {key: ", ".join(f"{r}×{z}" for r, z in sorted(cases)) for key, cases in expected_rows().items()}
    assert published == expected
