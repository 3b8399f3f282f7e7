"""The value function V (critic) under PPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_dist.config.hosting import TrainedModel
from rlhf_dist.core.batches import Experience, RolloutBatch
from rlhf_dist.core.losses import Sums
from rlhf_dist.core.steps import StepReport, StepShare
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.deepspeed.train import LossTerm
from rlhf_dist.distributed.workers.inference import IDLE_EXPERIENCE, MicroBatches, pick, response_values
from rlhf_dist.distributed.workers.trained import TrainedWorker, build_scalar_model
from rlhf_dist.models.forward import state_values
from rlhf_dist.models.loading import without_dropout
from rlhf_dist.ppo.losses import value_loss


class ValueWorker(TrainedWorker):
    """V(state before each response token)."""

    def __init__(
        self,
        config: TrainedModel,
        context: RankContext,
        num_steps: int,
        *,
        clip_range: float | None,
        tokenizer_path: str | None = None,
        template_path: Path | None = None,
    ) -> None:
        tokenizer: Any = load_tokenizer(tokenizer_path or config.model_path, template_path)
        module = build_scalar_model(config, context, tokenizer)
        super().__init__(module, config, context, num_steps, tokenizer)
        without_dropout(self.model)
        self.clip_range = clip_range

    def values(self, rollout: RolloutBatch, micro_batches: MicroBatches) -> Tensor:
        """[rows, R + 1] fp32 values of the states before each response token and after the last, 0 on padding."""
        return response_values(self.engine, rollout, micro_batches)

    def update(self, experience: Experience, steps: list[StepShare]) -> list[StepReport]:
        """One optimizer step an entry of `steps`, up to one that is aborted."""
        reports = []
        for step in steps:
            micro_batches = pick(experience, step.micro_batches)
            term = LossTerm("value", micro_batches, self._value_loss, IDLE_EXPERIENCE, step.num_tokens)
            reports.append(self.engine.step([term]))
            if reports[-1].aborted:
                break
        return reports

    def _value_loss(self, batch: Experience) -> tuple[Tensor, Sums]:
        scalars = self.engine(batch.tokens, batch.lengths)
        values = state_values(scalars, batch.prompt_lengths, batch.response_mask)
        return value_loss(values, batch.old_values, batch.returns, batch.response_mask, self.clip_range)
