"""The stages of a pipeline before they run: what each one reads, its key and folder, how far it is.

A stage's key is the SHA-256 of what decides its result: its configuration, with every path in it replaced by what is
there. A file counts by its bytes, an earlier stage's model by that stage's key, a set of records by what it is made of.
So a key is known before anything has run, and it is the same wherever the files lie.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import rlhf_dist
from rlhf_dist.config.data import DataSource
from rlhf_dist.config.interpolation import STAGES, Interpolation
from rlhf_dist.core.errors import ConfigError, RlhfDistError, RunFolderError
from rlhf_dist.data.files import read_rows
from rlhf_dist.data.splits import set_path
from rlhf_dist.models.loading import load_model_config
from rlhf_dist.pipeline.config import DataStage, PipelineConfig
from rlhf_dist.pipeline.stage_config import stage_config
from rlhf_dist.run.checkpoint import Checkpoints, step_of
from rlhf_dist.run.identity import identity
from rlhf_dist.run.lineage import (
    ContentHashes,
    cached_commit,
    check_outputs,
    minor_release,
    read_lineage,
    sha256_of_json,
)
from rlhf_dist.run.run_folder import RunFolder

log = logging.getLogger(__name__)

KEY_LENGTH = 10
"""Digits of a key in a folder's name; the lineage has all of them."""


@dataclass(frozen=True)
class Input:
    """A file, directory or hub name that a stage reads."""

    place: str
    """Its dotted key in the stage's configuration."""
    path: str
    content: str
    """What is there, as it enters the key."""
    made_by: Interpolation | None = None
    """The earlier stage's output that it is."""
    source: DataSource | None = None
    """How its records are read, where it holds records."""


@dataclass(frozen=True)
class Stage:
    """One stage, with all its inputs known by content."""

    name: str
    config: Any
    """What its command would be given; of the data stage its section."""
    inputs: tuple[Input, ...]
    key: str
    folder: Path
    seed: int

    @property
    def contents(self) -> dict[str, str]:
        """Path in the configuration → what is there."""
        return {item.path: item.content for item in self.inputs}

    @property
    def produces(self) -> tuple[str, ...]:
        """Folders below `folder` that hold what later stages, and people, use."""
        if self.name == "ppo" and self.config.ppo.ema_decay is not None:
            return ("model", "model_ema")
        return {"data": ("sets",), "eval": ()}.get(self.name, ("model",))


@dataclass(frozen=True)
class State:
    """How far a stage is."""

    word: str
    """`new`, `begun` (nothing to continue from), `resume`, `written` (all but its lineage), `done`."""
    step: int = 0

    def __str__(self) -> str:
        return {"resume": f"resume from step {self.step}", "begun": "begun, starts again"}.get(self.word, self.word)


def files_of(found: Interpolation, sets: DataStage, folder: Path) -> list[Path]:
    """The files of a set (a part) below the folder of all sets, one for each of its sources."""
    name, _, part = found.output.partition(".")
    wanted = next(item for item in sets.sets if item.name == name)
    return [folder / set_path(name, part, number) for number in range(len(wanted.sources))]


class Planner:
    """Resolves a pipeline stage by stage, in the order in which they run."""

    def __init__(self, pipeline: PipelineConfig, hashes: ContentHashes) -> None:
        self._pipeline = pipeline
        self._hashes = hashes
        self._made: dict[str, tuple[str, Interpolation]] = {}
        """Path → what an earlier stage puts there, and its reference."""
        self._folders: dict[str, Path] = {}
        self._errors: list[RlhfDistError] = []

    def plan(self) -> list[Stage]:
        """All stages.

        Raises:
            RlhfDistError: files or models that are not there; all of them in one message.
        """
        stages = [
            self._data(section) if name == "data" else self._stage(name)
            for name, section in self._pipeline.stages.items()
        ]
        raise_together(self._errors)
        return stages

    def _stage(self, name: str) -> Stage:
        config = stage_config(self._pipeline, name, self._locate, self._pipeline.run_dir)
        inputs = tuple(self._input(*found) for found in _paths(config))
        decides = identity(config, {item.path: item.content for item in inputs})
        key = sha256_of_json({"stage": name, "config": decides})
        folder = self._folder(name, key)
        stage = Stage(name, config.model_copy(update={"run_dir": folder}), inputs, key, folder, config.seed)
        for output in stage.produces:
            self._made[str(folder / output)] = (f"{name}:{key}/{output}", Interpolation(name, output))
        return stage

    def _data(self, section: DataStage) -> Stage:
        seed = self._pipeline.seed if section.seed is None else section.seed
        inputs = tuple(self._input(*found) for found in _paths(section))
        contents = {item.path: item.content for item in inputs}
        keys = {}
        for wanted in section.sets:
            drawn = {"seed": seed} if wanted.parts else {}
            keys[wanted.name] = sha256_of_json({"set": identity(wanted, contents)} | drawn)
        key = sha256_of_json({"stage": "data", "sets": keys})
        folder = self._folder("data", key)
        for wanted in section.sets:
            for part in wanted.parts or ("",):
                made = Interpolation("data", f"{wanted.name}.{part}" if part else wanted.name)
                for number, path in enumerate(files_of(made, section, folder / "sets")):
                    # By the set, not by the whole stage: a set that did not change makes nothing run again.
                    self._made[str(path)] = (f"data:{keys[wanted.name]}/{part}/{number}", made)
        return Stage("data", section, inputs, key, folder, seed)

    def _folder(self, name: str, key: str) -> Path:
        number = STAGES.index(name) + 1
        self._folders[name] = self._pipeline.run_dir / f"{number:02d}_{name}-{key[:KEY_LENGTH]}"
        return self._folders[name]

    def _locate(self, found: Interpolation) -> list[Path]:
        return [Path(path) for path, (_, made) in self._made.items() if made == found]

    def _input(self, place: str, path: str, source: DataSource | None) -> Input:
        if path in self._made:
            content, made_by = self._made[path]
            return Input(place, path, content, made_by, source)
        try:
            return Input(place, path, content_of(place, path, source, self._hashes), None, source)
        except RlhfDistError as error:
            self._errors.append(error)
            return Input(place, path, "missing", None, source)


