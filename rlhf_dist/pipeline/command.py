"""`rlhf-dist pipeline`: data → sft → reward → ppo → eval from one file.

    RUN_DIR/
      01_data-1f0c.../  02_sft-.../  03_reward-.../  04_ppo-.../  05_eval-.../    each an ordinary run folder, and lineage.json
      pipeline.yaml     the resolved configuration of the last call; can be run again
      pipeline.json     each stage's folder, key, state and seconds
      pipeline.lock     held while a pipeline runs here

A folder's name has the key of what the stage is made from, so a changed configuration or input gets a folder of its own
and nothing is overwritten. A stage is done when its lineage is there, which is written last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_dist.config.interpolation import Interpolation
from rlhf_dist.config.load import dump_yaml
from rlhf_dist.core.errors import Preempted, RunFolderError
from rlhf_dist.distributed.group import Session
from rlhf_dist.pipeline.commands import COMMANDS
from rlhf_dist.pipeline.config import PipelineConfig
from rlhf_dist.pipeline.lineage import Lineage, inputs_of, lineage_of
from rlhf_dist.pipeline.preflight import MANIFEST, Preflight, filled
from rlhf_dist.pipeline.stage_config import stage_config
from rlhf_dist.pipeline.stages import (
    Planner,
    Stage,
    State,
    check_lineage,
    check_unchanged,
    files_of,
    state_of,
    warn_of_version,
)
from rlhf_dist.run import preemption
from rlhf_dist.run.console import format_number, print_table
from rlhf_dist.run.launch import open_session
from rlhf_dist.run.lineage import ContentHashes, read_lineage, write_lineage
from rlhf_dist.run.run_folder import RunFolder, write_atomically

Summary = dict[str, Any]
_SCRATCH = ".checking_"
_ENDED = ("done", "written")


def validate(pipeline: PipelineConfig) -> dict[str, Any]:
    """Everything that `run` checks before a stage runs, but for the placement; writes nothing to `run_dir`.

    Returns:
        Each stage's state and key, and the derived numbers of those that have not ended.

    Raises:
        RlhfDistError: what the pipeline would fail with.
    """
    _check_folder(pipeline.run_dir)
    hashes = ContentHashes()
    stages = Planner(pipeline, hashes).plan()
    states = {stage.name: state_of(stage, hashes) for stage in stages}
    with tempfile.TemporaryDirectory() as scratch:
        summary = Preflight(pipeline, stages, states, Path(scratch)).check(session=None)
    found: dict[str, Any] = {}
    for stage in stages:
        found[stage.name] = f"{states[stage.name]}, {stage.folder.name}"
        found |= {f"{stage.name}: {name}": value for name, value in summary.get(stage.name, {}).items()}
    return found


def run(pipeline: PipelineConfig) -> dict[str, Summary]:
    """Run what has not ended yet; returns the summary of every stage.

    Raises:
        Preempted: it was asked to stop; a stage that was at work has written its checkpoint.
        RlhfDistError: what a stage fails with. What is done stays done, and the next call continues from there.
    """
    _check_folder(pipeline.run_dir)
    hashes = ContentHashes(pipeline.run_dir / ".hashes.json")
    stages = Planner(pipeline, hashes).plan()
    with _locked(pipeline.run_dir):
        for left in pipeline.run_dir.glob(f"{_SCRATCH}*"):  # of a process that was killed while it checked
            shutil.rmtree(left)
        states = {stage.name: state_of(stage, hashes) for stage in stages}
        rows = [(s.name, str(states[s.name]), s.key, s.folder.name) for s in stages]
        print_table(f"pipeline: {pipeline.run_dir}", rows, header=("stage", "state", "key", "folder"))
        write_atomically(pipeline.run_dir / "pipeline.yaml", dump_yaml(pipeline))
        runner = _Runner(pipeline, stages, states, hashes)
        hashes.save()
        runner.run()
    header = ("stage", "state", "seconds", "result", "folder")
    print_table("pipeline: all stages are done", runner.rows(), header=header)
    return runner.summaries


class _Runner:
    """Runs the stages in order, in one session, and keeps pipeline.json true."""

    def __init__(
        self, pipeline: PipelineConfig, stages: Sequence[Stage], states: Mapping[str, State], hashes: ContentHashes
    ) -> None:
        self._pipeline = pipeline
        self._stages = list(stages)
        self._states = states
        self._hashes = hashes
        self._lineages: dict[str, Lineage] = {}
        self.summaries: dict[str, Summary] = {}
        self._record: dict[str, dict[str, Any]] = {
            s.name: {"folder": s.folder.name, "key": s.key, "state": str(states[s.name]), "seconds": None}
            for s in stages
        }

    def run(self) -> None:
        """To the end, or to the first error."""
        with contextlib.ExitStack() as stack:
            session, preflight = None, None
            if any(state.word not in _ENDED for state in self._states.values()):
                session = open_session(self._pipeline)  # pyright: ignore[reportArgumentType]
                stack.callback(session.close)
                scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=self._pipeline.run_dir))
                preflight = Preflight(self._pipeline, self._stages, self._states, Path(scratch))
                preflight.check(session)
            for stage in self._stages:
                with self._noted(stage):
                    self._one(stage, preflight, session)

    def _one(self, stage: Stage, preflight: Preflight | None, session: Session | None) -> None:
        state = self._states[stage.name]
        if state.word == "done":
            check_lineage(stage, self._lineages)
            warn_of_version(stage)
        elif state.word == "written":
            self._end(stage, stage.folder, inputs_of(stage, self._lineages))
        else:
            assert preflight is not None
            assert session is not None
            if preemption.requested():
                raise Preempted(
                    f"The pipeline stopped before {stage.name}, as it was asked to (SIGUSR1). The same command continues "
                    "from there."
                )
            check_unchanged(stage, self._hashes)
            inputs = inputs_of(stage, self._lineages)
            if stage.name == "data":
                self._data(stage, preflight, inputs)
            else:
                self._train(stage, session, inputs)
        self._lineages[stage.name] = read_lineage(stage.folder) or {}
        self.summaries[stage.name] = json.loads((stage.folder / "summary.json").read_text(encoding="utf-8"))

    def _train(self, stage: Stage, session: Session, inputs: Lineage) -> None:
        started = time.perf_counter()
        config = stage_config(self._pipeline, stage.name, self._locate, stage.folder)
        if stage.name == "eval":
            # It has no checkpoints: what an evaluation that was cut off left is of no use.
            config = config.model_copy(update={"overwrite": stage.folder.exists()})
        command = COMMANDS[stage.name]
        command.run(config, session, dataclasses.replace(command.prepare(config), contents=stage.contents))
        step = self._states[stage.name].step or None
        self._end(stage, stage.folder, inputs, time.perf_counter() - started, step)

    def _data(self, stage: Stage, preflight: Preflight, inputs: Lineage) -> None:
        """The sets are made already, aside, for the checks: complete their folder, and put it in its place."""
        if stage.folder.exists():
            raise RunFolderError(f"{stage.folder} is there but not whole; remove it, and it is made again")
        made = preflight.data
        folder = RunFolder(made)
        folder.write_config(dump_yaml(stage.config))
        manifest = json.loads((made / MANIFEST).read_text(encoding="utf-8"))
        folder.write_summary({name: {k: v[k] for k in ("records", "skipped")} for name, v in manifest.items()})
        self._end(stage, made, inputs, preflight.data_seconds)
        made.rename(stage.folder)

    def _end(
        self,
        stage: Stage,
        folder: Path,
        inputs: Lineage,
        seconds: float | None = None,
        resumed_step: int | None = None,
    ) -> None:
        seconds = None if seconds is None else round(seconds, 2)
        lineage = lineage_of(stage, folder, inputs, self._lineages, self._hashes, seconds, resumed_step)
        write_lineage(folder, lineage)
        self._hashes.save()

    def _locate(self, found: Interpolation) -> list[Path]:
        stage = next(stage for stage in self._stages if stage.name == found.stage)
        if found.stage == "data":
            return filled(files_of(found, stage.config, stage.folder / "sets"))
        return [stage.folder / found.output]

    @contextlib.contextmanager
    def _noted(self, stage: Stage) -> Iterator[None]:
        note = self._record[stage.name]
        ended = self._states[stage.name].word in _ENDED
        if not ended:
            self._note(note, state="running")
        try:
            yield
        except BaseException as error:  # Ctrl-C and preemption, too: the record says why it goes no further
            self._note(note, state="stopped", reason=f"{type(error).__name__}: {error}")
            raise
        self._note(note, state="done", seconds=self._lineages[stage.name].get("seconds"))

    def _note(self, note: dict[str, Any], **values: Any) -> None:
        note.update(values)
        record = {"stages": self._record, "process": os.getpid(), "host": socket.gethostname()}
        write_atomically(self._pipeline.run_dir / "pipeline.json", json.dumps(record, indent=2) + "\n")

    def rows(self) -> list[tuple[str, ...]]:
        """What became of each stage, for the table at the end."""
        did = {"done": "skipped, done before", "written": "done before", "resume": "resumed, done"}
        return [
            (
                s.name,
                did.get(self._states[s.name].word, "done"),
                format_number(self._record[s.name]["seconds"] or 0),
                headline(self.summaries[s.name]),
                s.folder.name,
            )
            for s in self._stages
        ]


def headline(summary: Mapping[str, Any]) -> str:
    """The first number of a summary before and after, or the first of each part of it."""
    before, after = summary.get("before"), summary.get("after")
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        name = next((name for name in after if name in before and not name.startswith("num_")), None)
        return f"{name} {format_number(before[name])} → {format_number(after[name])}" if name else ""
    parts = [(part, numbers) for part, numbers in summary.items() if isinstance(numbers, Mapping)]
    firsts = [
        (part, next((item for item in numbers.items() if not item[0].startswith("num_")), None))
        for part, numbers in parts
    ]
    return "; ".join(f"{part}: {first[0]} {format_number(first[1])}" for part, first in firsts if first)


def _check_folder(run_dir: Path) -> None:
    """Reject a folder that holds something else."""
    if run_dir.exists() and not run_dir.is_dir():
        raise RunFolderError(f"run_dir {run_dir} is a file; a pipeline needs a folder. Choose another run_dir.")
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / "pipeline.lock").exists():
        raise RunFolderError(
            f"run_dir {run_dir} is not empty and holds no pipeline (there is no pipeline.lock in it). Choose another run_dir; "
            "the stages get folders of their own in it."
        )


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder for this process. The system lets go of the lock when the process ends, however it ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / "pipeline.lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"run_dir {run_dir} cannot be written ({error.strerror}); choose another run_dir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunFolderError(
                f"another pipeline runs in {run_dir} ({file.read().strip() or 'it has not said where'}); wait for it, end it, "
                "or choose another run_dir"
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"{run_dir / 'pipeline.lock'} cannot be locked ({error.strerror}), so that a second pipeline there would not "
                "be noticed; choose another run_dir, on storage with file locks (NFS: with its lock service)"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
