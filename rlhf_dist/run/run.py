"""A run as its trainer sees it: the seed, where metrics and samples go, the clock, and the progress on the terminal."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from typing_extensions import Self

from rlhf_dist.config.hosting import HostedRun
from rlhf_dist.core.errors import Preempted, SampleError
from rlhf_dist.core.json_lines import json_line
from rlhf_dist.core.roles import Checkpointed, Trained
from rlhf_dist.run.checkpoint import Checkpoints
from rlhf_dist.run.console import RunProgress
from rlhf_dist.run.disk import full_disk_named
from rlhf_dist.run.observing import optional
from rlhf_dist.run.run_folder import RunFolder, replace_folder, write_atomically
from rlhf_dist.run.trackers import Tracker

MODEL = "model"
"""Folder of the result in Hugging Face format."""

LINE_METRICS = (
    "sft/loss",
    "sft/pretraining_loss",
    "sft/eval_loss",
    "sft/eval_pretraining_loss",
    "reward_model/loss",
    "reward_model/accuracy",
    "reward_model/eval_accuracy",
    "reward/score_mean",
    "eval/score_mean",
    "kl/ref_mean",
    "rollout/response_length_mean",
    "policy/approx_kl",
    "policy/clip_fraction",
    "policy/ptx_loss",
    "value/explained_variance",
    "time/step_s",
)
"""What the line of an iteration shows, in this order, of what was measured."""


class Run:
    """Facade over run folder, trackers and console."""

    def __init__(
        self, config: HostedRun, folder: RunFolder, tracker: Tracker, stop_requested: Callable[[], bool]
    ) -> None:
        """`stop_requested`: whether the run is to end after the present step."""
        self.stop_requested = stop_requested
        self.seed = config.seed
        self.num_samples = config.tracking.num_samples
        self.folder = folder
        self._tracker = tracker
        self._progress: RunProgress | None = None
        self._line_every = 1
        self._times: dict[str, float] = {}
        self._started = time.perf_counter()

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        config: HostedRun,
        folder: RunFolder,
        resumed_step: int | None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> Iterator[Self]:
        """A run whose trackers are closed on leaving, however that happens."""
        tracker = Tracker(
            folder, config.tracking, resumed_step=resumed_step, config=config.model_dump(mode="json", exclude_none=True)
        )
        try:
            yield cls(config, folder, tracker, stop_requested)
        finally:
            tracker.close()

    @contextlib.contextmanager
    def progress(self, description: str, *, total: int, completed: int, max_lines: int | None = None) -> Iterator[None]:
        """A progress bar over `total` steps; `log` advances it. At most about `max_lines` lines are printed."""
        self._line_every = max(1, total // max_lines) if max_lines else 1
        with RunProgress(description, total, completed) as self._progress:
            try:
                yield
            finally:
                self._progress = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show the phase beside the bar, and add its duration to the next step's `time/<name>_s`."""
        started = time.perf_counter()
        with self._progress.phase(name) if self._progress else contextlib.nullcontext():
            yield
        self._times[name] = self._times.get(name, 0.0) + time.perf_counter() - started

    def take_times(self) -> dict[str, float]:
        """`time/<phase>_s` of the phases since the last call, and their sum as `time/step_s`."""
        times, self._times = self._times, {}
        return {f"time/{name}_s": seconds for name, seconds in times.items()} | {"time/step_s": sum(times.values())}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step, once a step."""
        self._tracker.log(step, metrics)
        if self._progress is not None:
            self._progress.advance()
            if step % self._line_every == 0 or any("eval" in name for name in metrics):
                self._progress.line(step, metrics, LINE_METRICS)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record generated samples: prompt, response, score, KL."""
        self._tracker.log_samples(step, rows)

    def log_eval(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep all responses to the held-out prompts: eval/step_XXXXXX.jsonl."""
        folder = self.folder.path / "eval"
        with optional(f"responses of the evaluation at step {step}"):
            folder.mkdir(exist_ok=True)
            lines = [json_line(dict(row)) for row in rows]
            write_atomically(folder / f"step_{step:06d}.jsonl", "".join(lines))

    def aborted(self, step: int, error: SampleError, rows: Sequence[Mapping[str, Any]]) -> SampleError:
        """Write down the samples that step `step` was aborted for, and return the error with the place added."""
        path = self.folder.path / f"aborted_step_{step:06d}.jsonl"
        with optional(f"samples of step {step}"):
            write_atomically(path, "".join(json_line(dict(row)) for row in rows))
            return SampleError(f"{error} Samples: {path}", error.rows, error.step)
        return error

    def checkpoint(
        self,
        checkpoints: Checkpoints,
        step: int,
        state: Mapping[str, Any],
        parts: Mapping[str, Checkpointed],
        *,
        total: int,
    ) -> None:
        """After step `step` of `total`: write a checkpoint where one is due, or where the run was asked to stop.

        Raises:
            Preempted: the run was asked to stop, and its checkpoint is written.
        """
        stop = self.stop_requested() and step < total
        if not stop and not checkpoints.due(step, total):
            return
        path = checkpoints.save(step, state, parts)
        if stop:
            raise Preempted(
                f"The run stopped after step {step} of {total}, as it was asked to (SIGUSR1). Its checkpoint is {path}; the "
                "same command with --resume auto continues from there."
            )

    def save(self, model: Trained, files: Mapping[str, str] = MappingProxyType({})) -> None:
        """Write what the run leaves of its model: model/, with `files` (name → text) beside its own, and adapter/ and the like
        where the model has them. Under a temporary name, renamed when whole, model/ last."""
        temporary = self.folder.path / ".writing_result"
        shutil.rmtree(temporary, ignore_errors=True)
        kept = "The run is done, and its checkpoints are untouched."
        with full_disk_named(temporary, kept):
            model.save(temporary).result()
            for name, text in files.items():
                write_atomically(temporary / MODEL / name, text)
        for written in sorted(temporary.iterdir(), key=lambda path: path.name == MODEL):
            final = self.folder.path / written.name
            replace_folder(written, final)
        temporary.rmdir()

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json; the wall time is the one number in it that a second run does not repeat."""
        summary = {**summary, "seed": self.seed, "wall_time_s": round(time.perf_counter() - self._started, 2)}
        self.folder.write_summary(summary)
        return summary
