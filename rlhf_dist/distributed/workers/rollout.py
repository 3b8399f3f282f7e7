"""A rollout engine with the policy's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf_dist.config.hosting import Precision
from rlhf_dist.core.batches import PromptBatch, RolloutBatch, concat_rows
from rlhf_dist.data.chat_template import stop_token_ids
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.weight_sync import WeightTarget
from rlhf_dist.distributed.workers.inference import MicroBatches
from rlhf_dist.models.generation_config import stop_tokens
from rlhf_dist.models.loading import DTYPES, load_causal_lm
from rlhf_dist.models.vocabulary import num_token_ids
from rlhf_dist.rollout.config import RolloutConfig
from rlhf_dist.rollout.hf import HFEngine


class RolloutWorker:
    """Generates with a whole copy of the policy; each rank is an engine of its own."""

    def __init__(
        self,
        config: RolloutConfig,
        context: RankContext,
        *,
        model_path: str,
        precision: Precision,
        template_path: Path | None = None,
    ) -> None:
        tokenizer: Any = load_tokenizer(model_path, template_path)
        model = load_causal_lm(model_path, DTYPES[precision]).to(torch.device(context.device)).requires_grad_(False)
        self.engine = HFEngine(
            model,
            stop_tokens(model, stop_token_ids(tokenizer)),
            max_response_tokens=config.max_response_tokens,
            temperature=config.temperature,
            seed=context.seed,
            num_tokens=num_token_ids(tokenizer),
        )
        self.target = WeightTarget(model)
        self.policy_version = 0

    def generate(
        self, prompts: PromptBatch, micro_batches: MicroBatches, stream: str, iteration: int
    ) -> RolloutBatch | None:
        """Responses to this rank's prompts, in their order; None when there are none."""
        parts = [
            self.engine.generate(
                prompts.rows(rows), stream=stream, iteration=iteration, policy_version=self.policy_version
            )
            for rows in micro_batches
            if rows
        ]
        if not parts:
            return None
        order = torch.tensor([row for rows in micro_batches for row in rows])
        return concat_rows(parts).rows(torch.argsort(order))

    def load_bucket(self, bucket: Any) -> None:
        """Copy a bucket of weights into the model."""
        self.target.load_bucket(bucket)

    def finish_sync(self, version: int) -> tuple[int, int]:
        """Label the weights; returns (version, checksum)."""
        total = self.target.finish()
        self.policy_version = version
        return self.policy_version, total
