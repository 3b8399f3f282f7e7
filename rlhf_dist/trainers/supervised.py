"""The supervised loop: draw a batch, take a step, now and then evaluate. SFT and the reward model are two tasks of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_dist.algo.losses import ranked_pairs, ranking_loss
from rlhf_dist.algo.near_ties import pair_margins
from rlhf_dist.batches import PreferenceBatch, UpdateReport
from rlhf_dist.config import SupervisedSettings
from rlhf_dist.data.sampler import TRAINING_ORDER, EpochSampler, Sampler
from rlhf_dist.errors import ConfigError, SampleError
from rlhf_dist.roles import LanguageModel, LanguageModelScorer, PreferenceModel, Trained
from rlhf_dist.trainers.checkpoint import Checkpoints
from rlhf_dist.trainers.failures import sample_dump
from rlhf_dist.trainers.run import Run

EVAL_CHUNK = 512
"""Records of one evaluation call: bounds what the driver sends at once."""


MAX_LINES = 20
"""Lines a supervised run prints, whatever its length; every step is in metrics.jsonl."""


class Task(Protocol):
    """What differs between supervised runs."""

    model: Trained
    train: Any

    def update(self, step: int, indices: torch.Tensor) -> Future[UpdateReport]:
        """Optimiser step `step` on these training records."""
        ...

    def drawn(self, step: int, indices: torch.Tensor) -> dict[str, tuple[Any, torch.Tensor]]:
        """Loss term → the set that it takes its rows from in that step, and their numbers in it."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out records; empty when there are none."""
        ...


@dataclass(frozen=True)
class PretrainingMix:
    """Plain text that every step of an SFT run takes beside its records."""

    train: Any
    eval: Any | None
    per_step: int
    """Sequences in a step."""
    coef: float
    """Weight of the text's mean loss."""
    sampler: Sampler

    def drawn(self, step: int) -> torch.Tensor:
        """[per_step] numbers of the step's sequences."""
        return self.sampler.indices(step * self.per_step, self.per_step)


@dataclass
class SFTTask:
    """Negative log-likelihood of target tokens; of plain text beside them, where there is some."""

    model: LanguageModel
    train: Any
    eval: Any | None
    mix: PretrainingMix | None = None

    def update(self, step: int, indices: torch.Tensor) -> Future[UpdateReport]:
        """See `Task`."""
        batch = self.train.batch(indices)
        if self.mix is None:
            return self.model.update(batch, step)
        return self.model.update(batch, step, self.mix.train.batch(self.mix.drawn(step)), self.mix.coef)

    def drawn(self, step: int, indices: torch.Tensor) -> dict[str, tuple[Any, torch.Tensor]]:
        """See `Task`."""
        return {"lm": (self.train, indices)} | (
            {} if self.mix is None else {"pretraining": (self.mix.train, self.mix.drawn(step))}
        )

    def evaluate(self) -> dict[str, float]:
        """See `nll_metrics`; beside them `sft/eval_pretraining_loss`."""
        metrics = nll_metrics(self.model, self.eval, "sft/eval_loss") if self.eval else {}
        if self.mix is not None and self.mix.eval is not None:
            metrics["sft/eval_pretraining_loss"] = mean_nll(self.model, self.mix.eval)
        return metrics


@dataclass
class RewardTask:
    """Log-sigmoid loss of the pairs of each prompt."""

    model: PreferenceModel
    train: Any
    eval: Any | None
    near_ties_below: float | None = None
    """Margin below which a pair is a near-tie, where these are told apart."""

    def update(self, step: int, indices: torch.Tensor) -> Future[UpdateReport]:
        """See `Task`."""
        return self.model.update(self.train.batch(indices), step)

    def drawn(self, step: int, indices: torch.Tensor) -> dict[str, tuple[Any, torch.Tensor]]:
        """See `Task`."""
        return {"rm": (self.train, indices)}

    def evaluate(self) -> dict[str, float]:
        """See `pair_metrics`."""
        if not self.eval:
            return {}
        return pair_metrics(lambda batch: self.model.score_pairs(batch).result(), self.eval, self.near_ties_below)


def mean_nll(model: LanguageModelScorer, dataset: Any) -> float:
    """Mean negative log-likelihood over all targets of a set, in nats."""
    nll, num_targets = _nll_sums(model, dataset, chunks(len(dataset)))
    return nll / num_targets


def nll_metrics(model: LanguageModelScorer, dataset: Any, name: str) -> dict[str, float]:
    """`name`: nats a target token, over all targets of a set; `name/GROUP`: over those of each group, where it has several."""
    groups = dataset.groups
    if len(groups) < 2:
        return {name: mean_nll(model, dataset)}
    sums = {group: _nll_sums(model, dataset, items.split(EVAL_CHUNK)) for group, items in groups.items()}
    total = [sum(parts) for parts in zip(*sums.values(), strict=True)]
    return {name: total[0] / total[1]} | {f"{name}/{group}": nll / num for group, (nll, num) in sums.items()}


