"""The policy under PPO."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from rlhf_dist.config.hosting import Precision, TrainedModel
from rlhf_dist.core.batches import Experience, RolloutBatch, TokenBatch
from rlhf_dist.core.losses import Sums
from rlhf_dist.core.steps import EARLY_STOP_KL, StepReport, StepShare
from rlhf_dist.distributed.deepspeed import process_group as distributed
from rlhf_dist.distributed.deepspeed.broadcast import TensorSpec, WeightGroup
from rlhf_dist.distributed.deepspeed.process_group import RankContext, open_rendezvous
from rlhf_dist.distributed.deepspeed.saving import SHARD_BYTES
from rlhf_dist.distributed.deepspeed.train import LossTerm, Veto
from rlhf_dist.distributed.weight_sync import WeightSource
from rlhf_dist.distributed.workers.inference import IDLE_EXPERIENCE, MicroBatches, pick, response_logprobs
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.models.forward import response_target_mask, scatter_responses
from rlhf_dist.models.loading import without_dropout
from rlhf_dist.models.vocabulary import num_token_ids
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.losses import entropy_loss, kl_loss, policy_loss
from rlhf_dist.ppo.sanity_checks import off_policy


class PolicyWorker(LanguageModelWorker):
    """π_RL: log-probs of responses, the clipped update with its PTX term, and the source of the weights of rollouts."""

    def __init__(
        self,
        config: TrainedModel,
        context: RankContext,
        num_steps: int,
        *,
        temperature: float,
        settings: PPOSettings,
        template_path: Path | None = None,
    ) -> None:
        super().__init__(config, context, num_steps, template_path)
        without_dropout(self.model)
        self.engine.module.num_tokens = num_token_ids(self.tokenizer)  # pyright: ignore[reportArgumentType]
        self.temperature = temperature
        self.settings = settings
        self.precision: Precision = config.precision
        if settings.ema_decay is not None:
            self.engine.keep_average(settings.ema_decay)
        self.weights = WeightSource(self.model)
        self.weight_group: WeightGroup | None = None

    def logprobs(self, rollout: RolloutBatch, micro_batches: MicroBatches) -> Tensor:
        """[rows, R] log-probs of the response tokens, 0 on padding."""
        return response_logprobs(self.engine, rollout, micro_batches, self.temperature)

    def update_ppo(
        self,
        experience: Experience,
        steps: list[StepShare],
        ptx: list[TokenBatch] | None,
        kl_loss_coef: float = 0.0,
        measure_terms: bool = False,
    ) -> list[StepReport]:
        """One optimizer step an entry of `steps`, up to one that is aborted.

        Args:
            kl_loss_coef: weight of the KL to the reference as a term of the loss; 0 leaves it out.
            measure_terms: measure the gradient norms of PPO and PTX by themselves in the first step.
        """
        reports: list[StepReport] = []
        for i, step in enumerate(steps):
            micro_batches = pick(experience, step.micro_batches)
            loss = partial(self._ppo_loss, kl_loss_coef=kl_loss_coef)
            terms = [LossTerm("ppo", micro_batches, loss, IDLE_EXPERIENCE, step.num_tokens)]
            if ptx is not None:
                texts = pick(ptx[i], step.ptx_micro_batches)
                terms.append(self.nll_term("ptx", texts, step.num_ptx_targets, self.settings.ptx_coef))
            veto = self._veto(i == 0, step.num_tokens)
            reports.append(self.engine.step(terms, veto=veto, measure_terms=measure_terms and i == 0))
            if reports[-1].aborted == EARLY_STOP_KL:
                self.engine.skip_steps(len(steps) - i)
            if reports[-1].aborted:
                break
        return reports

    def _veto(self, first: bool, num_tokens: int) -> Veto:
        """The first step of an update is on policy, which is checked; the others may have moved too far, and end it."""

        def decide(means: dict[str, dict[str, float]]) -> str:
            ppo = means["ppo"]
            if first and self.settings.self_checks:
                return off_policy(ppo["ratio_deviation"], ppo["clip_fraction"], num_tokens, self.precision)
            limit = self.settings.early_stop_kl
            return EARLY_STOP_KL if limit is not None and ppo["approx_kl"] > limit else ""

        return decide

    def save(self, folder: Path) -> None:
        """Beside the model, `folder`/model_ema: the moving average of its weights, where one is kept."""
        super().save(folder)
        if self.engine.average is not None:
            self.save_weights(folder / "model_ema", self.engine.average.whole_parameters(SHARD_BYTES))
            distributed.barrier()

    def num_buckets(self) -> int:
        """How many weight buckets hold the model."""
        return self.weights.num_buckets

    def export_bucket(self, index: int) -> dict[str, Tensor] | None:
        """A bucket of whole parameters on rank 0, None elsewhere; in order from 0."""
        is_sender = self.context.rank == 0
        bucket = self.weights.bucket(index, wanted=is_sender)
        return bucket if is_sender else None

    def open_weight_store(self) -> tuple[str, int]:
        """Where the rollout engines meet rank 0 (of a rank other than 0: nobody asks)."""
        return self.context.master_address, open_rendezvous()

    def join_weight_group(self, name: str, size: int, timeout_s: float) -> None:
        """Rank 0 meets the rollout engines for broadcasts of weights."""
        if self.context.rank == 0:
            address, port = self.open_weight_store()
            self.weight_group = WeightGroup(name, 0, size, self.context.device, timeout_s, address, port)

    def weight_specs(self) -> list[list[TensorSpec]]:
        """What `send_weights` sends, by bucket."""
        return self.weights.specs()

    def send_weights(self) -> None:
        """Broadcast all weights from rank 0. Collective: the other ranks take part in gathering."""
        if self.context.rank == 0 and self.weight_group is not None:
            self.weight_group.send(self.weights.buckets())
        else:
            for _ in self.weights.buckets(wanted=False):
                pass

    def export_checksum(self) -> int:
        """Checksum of what was sent since bucket 0."""
        return self.weights.checksum()

    def _ppo_loss(self, batch: Experience, kl_loss_coef: float) -> tuple[Tensor, Sums]:
        settings, mask = self.settings, batch.response_mask
        targets = response_target_mask(batch.prompt_lengths, batch.response_lengths, batch.tokens.shape[1])
        flat_logprobs, flat_entropies = self.engine(batch.tokens, batch.lengths, targets, self.temperature, True)
        logprobs = scatter_responses(flat_logprobs, mask)
        entropies = scatter_responses(flat_entropies if settings.entropy_coef else flat_entropies.detach(), mask)
        loss, sums = policy_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            mask,
            settings.clip_range,
            settings.clip_range_high,
            settings.dual_clip,
            batch.importance_weights,
        )
        bonus, entropy_sums = entropy_loss(entropies, mask)
        loss = loss + settings.entropy_coef * bonus
        if kl_loss_coef:
            penalty, kl_sums = kl_loss(logprobs, batch.ref_logprobs, mask, settings.kl_estimator)
            loss = loss + kl_loss_coef * penalty
            sums["kl_loss"] = kl_sums["loss"]
        return loss, sums | entropy_sums
