"""Records on disk while they are worked on: appended, read in order, or read one by one by their number."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from typing_extensions import Self

_BUFFER_BYTES = 1 << 20


class Spool:
    """Byte strings in a file. Eight bytes a string stay in memory: where it ends. A context manager."""

    def __init__(self, path: Path) -> None:
        """Make the file, which must not be there."""
        self.path = path
        self._file = path.open("x+b", buffering=_BUFFER_BYTES)
        self._ends = array("Q")
        self._end = 0
        self._written = 0

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, item: bytes) -> None:
        """Add a string at the end."""
        self._file.write(item)
        self._end += len(item)
        self._ends.append(self._end)

    def __getitem__(self, number: int) -> bytes:
        self._flush()
        start = self._ends[number - 1] if number > 0 else 0
        return os.pread(self._file.fileno(), self._ends[number] - start, start)

    def __iter__(self) -> Iterator[bytes]:
        self._flush()
        with self.path.open("rb", buffering=_BUFFER_BYTES) as file:
            start = 0
            for end in self._ends:
                yield file.read(end - start)
                start = end

    def lengths(self) -> np.ndarray:
        """[len] int64 bytes of each string."""
        return np.diff(np.array(self._ends, dtype=np.int64), prepend=0)

    def in_order_of(self, numbers: Sequence[int] | np.ndarray, block: int = 1 << 16) -> Iterator[bytes]:
        """The strings of `numbers`, in that order. They are fetched a block at a time, by rising place in the file, so that a
        disk is read forwards; a block is what is held in memory."""
        for start in range(0, len(numbers), block):
            part = np.asarray(numbers[start : start + block])
            found: list[bytes] = [b""] * len(part)
            for place in np.argsort(part, kind="stable").tolist():
                found[place] = self[int(part[place])]
            yield from found

    def close(self) -> None:
        """Let go of the file; it stays."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _flush(self) -> None:
        if self._written < self._end:
            self._file.flush()
            self._written = self._end
