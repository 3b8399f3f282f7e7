"""A rollout engine with the policy's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf_dist.config.hosting import Precision
from rlhf_dist.core.batches import PromptBatch, RolloutBatch
from rlhf_dist.core.errors import EngineError, TrainingError
from rlhf_dist.core.offload import Level
from rlhf_dist.data.chat_template import stop_token_ids
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.distributed.deepspeed.broadcast import TensorSpec, WeightGroup
from rlhf_dist.distributed.deepspeed.process_group import RankContext, join_part
from rlhf_dist.distributed.workers.inference import MicroBatches
from rlhf_dist.models.generation_config import stop_tokens
from rlhf_dist.models.loading import DTYPES, load_causal_lm, skeleton
from rlhf_dist.models.vocabulary import num_token_ids
from rlhf_dist.rollout.config import RolloutConfig, SamplingConfig
from rlhf_dist.rollout.engine import Engine
from rlhf_dist.rollout.hf import HFEngine

PROBE_TOKENS = 8
"""Of a response that is only generated to compare log-probs."""


class RolloutWorker:
    """Generates with a copy of the policy: one rank of an engine."""

    def __init__(
        self,
        config: RolloutConfig,
        context: RankContext,
        *,
        model_path: str,
        precision: Precision,
        max_length_tokens: int | None = None,
        template_path: Path | None = None,
        takes_turns: bool = False,
    ) -> None:
        """
        Args:
            max_length_tokens: longest prompt and response; None: the model's context.
            takes_turns: gives its memory to other roles and takes it back (`hold`).
        """
        self.config = config
        self.device = context.device
        self.weight_group: WeightGroup | None = None
        tokenizer: Any = load_tokenizer(model_path, template_path)
        self.engine: Engine
        if config.engine == "hf":
            model = load_causal_lm(model_path, DTYPES[precision]).to(torch.device(context.device)).requires_grad_(False)
            self.engine = HFEngine(
                model,
                stop_tokens(model, stop_token_ids(tokenizer)),
                seed=context.seed,
                num_tokens=num_token_ids(tokenizer),
                tokenizer=tokenizer,
            )
            return
        from rlhf_dist.rollout.vllm import VLLMEngine

        tensor_parallel_size = min(config.tensor_parallel_size, context.world_size)
        if tensor_parallel_size > 1:
            join_part(context, tensor_parallel_size)
        model = skeleton(model_path)
        self.engine = VLLMEngine(
            model_path,
            stop_tokens(model, stop_token_ids(tokenizer)),
            {name: parameter.shape for name, parameter in model.named_parameters()},
            precision=precision,
            seed=context.seed,
            device=context.device,
            max_sequences=config.batch_size,
            max_length_tokens=max_length_tokens,
            draws=config.draws,
            num_tokens=num_token_ids(tokenizer),
            tensor_parallel_size=tensor_parallel_size,
            gpu_share=1.0 if takes_turns else config.gpus_per_rank,  # the others are asleep while it generates
            sleeps=takes_turns,
            stop_texts=bool(config.stop),
            options=config.vllm_options,
        )

    def generate(
        self, prompts: PromptBatch, micro_batches: MicroBatches, stream: str, iteration: int
    ) -> RolloutBatch | None:
        """Responses to this rank's prompts, in their order; None when there are none."""
        if not len(prompts):
            return None
        return self.engine.generate(prompts, self.config, stream=stream, iteration=iteration, batches=micro_batches)

    def hold(self, level: Level) -> None:
        """See `Engine.hold`."""
        self.engine.hold(level)

    def probe(self, prompts: PromptBatch) -> RolloutBatch:
        """See `roles.RolloutEngine`."""
        tokens = min(PROBE_TOKENS, self.config.max_response_tokens)
        sampling = SamplingConfig(max_response_tokens=tokens, temperature=self.config.temperature)
        return self.engine.generate(prompts, sampling, stream="probe", iteration=self.engine.policy_version)

    def load_bucket(self, bucket: Any) -> None:
        """Copy a bucket of weights into the model."""
        self.engine.load_bucket(bucket)

    def join_weight_group(self, name: str, rank: int, size: int, timeout_s: float, address: str, port: int) -> None:
        """Meet rank 0 of the policy for broadcasts of weights."""
        self.weight_group = WeightGroup(name, rank, size, self.device, timeout_s, address, port)

    def receive_weights(self, specs: list[list[TensorSpec]]) -> None:
        """Take over all weights from a broadcast.

        Raises:
            EngineError: it broke off, and the engine has some of the new weights.
        """
        if self.weight_group is None:
            raise TrainingError("weights were sent to a rollout engine that has not joined their group")
        try:
            for bucket in self.weight_group.receive(specs):
                self.engine.load_bucket(bucket)
        except RuntimeError as error:
            self.weight_group.close()
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise EngineError(
                f"the broadcast of weights broke off ({reason}); another engine or the policy died"
            ) from error

    def finish_sync(self, version: int) -> tuple[int, int]:
        """Label the weights; returns (version, checksum)."""
        total = self.engine.finish_update(version)
        return self.engine.policy_version, total
