"""Checkpoints of a whole run: every trained model and the driver's own state, or nothing.

    checkpoints/step_000010/
      driver.json     step, counters, anything the loop must remember
      policy/ value/  what each role's ranks wrote

A checkpoint is written under a temporary name and renamed when whole, so a folder with the right name can be trusted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_dist.errors import RunFolderError
from rlhf_dist.roles import Trained

_PREFIX = "step_"
_TEMPORARY = ".writing_"


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    return int(path.name.removeprefix(_PREFIX))


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def save(self, step: int, state: Mapping[str, Any], models: Mapping[str, Trained]) -> Path:
        """Write step `step`; old ones beyond `keep_last` go only after the new one is whole."""
        name = f"{_PREFIX}{step:06d}"
        temporary = self.folder / f"{_TEMPORARY}{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        writes = [model.save_checkpoint(temporary / role) for role, model in models.items()]
        for write in writes:
            write.result()
        (temporary / "driver.json").write_text(json.dumps({"step": step, **state}, indent=2), encoding="utf-8")
        _sync_tree(temporary)
        final = self.folder / name
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        _sync(self.folder)
        for old in self._whole()[: -self.keep_last]:
            shutil.rmtree(old)
        return final

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        whole = self._whole()
        return whole[-1] if whole else None

    def load(self, path: Path, models: Mapping[str, Trained]) -> dict[str, Any]:
        """Restore every model from `path`; returns the driver's state.

        Raises:
            RunFolderError: the driver's file cannot be read.
        """
        try:
            state = json.loads((path / "driver.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise RunFolderError(
                f"checkpoint {path} has no readable driver.json ({error}); remove that folder to resume from the one before"
            ) from error
        for load in [model.load_checkpoint(path / role) for role, model in models.items()]:
            load.result()
        return state

    def _whole(self) -> list[Path]:
        return sorted((p for p in self.folder.glob(f"{_PREFIX}*") if (p / "driver.json").is_file()), key=step_of)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    """Force the folder's files to disk: a rename must not become durable before what it names."""
    for directory, _, files in os.walk(folder):
        for name in files:
            _sync(Path(directory) / name)
        _sync(Path(directory))
