"""The folder that a data command writes.

OUT_DIR/
  config.yaml      the resolved configuration
  records.jsonl    what was made, one record a line
  bad_rows.jsonl   input rows that were skipped, with the reasons; absent where there are none
  report.json      counts, and where everything came from
  ...              what else a command has to say: its own files
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_dist import __version__
from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.core.json_lines import json_line
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.run.console import print_table
from rlhf_dist.run.disk import full_disk_named
from rlhf_dist.run.run_folder import BAD_ROWS, write_atomically

RECORDS = "records.jsonl"
REPORT = "report.json"
CONFIG = "config.yaml"
_REMEDY = "Free space, or choose an out_dir on a larger disk, and give the same command again"


class OutputFolder:
    """A result while it is made, aside; `written` puts it in its place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_records(self, records: Iterable[Mapping[str, Any]], name: str = RECORDS) -> int:
        """One JSON line a record, as they come (they need not fit into memory); returns their number.

        Raises:
            DataError: whatever making the records raises; then nothing of the folder will appear.
        """
        return self.write_lines((json_line(record).encode("utf-8") for record in records), name)

    def write_lines(self, lines: Iterable[bytes], name: str = RECORDS) -> int:
        """Records that are JSON lines already, each with its line end; returns their number."""
        number = 0
        with (self.path / name).open("wb") as file:
            for line in lines:
                file.write(line)
                number += 1
            file.flush()
            os.fsync(file.fileno())
        return number

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for the work, gone after the block. After an error it stays until the whole result goes, so that what is
        said of a full disk counts it."""
        work = self.path / ".work"
        work.mkdir()
        yield work
        shutil.rmtree(work)

    def write_bad_rows(self, bad_rows: BadRows) -> None:
        """The account of rows that were skipped, where there are any."""
        if bad_rows:
            write_atomically(self.path / BAD_ROWS, "".join(bad_rows.lines()))

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Numbers and provenance; keys keep their order."""
        content = {"rlhf_dist": __version__, **report}
        write_atomically(self.path / REPORT, json_line(content, indent=2))


def print_notes(bad_rows: BadRows) -> None:
    """The table of `note_rows`, where there is something in it."""
    if notes := note_rows(bad_rows):
        print_table("what was recognized in rows, or is not used", notes)


def note_rows(bad_rows: BadRows) -> list[tuple[str, str]]:
    """For a table: what was recognized in rows, or is not used of them, and in how many."""
    return [(what, f"{number:,} rows") for what, number in sorted(bad_rows.notes.items())]


def check_output(out_dir: Path, overwrite: bool) -> None:
    """Reject a folder that may not be written; touches nothing.

    Raises:
        RunFolderError: something is there that is not an earlier result, or one is and `overwrite` is not set, or the
            folder cannot be made.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise RunFolderError(f"out_dir {out_dir} is a file; a result needs a folder. Choose another out_dir.")
    if out_dir.exists() and any(out_dir.iterdir()):
        if not (out_dir / REPORT).is_file():
            raise RunFolderError(
                f"out_dir {out_dir} is not empty and holds no result of a data command (there is no {REPORT} in it), so it "
                "is not replaced. Choose another out_dir, or empty the folder yourself."
            )
        if not overwrite:
            raise RunFolderError(
                f"out_dir {out_dir} holds an earlier result, and none is replaced unasked. Pass --overwrite true, or choose "
                "another out_dir."
            )
    parent = out_dir
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RunFolderError(
            f"out_dir {out_dir} cannot be written: {parent} is not a folder that this user may write to. Choose another "
            "out_dir, or change its permissions."
        )


@contextlib.contextmanager
def written(out_dir: Path, overwrite: bool, config_yaml: str) -> Iterator[OutputFolder]:
    """A folder to fill; at the end of the block it takes its place, and after an error nothing has changed.

    Raises:
        RunFolderError: as `check_output`; the disk is full.
    """
    check_output(out_dir, overwrite)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    kept = "The result that was there is as it was." if out_dir.exists() else "Nothing of it is left there."
    try:
        with full_disk_named(aside, kept, remedy=_REMEDY, place=out_dir):
            aside.chmod(0o777 & ~_umask())  # mkdtemp makes it private, and data are there to be shared
            write_atomically(aside / CONFIG, config_yaml)
            yield OutputFolder(aside)
            check_output(out_dir, overwrite)  # hours may have passed
            _put(aside, out_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put(new: Path, place: Path) -> None:
    """Exchange a folder for another; the old one is away only when the new one is in its place."""
    if not place.exists():
        new.rename(place)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{place.name}.old.", dir=place.parent))
    place.rename(old / place.name)
    try:
        new.rename(place)
    except OSError:
        (old / place.name).rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
