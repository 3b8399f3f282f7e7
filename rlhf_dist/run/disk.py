"""A disk that is full while a checkpoint, a model or a data set is written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from rlhf_dist.core.disk import is_disk_full
from rlhf_dist.core.errors import DataError, RunFolderError

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
        # torch gives no reason
        if not is_disk_full(error) and shutil.disk_usage(_existing(folder)).free >= _NOTHING_BYTES:
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
        if not is_disk_full(error):
            raise
        usage = shutil.disk_usage(_existing(file))
        raise RunFolderError(
            f"{file} could not be written: its disk is full ({usage.free:,} of {usage.total:,} bytes are free). {remedy}"
        ) from error


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
