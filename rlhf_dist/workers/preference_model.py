"""A reward model under training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.algo.losses import Sums, pairwise_loss
from rlhf_dist.batches import PreferenceBatch, SequenceBatch, StepReport, concat_rows
from rlhf_dist.config import TrainedModel
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.engine.distributed import RankContext
from rlhf_dist.engine.train import LossTerm
from rlhf_dist.models.forward import last_token_scores
from rlhf_dist.workers.passes import IDLE_SEQUENCE, MicroBatches, pick, sequence_scores
from rlhf_dist.workers.trained import TrainedWorker, build_scalar_model

_IDLE_PAIR = PreferenceBatch(*[IDLE_SEQUENCE.tokens, IDLE_SEQUENCE.lengths] * 2)


class PreferenceModelWorker(TrainedWorker):
    """Scores trained on pairs."""

    def __init__(
        self, config: TrainedModel, context: RankContext, num_steps: int, template_path: Path | None = None
    ) -> None:
        tokenizer: Any = load_tokenizer(config.model_path, template_path)
        module = build_scalar_model(config, context, tokenizer.pad_token_id)
        super().__init__(module, config, context, num_steps, tokenizer)

    def _pair_loss(self, batch: PreferenceBatch) -> tuple[Tensor, Sums]:
        both = concat_rows(
            [SequenceBatch(batch.chosen, batch.chosen_lengths), SequenceBatch(batch.rejected, batch.rejected_lengths)]
        )
        # One forward pass for both sides: under ZeRO-3 a second one would gather every parameter again.
        scores = last_token_scores(self.engine(both.tokens, both.lengths), both.lengths)
        chosen, rejected = scores.chunk(2)
        return pairwise_loss(chosen, rejected)

    def update(self, batch: PreferenceBatch, micro_batches: MicroBatches, num_pairs: int, step: int) -> StepReport:
        """One optimiser step; `num_pairs` counts the pairs of all ranks."""
        self.seed_dropout(step)
        return self.engine.step([LossTerm("rm", pick(batch, micro_batches), self._pair_loss, _IDLE_PAIR, num_pairs)])

    def score_pairs(self, batch: PreferenceBatch, micro_batches: MicroBatches) -> Tensor:
        """[rows, 2] fp32 scores of chosen and rejected."""
        sides = (
            SequenceBatch(batch.chosen, batch.chosen_lengths),
            SequenceBatch(batch.rejected, batch.rejected_lengths),
        )
        return torch.stack([sequence_scores(self.engine, side, micro_batches) for side in sides], dim=1)