def _nll_sums(model: LanguageModelScorer, dataset: Any, pieces: Iterable[torch.Tensor]) -> tuple[float, float]:
    """Sums of negative log-likelihood and of targets."""
    sums = [model.evaluate(dataset.batch(piece)).result() for piece in pieces]
    return sum(s["nll"] for s in sums), sum(s["num_targets"] for s in sums)


def pair_metrics(
    score_pairs: Callable[[PreferenceBatch], Tensor], dataset: Any, near_ties_below: float | None = None
) -> dict[str, float]:
    """Held-out loss, accuracy (equal scores count one half) and score difference of whatever gives [P, K] scores.

    Means over prompts of each prompt's mean over its pairs. The loss is without margins and centering, so that runs with
    other coefficients, and other models, compare. With `near_ties_below`, also the accuracy of each class of
    `algo/near_ties.py` that has pairs, over the same weights.
    """
    classes = torch.zeros(2, 2, dtype=torch.float64)  # near-ties, clear pairs; of each the right ones and all
    sums = torch.zeros(3, dtype=torch.float64)
    for chunk in chunks(len(dataset)):
        batch: PreferenceBatch = dataset.batch(chunk)
        scores = score_pairs(batch).double()
        loss, pair_sums = ranking_loss(scores, batch.present, ranks=batch.ranks)
        better, worse, weights = ranked_pairs(batch.present, batch.ranks)
        equal = (scores[:, better] == scores[:, worse]) * weights
        sums += torch.stack([loss, pair_sums["accuracy"] + 0.5 * equal.sum(), pair_sums["margin"]])
        if near_ties_below is not None:
            right = (scores[:, better] > scores[:, worse]) * weights + 0.5 * equal
            _, near = pair_margins(batch.ratings, batch.rated, better, worse, near_ties_below)
            classes += torch.stack([torch.stack([(x * c).sum() for x in (right, weights)]) for c in (near, ~near)])
    means = (sums / len(dataset)).tolist()
    names = ("reward_model/eval_loss", "reward_model/eval_accuracy", "reward_model/eval_margin")
    metrics: dict[str, float] = dict(zip(names, means, strict=True))
    for name, (right, total) in zip(("near_tie", "clear"), classes.tolist(), strict=True):
        if total:
            metrics[f"reward_model/eval_{name}_accuracy"] = right / total
    return metrics


def chunks(num: int, size: int = EVAL_CHUNK) -> Iterator[torch.Tensor]:
    """0..num-1 in consecutive pieces."""
    return iter(torch.arange(num).split(size))


def num_steps(settings: SupervisedSettings, num_records: int, section: str) -> int:
    """Optimiser steps of the run.

    Raises:
        ConfigError: a batch is larger than the training set.
    """
    if settings.batch_size > num_records:
        raise ConfigError(
            f"{section}.batch_size is {settings.batch_size} but the training set has {num_records} records; lower it to at "
            f"most {num_records}, or add data"
        )
    return settings.num_steps or max(1, math.ceil(settings.num_epochs * num_records / settings.batch_size))


class SupervisedTrainer:
    """Runs a task for a number of steps, resuming where a checkpoint left off."""

    def __init__(
        self,
        run: Run,
        task: Task,
        settings: SupervisedSettings,
        total_steps: int,
        every_steps: int,
        checkpoints: Checkpoints,
        decode: Callable[[Tensor], str] | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        """`decode`: [n] token ids → text, for the samples of a refused step. `sampler`: which training records a step takes;
        default: `EpochSampler`, shuffled anew each epoch."""
        self.run_log = run
        self.decode = decode
        self.task = task
        self.settings = settings
        self.total_steps = total_steps
        self.every_steps = every_steps
        self.checkpoints = checkpoints
        self.sampler = sampler or EpochSampler(len(task.train), run.seed, TRAINING_ORDER)

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
                self.run_log.checkpoint(
                    self.checkpoints, step, {"before": before}, models, every=self.every_steps, total=self.total_steps
                )
        return {"num_steps": step, "before": _short(before), "after": _short(after)}

    def _step(self, step: int) -> dict[str, float]:
        with self.run_log.phase("update"):
            indices = self.sampler.indices(step * self.settings.batch_size, self.settings.batch_size)
            try:
                report = self.task.update(step, indices).result()
            except SampleError as error:
                raise self.run_log.refused(step + 1, error, self._dump(error, step, indices)) from error
        return {**report.metrics, **self.run_log.take_times()}

    def _dump(self, error: SampleError, step: int, indices: torch.Tensor) -> list[dict[str, Any]]:
        """The training records that a step was refused for, with their numbers in the set that they are from."""
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
