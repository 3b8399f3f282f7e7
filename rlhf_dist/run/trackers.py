"""Where metrics and samples are written: metrics.jsonl always, TensorBoard and Weights & Biases by configuration."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rlhf_dist.config.hosting import TrackingConfig
from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.core.json_lines import json_line
from rlhf_dist.run.metrics import check_names, warn_once
from rlhf_dist.run.observing import optional
from rlhf_dist.run.run_folder import RunFolder, write_atomically

log = logging.getLogger(__name__)

_WANDB_INIT_S, _WANDB_LOGIN_S, _WANDB_FINISH_S = 15.0, 10.0, 60.0
"""Longest waits for wandb's servers: a run must never hang on them."""


class _Sink(Protocol):
    """A tracking service besides the files."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Writes what a run measures into its folder, and to the services the configuration names.

    `metrics.jsonl` has one line a step, {"step": n, "metrics": {name: value}}, floats in full precision and null for a
    number that is not finite. After a resume from step n, lines and samples of later steps are cut away first: the file
    of a resumed run equals that of an uninterrupted one but for the metrics that read a clock (`metrics.is_clock`).
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: TrackingConfig,
        *,
        resumed_step: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the files. `resumed_step` is the step of the checkpoint a run continues from; None begins a new run.

        `config` is shown by wandb beside the run.
        """
        self._folder = folder
        self._num_samples = settings.num_samples
        self._last_step = _cut(folder, resumed_step)
        self._file = folder.metrics_path.open("a", encoding="utf-8")
        self._sinks: list[_Sink] = []
        if settings.tensorboard:
            with optional("TensorBoard"):
                self._sinks.append(_TensorBoard(folder.logs_dir / "tensorboard", resumed_step))
        if settings.wandb != "off":
            with optional("wandb"):
                sink = _wandb_sink(folder, settings, resumed_step, dict(config or {}))
                if sink is not None:
                    self._sinks.append(sink)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write all metrics of a step. On disk when this returns.

        A name that is not in the table of metrics.py warns, and so does what is no number, which is not written. Raises
        ValueError for a step that is not after the last one: a step has one line.
        """
        check_names(metrics)
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step}; log all metrics of a step in one call")
        self._last_step = step
        numbers = _numbers(metrics)
        line = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step, "metrics": line}, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for sink in list(self._sinks):
            self._guarded(sink, lambda sink=sink: sink.log(step, numbers))

    def log_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the first `tracking.num_samples` rows (prompt, response, score, kl) to samples/step_XXXXXX.jsonl."""
        with optional(f"samples of step {step}"):
            lines = [json_line(dict(row)) for row, _ in zip(rows, range(self._num_samples))]  # noqa: B905
            if lines:
                write_atomically(self._folder.samples_dir / f"step_{step:06d}.jsonl", "".join(lines))

    def close(self) -> None:
        """Close the files and finish with the services. May be called more than once."""
        self._file.close()
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            self._guarded(sink, sink.close)

    def _guarded(self, sink: _Sink, action: Any) -> None:
        try:
            action()
        except Exception as error:  # A tracking service that fails must not end a run of days.
            log.warning("%s failed (%s) and is switched off for the rest of the run", type(sink).__name__, error)
            if sink in self._sinks:
                self._sinks.remove(sink)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            warn_once(name, f"The metric '{name}' is {value!r}, which is no number; it is not recorded. Log a number.")
    return numbers


def read_metrics(path: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of each whole line of a metrics.jsonl; nan where null was written. Raises RunFolderError."""
    out: list[tuple[int, dict[str, float]]] = []
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], start=1):  # What follows the last newline was never written whole.
        try:
            record = json.loads(line)
            out.append((int(record["step"]), {k: math.nan if v is None else v for k, v in record["metrics"].items()}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(
                f"{path}, line {number}: {line[:80]!r} is not a line of metrics ({error}). Remove the line, or start a "
                "new run folder."
            ) from None
    return out


def _cut(folder: RunFolder, resumed_step: int | None) -> int | None:
    """Remove lines and samples after `resumed_step` (all for None); the last step that stays."""
    last: int | None = None
    if folder.metrics_path.exists():
        keep = 0
        if resumed_step is not None:
            for step, _ in read_metrics(folder.metrics_path):
                if step > resumed_step:
                    break
                keep, last = keep + 1, step
        lines = folder.metrics_path.read_text(encoding="utf-8").split("\n")[:keep]
        write_atomically(folder.metrics_path, "".join(line + "\n" for line in lines))
    for path in folder.samples_dir.glob("step_*.jsonl"):
        if resumed_step is None or int(path.stem.removeprefix("step_")) > resumed_step:
            path.unlink()
    return last


class _TensorBoard:
    def __init__(self, path: Path, resumed_step: int | None) -> None:
        # Imported here: it loads torch, and half of the commands never need it.
        from torch.utils.tensorboard.writer import SummaryWriter

        if resumed_step is None:
            shutil.rmtree(path, ignore_errors=True)
        self._writer = SummaryWriter(str(path), purge_step=None if resumed_step is None else resumed_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_sink(
    folder: RunFolder, settings: TrackingConfig, resumed_step: int | None, config: dict[str, Any]
) -> _Wandb | None:
    """A wandb run of the configured mode; offline where online cannot be had; None where wandb does not start."""
    id_path = folder.logs_dir / "wandb_run_id"
    if resumed_step is None or not id_path.exists():
        write_atomically(id_path, uuid.uuid4().hex[:8])
    try:
        import wandb

        limits: dict[str, Any] = {
            "init_timeout": _WANDB_INIT_S,
            "login_timeout": _WANDB_LOGIN_S,
            "finish_timeout": _WANDB_FINISH_S,
            "silent": True,  # The terminal belongs to the progress bar.
            "console": "off",
        }
        known = wandb.Settings.model_fields  # Older versions know no finish_timeout.
        limits = {name: value for name, value in limits.items() if name in known}
    except Exception as error:
        log.warning("wandb cannot be used (%s); metrics.jsonl has all metrics", error)
        return None
    modes = ("online", "offline") if settings.wandb == "online" else ("offline",)
    for mode in modes:
        try:
            run = wandb.init(
                mode=mode,
                project=settings.wandb_project,
                entity=settings.wandb_entity,
                id=id_path.read_text(encoding="utf-8"),
                resume="allow" if mode == "online" else None,
                name=folder.path.absolute().name,
                dir=str(folder.logs_dir),
                config=config,
                settings=wandb.Settings(**limits),
            )
            return _Wandb(run)
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            then = "writing offline; upload later with `wandb sync`" if mode == "online" else "continuing without wandb"
            log.warning("wandb %s does not start (%s); %s", mode, reason, then)
            # Its service still holds the failed run, and would not write another run of the same id.
            wandb.teardown()
    return None
