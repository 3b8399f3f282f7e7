"""A reward model under training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_dist.config.hosting import TrainedModel
from rlhf_dist.core.batches import PreferenceBatch
from rlhf_dist.core.losses import Sums
from rlhf_dist.core.rankings import PairWeights, ranked_pairs
from rlhf_dist.core.steps import StepReport
from rlhf_dist.data.tokenizer import add_pad_token, load_tokenizer
from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.deepspeed.train import LossTerm
from rlhf_dist.distributed.workers.inference import IDLE_SEQUENCE, MicroBatches, flat_rows, pick
from rlhf_dist.distributed.workers.trained import TrainedWorker, build_scalar_model
from rlhf_dist.models.forward import last_token_scores, scatter_responses
from rlhf_dist.reward.losses import ranking_loss

_IDLE_PAIR = PreferenceBatch.of([[IDLE_SEQUENCE.tokens[0]] * 2])


class PreferenceModelWorker(TrainedWorker):
    """Scores trained on rankings, of which a pair is the smallest."""

    def __init__(
        self,
        config: TrainedModel,
        context: RankContext,
        num_steps: int,
        template_path: Path | None = None,
        margin_coef: float = 0.0,
        centering_coef: float = 0.0,
        pair_weights: PairWeights | None = None,
    ) -> None:
        tokenizer: Any = load_tokenizer(config.model_path, template_path)
        add_pad_token(tokenizer)
        module = build_scalar_model(config, context, tokenizer)
        super().__init__(module, config, context, num_steps, tokenizer)
        self.margin_coef = margin_coef
        self.centering_coef = centering_coef
        self.pair_weights = pair_weights

    def update(self, batch: PreferenceBatch, micro_batches: MicroBatches, num_prompts: int, step: int) -> StepReport:
        """One optimizer step; `num_prompts` counts those of all ranks."""
        self.seed_dropout(step)
        micro = pick(batch, micro_batches)
        return self.engine.step([LossTerm("rm", micro, self._ranking_loss, _IDLE_PAIR, num_prompts)])

    def score_pairs(self, batch: PreferenceBatch, micro_batches: MicroBatches) -> Tensor:
        """[rows, K] fp32 scores, 0 where there is no response; idle micro-batches run and are dropped."""
        outputs = []
        for micro in pick(batch, micro_batches):
            scores = _scores(self.engine.infer, (micro or _IDLE_PAIR).to(self.engine.device))
            outputs.append(scores if micro is not None else None)
        return flat_rows(outputs, micro_batches, len(batch))

    def _ranking_loss(self, batch: PreferenceBatch) -> tuple[Tensor, Sums]:
        ratings = self.margin_coef * batch.ratings if self.margin_coef else None
        weights = None
        if self.pair_weights is not None:
            better, worse, _ = ranked_pairs(batch.present, batch.ranks)
            weights = self.pair_weights(batch, better, worse)
        scores = _scores(self.engine, batch)
        return ranking_loss(scores, batch.present, ratings, self.centering_coef, batch.ranks, weights)


def _scores(forward: Any, batch: PreferenceBatch) -> Tensor:
    """[P, K] scores, 0 where there is no response, in one forward pass of the responses that there are.

    Under ZeRO-3 a second pass would gather every parameter again.
    """
    sequences = batch.sequences
    scores = last_token_scores(forward(sequences.tokens, sequences.lengths), sequences.lengths)
    return scatter_responses(scores, batch.present)
