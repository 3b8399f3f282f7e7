"""A disk that is full while a checkpoint, a model or a data set is written."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from rlhf_dist.core.errors import DataError, RunFolderError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_WORDS = ("No space left on device", "Disk quota exceeded")
_NOTHING_BYTES = 2**20
"""With less than this free, a writer that fails without a reason (torch's) has failed for that."""


RESUME = "Free space, or move the run folder to a larger disk, and run the same command with resume: auto"


@contextlib.contextmanager
def full_disk_named(
    folder: Path, kept: str, needed_bytes: int | None = None, remedy: str = RESUME, place: Path | None = None
) -> Iterator[None]:
    """Where the block fails since the disk of `folder` is full, say so, and remove what it wrote there.

    Args:
        folder: that the block writes.
        kept: what is as it was, for the message.
        needed_bytes: about; None where it is not known.
        remedy: for the message.
        place: that the folder is to become, for the message; `folder` when None.

    Raises:
        RunFolderError: the disk is full.
    """
    try:
        yield
    except DataError:
        raise  # about rows, however little is free
    except Exception as error:
        if not _is_full(error, folder):
            raise
        written = size_of(folder)
        shutil.rmtree(folder, ignore_errors=True)
        usage = shutil.disk_usage(_existing(folder))
        needed = f"about {needed_bytes:,}" if needed_bytes else f"more than {written:,}"
        raise RunFolderError(
            f"{place or folder} could not be written: its disk is full ({needed} bytes are needed, {usage.free:,} of "
            f"{usage.total:,} are free). {kept} {remedy}"
        ) from error


@contextlib.contextmanager
def full_disk_of_file(file: Path, remedy: str) -> Iterator[None]:
    """As `full_disk_named`, for a block that adds to a file; nothing is removed.

    Raises:
        RunFolderError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        usage = shutil.disk_usage(_existing(file))
        raise RunFolderError(
            f"{file} could not be written: its disk is full ({usage.free:,} of {usage.total:,} bytes are free). {remedy}"
        ) from error


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _is_full(error: BaseException | None, folder: Path) -> bool:
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _FULL) or any(word in str(error) for word in _WORDS):
            return True
        error = error.__cause__
    return shutil.disk_usage(_existing(folder)).free < _NOTHING_BYTES


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
