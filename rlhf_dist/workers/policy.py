"""The policy under PPO."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from rlhf_dist.algo.losses import Sums, policy_loss
from rlhf_dist.algo.masking import masked_sum
from rlhf_dist.batches import Experience, RolloutBatch, StepReport, StepShare, TokenBatch
from rlhf_dist.config import TrainedModel
from rlhf_dist.engine.distributed import RankContext
from rlhf_dist.engine.train import LossTerm
from rlhf_dist.models.forward import response_target_mask, scatter_responses
from rlhf_dist.models.loading import without_dropout
from rlhf_dist.weight_sync.buckets import WeightSource
from rlhf_dist.workers.language_model import LanguageModelWorker
from rlhf_dist.workers.passes import IDLE_EXPERIENCE, MicroBatches, pick, response_logprobs


class PolicyWorker(LanguageModelWorker):
    """π_RL: log-probs of responses, the clipped update with its PTX term, and the source of the weights of rollouts."""

    def __init__(
        self,
        config: TrainedModel,
        context: RankContext,
        num_steps: int,
        *,
        temperature: float,
        clip_range: float,
        ptx_coef: float,
        template_path: Path | None = None,
    ) -> None:
        super().__init__(config, context, num_steps, template_path)
        without_dropout(self.model)
        self.temperature = temperature
        self.clip_range = clip_range
        self.ptx_coef = ptx_coef
        self.weights = WeightSource(self.model)

    def logprobs(self, rollout: RolloutBatch, micro_batches: MicroBatches) -> Tensor:
        """[rows, R] log-probs of the response tokens, 0 on padding."""
        return response_logprobs(self.engine, rollout, micro_batches, self.temperature)

    def update_ppo(
        self, experience: Experience, steps: list[StepShare], ptx: list[TokenBatch] | None
    ) -> list[StepReport]:
        """One optimiser step an entry of `steps`."""
        reports = []
        for i, step in enumerate(steps):
            terms = [
                LossTerm(
                    "ppo",
                    pick(experience, step.micro_batches),
                    self._ppo_loss,
                    IDLE_EXPERIENCE,
                    step.num_tokens,
                )
            ]
            if ptx is not None:
                micro_batches = pick(ptx[i], step.ptx_micro_batches)
                terms.append(self.nll_term("ptx", micro_batches, step.num_ptx_targets, self.ptx_coef))
            reports.append(self.engine.step(terms))
        return reports

    def num_buckets(self) -> int:
        """How many weight buckets hold the model."""
        return self.weights.num_buckets

    def export_bucket(self, index: int) -> dict[str, Tensor] | None:
        """A bucket of whole parameters on rank 0, None elsewhere; in order from 0."""
        is_sender = self.context.rank == 0
        bucket = self.weights.bucket(index, wanted=is_sender)
        return bucket if is_sender else None

    def export_checksum(self) -> int:
        """Checksum of what was sent since bucket 0."""
        return self.weights.checksum()

    def _ppo_loss(self, batch: Experience) -> tuple[Tensor, Sums]:
        targets = response_target_mask(batch.prompt_lengths, batch.response_lengths, batch.tokens.shape[1])
        logprobs, entropy = self.engine(batch.tokens, batch.lengths, targets, self.temperature, True)
        mask = batch.response_mask
        loss, sums = policy_loss(
            scatter_responses(logprobs, mask), batch.old_logprobs, batch.advantages, mask, self.clip_range
        )
        sums["entropy"] = masked_sum(scatter_responses(entropy.detach(), mask), mask)
        return loss, sums
