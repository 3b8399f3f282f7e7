"""Rollouts of a run, iteration by iteration: draws prompts, has them generated, and hands out responses in order.

One step off policy (`ppo.off_policy_iterations: 1`), the responses of iteration k + 1 are generated while policy and value
learn from those of k:

    engines   | generate k + 1       | sync | generate k + 2       | sync | ...
    trainer   | score k   update k   |      | score k+1 update k+1 |      | ...

They are asked for right behind those of iteration k, hence before the weights of update k are pushed. Engines take calls in
order, so that this order decides which weights generate, and never how long something takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_dist.core.batches import PromptBatch, RolloutBatch, concat_rows
from rlhf_dist.core.errors import TrainingError
from rlhf_dist.core.futures import completed
from rlhf_dist.core.roles import RolloutEngine
from rlhf_dist.data.sampler import EpochSampler
from rlhf_dist.ppo.config import PPOSettings

FILE = "rollouts.safetensors"
NUM_PROBES = 4
"""Prompts that policy and engines are compared on after a sync."""


@dataclass(frozen=True)
class Generating:
    """Responses on their way."""

    iteration: int
    policy_version: int
    """Of the weights that generate them."""
    newest_version: int
    """Of the weights that may generate them in place of an engine that died, after an update."""
    parts: Sequence[Future[RolloutBatch]]
    """Of contiguous prompts, in order."""

    def arriving(self) -> Iterator[RolloutBatch]:
        """Each part, as soon as it is there.

        Raises:
            TrainingError: an engine generated with other weights.
        """
        for part in self.parts:
            rollout = part.result()
            if not self.policy_version <= rollout.policy_version <= self.newest_version:
                raise TrainingError(
                    f"responses of iteration {self.iteration} come from weights of version {rollout.policy_version}, not "
                    f"{self.policy_version}: an engine missed a sync or took calls out of order. Resume with --resume auto; "
                    "report it if it comes again"
                )
            yield rollout


class Rollouts:
    """What is generated, and what is generated ahead. The latter is part of a checkpoint."""

    def __init__(
        self, engine: RolloutEngine, prompts: Any, settings: PPOSettings, seed: int, num_chunks: int = 1
    ) -> None:
        """`prompts`: the data set; `num_chunks`: parts that an iteration is generated in."""
        self.engine = engine
        self.prompts = prompts
        self.settings = settings
        self.num_chunks = num_chunks
        self.sampler = EpochSampler(len(prompts), seed, "prompts")
        self.ahead: Generating | None = None

    def take(self, iteration: int) -> Generating:
        """The responses of `iteration`; off policy, those of the next are asked for right behind them."""
        version = self.settings.policy_version(iteration)
        now, self.ahead = self.ahead or self._generate(iteration, version, version), None
        if now.iteration != iteration:
            raise ValueError(f"responses of iteration {now.iteration} come before those of iteration {iteration}")
        if self.settings.off_policy_iterations and iteration + 1 < self.settings.num_iterations:
            self.ahead = self._generate(iteration + 1, version, self.settings.policy_version(iteration + 1))
        return now

    def draw_prompts(self, iteration: int) -> PromptBatch:
        """The iteration's prompts, each repeated `responses_per_prompt` times."""
        num, repeats = self.settings.prompts_per_iteration, self.settings.responses_per_prompt
        indices = self.sampler.indices(iteration * num, num).repeat_interleave(repeats)
        return self.prompts.batch(indices, sample_ids=torch.arange(num * repeats))

    def probe_prompts(self) -> PromptBatch:
        """The same few prompts every time."""
        few = torch.arange(min(NUM_PROBES, len(self.prompts)))
        return self.prompts.batch(few, sample_ids=few)

    def _generate(self, iteration: int, policy_version: int, newest_version: int) -> Generating:
        prompts = self.draw_prompts(iteration)
        parts = [prompts.rows(rows) for rows in self._chunks(len(prompts))]
        calls = [self.engine.generate(part, stream="rollout", iteration=iteration) for part in parts]
        return Generating(iteration, policy_version, newest_version, calls)

    def _chunks(self, num_rows: int) -> list[Tensor]:
        """Contiguous row numbers of each part; none is empty."""
        return list(torch.arange(num_rows).tensor_split(min(self.num_chunks, num_rows)))

    def save_checkpoint(self, path: Path) -> Future[None]:
        """See `roles.Checkpointed`: waits for what is generated ahead and writes it to `path`/rollouts.safetensors; without a
        tensor where there is nothing, as after the last iteration."""
        path.mkdir(parents=True)
        tensors, metadata = {}, None
        if self.ahead is not None:
            batch = concat_rows(list(self.ahead.arriving()))
            values = {f.name: getattr(batch, f.name) for f in fields(batch)}
            tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
            metadata = {"iteration": str(self.ahead.iteration), "policy_version": str(batch.policy_version)}
        save_file(tensors, path / FILE, metadata)
        return completed(None)

    def load_checkpoint(self, path: Path) -> Future[None]:
        """See `roles.Checkpointed`."""
        with safe_open(path / FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata()
        self.ahead = None
        if tensors:
            version = int(metadata["policy_version"])
            batch = RolloutBatch(**tensors, policy_version=version)
            parts = [completed(batch.rows(rows)) for rows in self._chunks(len(batch))]
            self.ahead = Generating(int(metadata["iteration"]), version, version, parts)
        return completed(None)
