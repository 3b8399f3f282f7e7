"""Work that is done a piece at a time and survives its process: a journal beside the folder of the result.

OUT_DIR.work/journal.jsonl holds what the work is, in its first line, and then whatever was done. It goes away when the result
is in its place.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.curation.journal import Journal, read_journal

JOURNAL = "journal.jsonl"
_NOT_IDENTITY = {"out_dir", "overwrite", "timeout_s", "max_retries", "api_key_env", "base_url", "on_bad_row"}
"""Keys, of any section, that change where and how work is done but not what comes of it. (What was read has a fingerprint.)"""


def work_folder(out_dir: Path) -> Path:
    """Where half-done work is kept."""
    return out_dir.with_name(f"{out_dir.name}.work")


class Work:
    """The pieces that are done."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.num_found = len(self.done)
        """Pieces that an earlier call did."""

    @property
    def done(self) -> list[dict[str, Any]]:
        """What was added, the oldest first."""
        return self._journal.entries[1:]

    def add(self, piece: Mapping[str, Any]) -> None:
        """A piece is done; it is on disk when this returns."""
        self._journal.append(piece)

    def save_to(self, path: Path) -> None:
        """Keep the journal with the result."""
        shutil.copyfile(self._journal.path, path)


def identity_of(config: BaseModel, without: Iterable[str] = (), **more: Any) -> dict[str, Any]:
    """What the pieces of a configuration's work depend on.

    Args:
        config: the command's configuration.
        without: top-level keys that only say when to stop.
        more: fingerprints of what the configuration names: input files, prompts.
    """
    settings = _without(config.model_dump(mode="json"), _NOT_IDENTITY)
    return {key: value for key, value in settings.items() if key not in set(without)} | more


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return [_without(item, keys) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def resumable(out_dir: Path, identity: Mapping[str, Any], earlier: Path | None = None) -> Iterator[Work]:
    """Begin work, or continue with it. When the block ends without an error the journal is removed.

    A journal without a piece is bound to no identity: what failed before its first piece can be fixed and given again.

    Args:
        out_dir: the folder of the result; the journal is beside it.
        identity: all that the pieces depend on, as JSON values. Settings that only say when to stop do not belong in it.
        earlier: what `Work.save_to` kept of finished work. Work that has no pieces yet begins with those of it, if its
            identity is the same.

    Raises:
        ConfigError: there is half-done work of another identity; it names the keys that differ.
        RunFolderError: another process is at work there, or the journal cannot be written.
    """
    folder = work_folder(out_dir)
    with Journal(folder / JOURNAL) as journal:
        if len(journal.entries) < 2:
            journal.clear()
            journal.append({"work": dict(identity)}, *_pieces(earlier, identity))
        known = journal.entries[0].get("work", {})
        different = list(_differences(known, identity))
        if different:
            raise ConfigError(
                f"{folder} holds half-done work of another configuration: {'; '.join(different[:5])}. Give that configuration "
                "to continue, choose another out_dir, or remove the folder to begin anew."
            )
        work = Work(journal)
        try:
            yield work
        except BaseException:
            if not work.done:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    shutil.rmtree(folder, ignore_errors=True)


def _pieces(earlier: Path | None, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    known, *pieces = list(read_journal(earlier)) if earlier else [{}]
    return [] if any(_differences(known.get("work", {}), identity)) else pieces


def _differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        for i, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{key}[{i}]")
    elif old != new and not (
        isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and list(old) == list(new)
    ):
        yield f"{key} was {_short(old)} and is {_short(new)}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:20]}...{shown[-37:]}"
