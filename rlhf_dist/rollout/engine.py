"""Generation engines as their users know them: one protocol over `hf` and `vllm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from rlhf_dist.core.batches import PromptBatch, RolloutBatch
from rlhf_dist.core.offload import Level
from rlhf_dist.rollout.config import SamplingConfig


class Engine(Protocol):
    """A causal LM that generates. It holds no state that matters: weights come from elsewhere, draws are counter-based."""

    policy_version: int
    """Version of the weights."""

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingConfig,
        *,
        stream: str,
        iteration: int,
        batches: Sequence[Sequence[int]] | None = None,
    ) -> RolloutBatch:
        """One response a prompt, in their order; each ends at a stop token or text (kept) or at `max_response_tokens`.

        Args:
            stream, iteration: with the engine's seed, a prompt's sample id and the position, what a token is drawn by.
            batches: rows to be generated together, each once; None: all. An engine with continuous batching goes its own way.

        Raises:
            EngineError: the engine failed; another may be started.
        """
        ...

    def load_bucket(self, bucket: dict[str, Tensor]) -> None:
        """Take over some whole parameters, by their names in the policy.

        Raises:
            TrainingError: a name or a shape that the engine's model does not have.
        """
        ...

    def finish_update(self, version: int) -> int:
        """Label the weights after the last bucket; the checksum of what arrived.

        Raises:
            TrainingError: parameters are missing.
        """
        ...

    def hold(self, level: Level) -> None:
        """Hold on the GPU: nothing, the weights (for a sync), or all that generating needs."""
        ...

    def close(self) -> None:
        """Let go of memory and processes."""
        ...