def content_of(place: str, path: str, source: DataSource | None, hashes: ContentHashes) -> str:
    """What is at a path that no stage of the pipeline makes, or under a hub name.

    Raises:
        RlhfDistError: nothing that can be read is there.
    """
    file = Path(path).expanduser()
    if source is not None:
        next(read_rows(source))  # rejects what is not there; fetches a hub name, so that its commit is known
        if not file.exists() and not glob.has_magic(path):
            return f"hub:{path}@{cached_commit(path, 'dataset')}"
    elif place.endswith("model_path"):
        load_model_config(path)
        if not file.is_dir():
            return f"hub:{path}@{cached_commit(path)}"
    if not file.exists() and glob.has_magic(path):
        found = [Path(name) for name in sorted(glob.glob(str(file), recursive=True))]  # noqa: PTH207 (may be absolute)
        return "files:" + ",".join(f"{one.name}@{hashes.file(one)}" for one in found if one.is_file())
    if file.is_dir():
        return f"tree:{hashes.directory(file)}"
    try:
        return f"sha256:{hashes.file(file)}{file.suffix}"  # by its ending a reader knows the format
    except OSError as error:
        raise ConfigError(f"{place} {path} cannot be read ({error.strerror}); name an existing file") from error


def check_unchanged(stage: Stage, hashes: ContentHashes) -> None:
    """Reject a stage whose inputs from outside are not those that its key was made of: hours may have passed.

    Raises:
        RlhfDistError: an input has changed, or is gone.
    """
    for item in stage.inputs:
        if item.made_by is None and content_of(item.place, item.path, item.source, hashes) != item.content:
            raise RunFolderError(
                f"{item.place} {item.path} has changed since this pipeline was started, so the stage would not be what its "
                "folder says. Start the pipeline again: what is done and does not depend on it is skipped."
            )


def _paths(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, DataSource | None]]:
    """(dotted key, path, source) of everything that a configuration reads."""
    for name in type(model).model_fields:
        value, place = getattr(model, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from _paths(value, f"{place}.")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from _paths(item, f"{place}[{i}].")
        elif value is not None and name in ("path", "model_path", "template_path", "ds_config_path"):
            yield place, str(value), model if isinstance(model, DataSource) else None


def raise_together(errors: list[RlhfDistError]) -> None:
    """Raise one error, or one that lists them all (of the class of the first); return when there are none."""
    distinct = {str(error): error for error in errors}
    if len(distinct) == 1:
        raise errors[0]
    if distinct:
        listed = "\n".join(f"- {message}" for message in distinct)
        raise type(errors[0])(f"There are {len(distinct)} problems:\n{listed}")


def state_of(stage: Stage, hashes: ContentHashes) -> State:
    """How far the stage is, by what its folder holds.

    Raises:
        RunFolderError: it is done, but what it wrote is not there any more, or is another's.
    """
    folder = RunFolder(stage.folder)
    lineage = read_lineage(stage.folder)
    if lineage is not None:
        if lineage["key"] != stage.key:
            raise RunFolderError(
                f"{stage.folder} is of key {lineage['key']}, and this stage's is {stage.key}; choose another run_dir"
            )
        check_outputs(stage.folder, lineage, hashes)
        return State("done")
    if not stage.folder.exists():
        return State("new")
    if folder.summary_path.exists():
        for name in stage.produces:
            if not (stage.folder / name).is_dir():
                raise RunFolderError(
                    f"{stage.folder / name} is missing, though the stage has ended. Restore it, or remove {stage.folder} "
                    "to run the stage again."
                )
        return State("written")
    latest = Checkpoints(folder.checkpoints_dir).latest()
    return State("begun") if latest is None else State("resume", step_of(latest))


def warn_of_version(stage: Stage) -> None:
    """Warn of a finished stage of another minor release, which this one might make otherwise."""
    made_by = (read_lineage(stage.folder) or {}).get("code", {}).get("rlhf_dist")
    if made_by is not None and minor_release(made_by) != minor_release(rlhf_dist.__version__):
        log.warning(
            "%s was made by rlhf_dist %s, and this is %s; it is kept. To make it anew, remove %s",
            stage.name, made_by, rlhf_dist.__version__, stage.folder,
        )  # fmt: skip


def check_lineage(stage: Stage, lineages: Mapping[str, Mapping[str, Any]]) -> None:
    """Reject a finished stage whose model came from another run of an earlier stage than the one that is there.

    Only where an earlier stage was removed and run again, and did not end with the same bits.

    Raises:
        RunFolderError: the models differ.
    """
    lineage = read_lineage(stage.folder) or {}
    for model in lineage.get("models", []):
        earlier = lineages.get(model.get("stage") or "")
        if earlier is None:
            continue
        now = {item["output"]: item["sha256"] for item in earlier.get("made", [])}
        if now.get(model["output"]) != model["sha256"]:
            raise RunFolderError(
                f"{stage.folder} was made from another {model['stage']} model (SHA-256 {model['sha256'][:12]}...) than the "
                f"one that is there; remove {stage.folder} to run {stage.name} again"
            )
