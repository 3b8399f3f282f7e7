"""Records on disk while they are worked on, so that memory does not grow with the data."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, overload

import datasets.config
import numpy as np
from typing_extensions import Self

from rlhf_dist.core.disk import is_disk_full
from rlhf_dist.core.errors import DataError

log = logging.getLogger(__name__)

R = TypeVar("R")
S = TypeVar("S")

_BUFFER_BYTES = 1 << 20


class Spool:
    """Byte strings in a file: appended, read in order, or one by one by their number. Eight bytes a string stay in memory:
    where it ends. A context manager."""

    def __init__(self, path: Path | None = None) -> None:
        """Make the file, which must not be there. None: a nameless one below `cache_dir`, which ends with the spool."""
        if path is None:
            self._file = tempfile.TemporaryFile(buffering=_BUFFER_BYTES, dir=cache_dir())  # noqa: SIM115 (see close)
        else:
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
        self.flush()
        start = self._ends[number - 1] if number > 0 else 0
        return os.pread(self._file.fileno(), self._ends[number] - start, start)

    def __iter__(self) -> Iterator[bytes]:
        return (self[number] for number in range(len(self)))

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

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # its file was made
            with suppress(OSError):  # closing writes what is left, and the disk may be full: whoever wrote was told
                self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def flush(self) -> None:
        """Write what is still in memory.

        Raises:
            OSError: the disk is full.
        """
        if self._written < self._end:
            self._file.flush()
            self._written = self._end


class RecordStore(Sequence[R], Generic[R]):
    """Records in a nameless temporary file: each is read when it is asked for. It cannot be sent to another process."""

    def __init__(self, records: Iterable[R] = ()) -> None:
        """
        Args:
            records: read once, in order.

        Raises:
            DataError: the disk is full.
        """
        self._spool = Spool()
        self._make: Callable[[Any], R] = lambda stored: stored
        with full_cache_named():
            for record in records:
                self._spool.append(pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL))
            self._spool.flush()
        self._numbers = np.arange(len(self._spool))
        """[len] of each record in the spool."""

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> RecordStore[R]: ...
    def __getitem__(self, index: int | slice) -> R | RecordStore[R]:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return self._make(pickle.loads(self._spool[int(self._numbers[index])]))

    def select(self, indices: Sequence[int] | np.ndarray) -> RecordStore[R]:
        """The records `indices`, of the same file."""
        made = copy.copy(self)
        made._numbers = self._numbers[np.asarray(indices, dtype=np.int64)]
        return made

    def each(self, function: Callable[[R], S]) -> RecordStore[S]:
        """What `function` makes of each record when it is read."""
        made = cast(RecordStore[Any], copy.copy(self))
        before = self._make
        made._make = lambda stored: function(before(stored))
        return made


@cache
def _temporary_cache() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="rlhf_dist_tokens_")


def cache_dir() -> Path:
    """Below `HF_DATASETS_CACHE`; where that cannot be written, a temporary folder that is removed at exit."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "rlhf_dist"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = "permission denied"
    except OSError as err:
        reason = str(err)
    log.warning(
        "the cache of tokenized data %s cannot be written (%s), so the next run tokenizes again; set HF_DATASETS_CACHE to a "
        "folder that can be",
        folder,
        reason,
    )
    return Path(_temporary_cache().name)


@contextmanager
def full_cache_named() -> Iterator[None]:
    """The block writes below `cache_dir`.

    Raises:
        DataError: its disk is full.
    """
    try:
        yield
    except Exception as err:  # `datasets` raises an error of its own from the first
        if isinstance(err, DataError) or not is_disk_full(err):
            raise
        usage = shutil.disk_usage(cache_dir())
        raise DataError(
            f"the data cannot be prepared: the disk of {cache_dir()} is full ({usage.free:,} of {usage.total:,} bytes are "
            "free). Free some space, or set HF_DATASETS_CACHE to a folder on a larger disk"
        ) from err
