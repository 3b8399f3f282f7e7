"""A file of JSON lines that only grows, for work that must survive its process.

A line counts when it is whole, with its line end: `append` returns when the operating system has put it on disk. What a
killed process left of its last line is cut off when the file is opened again; nothing that was acknowledged is lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import Self

from rlhf_dist.core.errors import DataError, RunFolderError
from rlhf_dist.core.json_lines import json_line
from rlhf_dist.run.disk import full_disk_of_file


class Journal:
    """One writer's journal; a context manager. The file is locked: a second writer is rejected."""

    def __init__(self, path: Path) -> None:
        """Open or make the file.

        Raises:
            RunFolderError: another process has it open, or it cannot be written.
            DataError: a whole line in it is not a JSON object.
        """
        self.path = path
        try:
            new = not path.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written ({error.strerror}); choose another folder") from error
        try:
            self._lock()
            if new:
                _sync_directory(path.parent)
            self._cut_torn_line()
            self.entries: list[dict[str, Any]] = list(read_journal(path))
            """What it holds, the oldest first."""
        except BaseException:
            self._file.close()
            raise

    def append(self, *entries: Mapping[str, Any]) -> None:
        """Add entries; they are on disk when this returns.

        Raises:
            RunFolderError: the disk is full. What was added before stays.
        """
        lines = [json_line(entry) for entry in entries]
        with full_disk_of_file(self.path, "Free space, and give the same command again: what is done is kept"):
            self._file.write("".join(lines).encode("utf-8"))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.entries += map(dict, entries)

    def clear(self) -> None:
        """Take every entry out."""
        self._file.truncate(0)
        self.entries.clear()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"another process writes {self.path}; wait for it, end it, or choose another folder"
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"{self.path} cannot be locked ({error.strerror}), so two processes could write it at once; put the folder "
                "on a file system that has locks"
            ) from error

    def _cut_torn_line(self) -> None:
        self._file.seek(0)
        whole = 0
        for line in self._file:
            whole += len(line) if line.endswith(b"\n") else 0
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The whole entries of a journal, also while another process writes it.

    Raises:
        DataError: a whole line is not a JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            entry = None
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
            if not isinstance(entry, dict):
                raise DataError(
                    f"{path}:{number}: not a JSON object; a journal is only written by its command: fix the line"
                )
            yield entry


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
