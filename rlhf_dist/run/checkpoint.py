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

from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.core.roles import Trained

_PREFIX = "step_"
_TEMPORARY = ".writing_"


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    return int(path.name.removeprefix(_PREFIX))


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, keep_last: int, identity: Mapping[str, Any] | None = None) -> None:
        """`identity`: what a run must share with its checkpoints to continue from them (configuration, sizes of the data,
        versions); flat, dotted keys."""
        self.folder = folder
        self.keep_last = keep_last
        self.identity = dict(identity or {})

    def save(self, step: int, state: Mapping[str, Any], models: Mapping[str, Trained]) -> Path:
        """Write step `step`; old ones beyond `keep_last` go only after the new one is whole."""
        name = f"{_PREFIX}{step:06d}"
        temporary = self.folder / f"{_TEMPORARY}{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        writes = [model.save_checkpoint(temporary / role) for role, model in models.items()]
        for write in writes:
            write.result()
        for role in models:
            if not any(file.is_file() for file in (temporary / role).rglob("*")):
                raise RunFolderError(
                    f"the ranks of {role} wrote nothing to {temporary / role} that the driver can see; run_dir must be on "
                    "storage that all nodes share. The checkpoints before this one are untouched."
                )
        driver = {"step": step, **state, "identity": self.identity}
        (temporary / "driver.json").write_text(json.dumps(driver, indent=2), encoding="utf-8")
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

    def check(self, path: Path) -> None:
        """Refuse to continue another run's checkpoint: cursors and schedules of one configuration mean nothing in another.

        Raises:
            RunFolderError: the identities differ; names the keys with both values.
        """
        then = self._state(path).get("identity", {})
        differing = [
            f"{key} was {then.get(key)!r} and is {self.identity.get(key)!r}"
            for key in sorted(then.keys() | self.identity.keys())
            if then.get(key) != self.identity.get(key)
        ]
        if differing:
            raise RunFolderError(
                f"{path} cannot be resumed by this run: {'; '.join(differing)}. Undo the change, or start a new run with "
                "another run_dir (a run can begin from this one's model/ folder)."
            )

    def load(self, path: Path, models: Mapping[str, Trained]) -> dict[str, Any]:
        """Restore every model from `path`; returns the driver's state.

        Raises:
            RunFolderError: the driver's file cannot be read.
        """
        state = self._state(path)
        for load in [model.load_checkpoint(path / role) for role, model in models.items()]:
            load.result()
        return state

    def _state(self, path: Path) -> dict[str, Any]:
        try:
            return json.loads((path / "driver.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise RunFolderError(
                f"checkpoint {path} has no readable driver.json ({error}); remove that folder to resume from the one before"
            ) from error

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
