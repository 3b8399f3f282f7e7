"""Runs, data and trainers for these tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_dist.config.hosting import CheckpointConfig, RunConfig
from rlhf_dist.data.bad_rows import DataReport
from rlhf_dist.data.datasets import PromptDataset, Ragged, SequenceDataset
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.scoring import Precisions
from rlhf_dist.ppo.trainer import PPOData, PPORoles, PPOTrainer
from rlhf_dist.run.checkpoint import Checkpoints
from rlhf_dist.run.run import Run
from rlhf_dist.run.run_folder import RunFolder
from rlhf_dist.run.trackers import read_metrics
from support.roles import FakePolicy, FakeReference, FakeReward, FakeRollout, FakeValue, FakeWeightSync
from support.tiny import random_rows


@contextlib.contextmanager
def open_run(
    path: Path, resumed_step: int | None = None, stop_requested: Callable[[], bool] = lambda: False
) -> Iterator[Run]:
    """A real run with its folder and metrics file."""
    folder = RunFolder.open(path, resume=True, overwrite=False)
    folder.write_config("seed: 3\n")
    with Run.open(RunConfig(run_dir=path, seed=3), folder, resumed_step, stop_requested) as run:
        yield run


def metrics(path: Path) -> dict[int, dict[str, float]]:
    """Step → metrics that read no clock."""
    lines = read_metrics(path / "metrics.jsonl")
    return {
        step: {name: value for name, value in values.items() if not name.startswith(("time/", "throughput/"))}
        for step, values in lines
    }


def prompts(num: int, seed: int = 0) -> PromptDataset:
    """Prompts of 2 to 5 tokens."""
    rows = [row.tolist() for row in random_rows([2 + i % 4 for i in range(num)], seed)]
    return PromptDataset(Ragged(rows), [f"prompt {i}" for i in range(num)], DataReport())


def texts(num: int) -> SequenceDataset:
    """Texts of 3 to 6 tokens."""
    rows = [row.tolist() for row in random_rows([3 + i % 4 for i in range(num)], 9)]
    return SequenceDataset(
        Ragged(rows), Ragged([[False] + [True] * (len(row) - 1) for row in rows], np.bool_), DataReport()
    )


def decode(tokens: torch.Tensor) -> str:
    """Token ids as text."""
    return " ".join(str(token) for token in tokens.tolist())


PRECISIONS = Precisions(rollout="fp32")


class PPO:
    """A trainer with fake roles that share one list of events."""

    def __init__(
        self,
        run: Run,
        settings: PPOSettings,
        *,
        eval_prompts: Any = None,
        ptx: Any = None,
        rollout: type[FakeRollout] = FakeRollout,
        precisions: Precisions = PRECISIONS,
        **options: Any,
    ) -> None:
        """`options`: further arguments of the trainer."""
        self.events: list[tuple[Any, ...]] = []
        self.policy, self.value = FakePolicy(self.events, "policy"), FakeValue(self.events, "value")
        self.rollout = rollout(self.events, self.policy)
        roles = PPORoles(
            policy=self.policy,
            reference=FakeReference(self.events, "reference"),
            reward=FakeReward(self.events, "reward"),
            value=self.value,
            rollout=self.rollout,
            weight_sync=FakeWeightSync(self.events, self.policy, self.rollout),
        )
        data = PPOData(prompts(10), eval_prompts, ptx, decode)
        checkpoints = Checkpoints(run.folder.checkpoints_dir, CheckpointConfig(every_steps=2, at_end=False))
        self.trainer = PPOTrainer(
            run,
            roles,
            data,
            settings,
            checkpoints,
            max_response_tokens=4,
            precisions=precisions,
            **options,
        )
