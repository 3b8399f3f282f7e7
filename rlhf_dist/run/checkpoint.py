"""Checkpoints of a whole run: every trained model, what is in flight, and the driver's own state, or nothing.

    checkpoints/step_000010/
      driver.json     step, counters, anything the loop must remember
      policy/ value/  what each role's ranks wrote
      rollouts/       responses that were generated ahead (ppo/rollouts.py)

A checkpoint is written under a temporary name and renamed when whole, so a folder with the right name can be trusted.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import rlhf_dist
from rlhf_dist.config.hosting import CheckpointConfig
from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.core.roles import Checkpointed
from rlhf_dist.run.disk import full_disk_named, size_of
from rlhf_dist.run.lineage import minor_release

log = logging.getLogger(__name__)

_PREFIX = "step_"
_TEMPORARY = ".writing_"


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    return int(path.name.removeprefix(_PREFIX))


@dataclass(frozen=True)
class RunRecord:
    """What a checkpoint says of the run that wrote it, for the run that resumes from it."""

    identity: Mapping[str, Any] = field(default_factory=dict)
    """What decides the result, and must be the same; flat, dotted keys."""
    checkpoint_format: Mapping[str, Any] = field(default_factory=dict)
    """What the form of DeepSpeed's checkpoints depends on: ranks and ZeRO stage of each trained model; dotted keys."""
    num_steps: int = 0
    """Optimizer steps (PPO: iterations) of the whole run."""
    length: Mapping[str, Any] = field(default_factory=dict)
    """The settings that `num_steps` comes from; dotted keys."""
    schedules: Mapping[str, str] = field(default_factory=dict)
    """Trained model → its learning-rate schedule, where that is stretched over the whole run."""
    version: str = field(default_factory=lambda: rlhf_dist.__version__)

    @classmethod
    def read(cls, found: Any, path: Path) -> RunRecord:
        """The record in a checkpoint's driver.json. Fields that a newer release may have added are ignored.

        Raises:
            RunFolderError: there is none.
        """
        if not isinstance(found, dict):
            raise RunFolderError(
                f"checkpoint {path} does not say which run wrote it (driver.json has no 'run'), so it cannot be resumed; "
                "remove that folder to resume from the one before, or start a new run with another run_dir"
            )
        return cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, settings: CheckpointConfig | None = None, record: RunRecord | None = None) -> None:
        """`settings`: when checkpoints are due and how many stay; `record`: of the run that writes or resumes here."""
        self.folder = folder
        self.settings = settings or CheckpointConfig()
        self.record = record or RunRecord()
        self._last = time.monotonic()

    def due(self, step: int, total: int) -> bool:
        """Whether a checkpoint is to be written after step `step` of `total`: by steps, by time, or because it is the last."""
        if step == total and self.settings.at_end:
            return True
        every_s = 60 * self.settings.every_minutes
        by_time = every_s > 0 and time.monotonic() - self._last >= every_s
        return by_time or (self.settings.every_steps > 0 and step % self.settings.every_steps == 0)

    def save(self, step: int, state: Mapping[str, Any], parts: Mapping[str, Checkpointed]) -> Path:
        """Write step `step`; old ones beyond `keep_last` go only after the new one is whole."""
        name = f"{_PREFIX}{step:06d}"
        temporary = self.folder / f"{_TEMPORARY}{name}"
        for left in self.folder.glob(f"{_TEMPORARY}*"):  # of saves that a crash or a full disk ended, of any step
            shutil.rmtree(left, ignore_errors=True)
        before = self.latest()
        kept = f"The last checkpoint, {before}, is untouched." if before else "There is no earlier checkpoint."
        with full_disk_named(temporary, kept, None if before is None else size_of(before)):
            self._write(temporary, step, state, parts)
        final = self.folder / name
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        _sync(self.folder)
        for old in self._whole()[: -self.settings.keep_last]:
            shutil.rmtree(old)
        self._last = time.monotonic()
        return final

    def _write(self, temporary: Path, step: int, state: Mapping[str, Any], parts: Mapping[str, Checkpointed]) -> None:
        temporary.mkdir(parents=True)
        writes = [part.save_checkpoint(temporary / role) for role, part in parts.items()]
        for write in writes:
            write.result()
        for role in parts:
            if not any(file.is_file() for file in (temporary / role).rglob("*")):
                raise RunFolderError(
                    f"the ranks of {role} wrote nothing to {temporary / role} that the driver can see; run_dir must be on "
                    "storage that all nodes share. The checkpoints before this one are untouched."
                )
        driver = {"step": step, **state, "run": asdict(self.record)}
        (temporary / "driver.json").write_text(json.dumps(driver, indent=2), encoding="utf-8")
        _sync_tree(temporary)

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        whole = self._whole()
        return whole[-1] if whole else None

    def check(self, path: Path) -> None:
        """Check that this run may continue from the checkpoint; warn of what changes on the way.

        Raises:
            RunFolderError: another identity (names the keys with both values), a run that is shorter than what is done, or
                a checkpoint whose form depends on another layout.
        """
        then, now = RunRecord.read(self._state(path).get("run"), path), self.record
        if differing := _differing(then.identity, now.identity):
            raise RunFolderError(
                f"{path} cannot be resumed by this run: {'; '.join(differing)}. Undo the change, or start a new run with "
                "another run_dir (a run can begin from this one's model/ folder)."
            )
        if now.num_steps < step_of(path):
            settings = ", ".join(f"{key} {value}" for key, value in now.length.items())
            raise RunFolderError(
                f"{path} is at step {step_of(path)}, and this run would end at step {now.num_steps} ({settings}); a run may be "
                f"extended, not cut below what is done: raise the number of steps to at least {step_of(path)}, or start a "
                "new run with another run_dir"
            )
        if differing := _differing(then.checkpoint_format, now.checkpoint_format):
            raise RunFolderError(
                f"{path} cannot be read in this layout: {'; '.join(differing)}. The result would be the same, but DeepSpeed "
                "reads a checkpoint only with the layout that wrote it; set these back to resume, or start a new run with "
                "another run_dir."
            )
        if then.num_steps != now.num_steps and now.schedules:
            schedules = ", ".join(f"{role} ({schedule})" for role, schedule in now.schedules.items())
            log.warning(
                "The run had %s steps and now has %s: from step %s on, the learning rate of %s follows the schedule of %s "
                "steps, where the steps before followed that of %s",
                then.num_steps, now.num_steps, step_of(path), schedules, now.num_steps, then.num_steps,
            )  # fmt: skip
        if minor_release(then.version) != minor_release(now.version):
            log.warning(
                "%s was written by rlhf_dist %s, and this is %s: the steps to come may differ in detail from those that the "
                "older version would have taken",
                path, then.version, now.version,
            )  # fmt: skip

    def load(self, path: Path, parts: Mapping[str, Checkpointed]) -> dict[str, Any]:
        """Restore every part from `path`; returns the driver's state.

        Raises:
            RunFolderError: the driver's file cannot be read.
        """
        state = self._state(path)
        for load in [part.load_checkpoint(path / role) for role, part in parts.items()]:
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


def _differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]


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
