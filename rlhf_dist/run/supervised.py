"""The supervised loop: draw a batch, take a step, now and then evaluate. SFT and the reward model are two tasks of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_dist.config.hosting import TrainedModel
from rlhf_dist.config.supervised import SupervisedSettings
from rlhf_dist.core.errors import ConfigError, SampleError
from rlhf_dist.core.roles import Trained
from rlhf_dist.core.steps import UpdateReport
from rlhf_dist.data.sampler import TRAINING_ORDER, EpochSampler, LengthGroupedSampler, Sampler
from rlhf_dist.run.checkpoint import Checkpoints
from rlhf_dist.run.checks import check_ds_config, check_ranks
from rlhf_dist.run.failures import sample_dump
from rlhf_dist.run.run import Run

MAX_LINES = 20
"""Lines a supervised run prints, whatever its length; every step is in metrics.jsonl."""


class Task(Protocol):
    """What differs between supervised runs."""

    train: Any

    @property
    def model(self) -> Trained:
        """The model under training."""
        ...

    def update(self, step: int, indices: torch.Tensor) -> Future[UpdateReport]:
        """Optimizer step `step` on these training records."""
        ...

    def drawn(self, step: int, indices: torch.Tensor) -> dict[str, tuple[Any, torch.Tensor]]:
        """Loss term → the set that it takes its rows from in that step, and their numbers in it."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out records; empty when there are none."""
        ...


def num_steps(settings: SupervisedSettings, num_records: int, section: str) -> int:
    """Optimizer steps of the run.

    Raises:
        ConfigError: a batch is larger than the training set.
    """
    if settings.batch_size > num_records:
        raise ConfigError(
            f"{section}.batch_size is {settings.batch_size} but the training set has {num_records} records; lower it to at "
            f"most {num_records}, or add data"
        )
    return settings.num_steps or max(1, math.ceil(settings.num_epochs * num_records / settings.batch_size))


@dataclass(frozen=True)
class Schedule:
    """Which training records each optimizer step of a supervised run takes, and how many steps there are."""

    sampler: Sampler
    num_steps: int
    records_per_epoch: int

    @classmethod
    def of(
        cls,
        settings: SupervisedSettings,
        section: str,
        train: Any,
        model: TrainedModel,
        seed: int,
        order: Sampler | None,
    ) -> Schedule:
        """The schedule of a training set.

        Args:
            settings: batch size, epochs or steps, grouping by length.
            section: the configuration's section that `settings` are, for messages.
            train: the training set.
            model: the trained model.
            seed: of the run.
            order: of the training records; None: all of them, shuffled anew each epoch.

        Raises:
            ConfigError: a DeepSpeed file, number of ranks or number of steps that does not fit.
        """
        check_ds_config(model)
        check_ranks(settings.batch_size, model.num_ranks, f"{section}.batch_size", "model")
        sampler = order or EpochSampler(len(train), seed, TRAINING_ORDER)
        epoch = sampler.num_items
        steps = num_steps(settings, epoch, section)
        if settings.group_by_length:
            stream = f"{TRAINING_ORDER}/by length"
            sampler = LengthGroupedSampler(sampler, train.longest, settings.batch_size, seed, stream)
        return cls(sampler, steps, epoch)

    def describe(self, settings: SupervisedSettings, *, mixed: bool) -> dict[str, Any]:
        """Its part of the run summary."""
        return {
            **({"records of an epoch": self.records_per_epoch} if mixed else {}),
            "optimizer steps": self.num_steps,
            "records a step": settings.batch_size,
            "epochs": round(self.num_steps * settings.batch_size / self.records_per_epoch, 3),
        }


class SupervisedTrainer:
    """Runs a task for a number of steps, resuming where a checkpoint left off."""

    def __init__(
        self,
        run: Run,
        task: Task,
        settings: SupervisedSettings,
        schedule: Schedule,
        checkpoints: Checkpoints,
        decode: Callable[[Tensor], str] | None = None,
    ) -> None:
        """`decode`: [n] token ids → text, for the samples of an aborted step."""
        self.run_log = run
        self.decode = decode
        self.task = task
        self.settings = settings
        self.total_steps = schedule.num_steps
        self.checkpoints = checkpoints
        self.sampler = schedule.sampler

    def run(self, resume: bool) -> dict[str, Any]:
        """Train to the end; returns the summary."""
        latest = self.checkpoints.latest() if resume else None
        if latest is not None:
            state = self.checkpoints.load(latest, {"model": self.task.model})
            step, before = state["step"], state["before"]
        else:
            step, before = 0, self.task.evaluate()
            self.run_log.log(0, before)
        after = before if step < self.total_steps else self.task.evaluate()
        with self.run_log.progress("step", total=self.total_steps, completed=step, max_lines=MAX_LINES):
            while step < self.total_steps:
                metrics = self._step(step)
                step += 1
                if step == self.total_steps or _due(step, self.settings.eval_every_steps):
                    after = self.task.evaluate()
                    metrics |= after
                self.run_log.log(step, metrics)
                models = {"model": self.task.model}
                self.run_log.checkpoint(self.checkpoints, step, {"before": before}, models, total=self.total_steps)
        return {"num_steps": step, "before": _short(before), "after": _short(after)}

    def _step(self, step: int) -> dict[str, float]:
        with self.run_log.phase("update"):
            indices = self.sampler.indices(step * self.settings.batch_size, self.settings.batch_size)
            try:
                report = self.task.update(step, indices).result()
            except SampleError as error:
                raise self.run_log.aborted(step + 1, error, self._dump(error, step, indices)) from error
        return {**report.metrics, **self.run_log.take_times()}

    def _dump(self, error: SampleError, step: int, indices: torch.Tensor) -> list[dict[str, Any]]:
        """The training records that a step was aborted for, with their numbers in the set that they are from."""
        drawn = self.task.drawn(step, indices)
        dump: list[dict[str, Any]] = []
        for source, rows in error.rows.items():
            dataset, numbers = drawn[source]
            samples = sample_dump(source, dataset.batch(numbers), rows, self.decode)
            dump += [{"record": int(numbers[row["row"]]), **row} for row in samples]
        return dump


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _short(metrics: dict[str, float]) -> dict[str, float]:
    """`sft/eval_loss` → `eval_loss`."""
    return {name.partition("/")[2]: value for name, value in metrics.items()}
