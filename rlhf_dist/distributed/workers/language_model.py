"""A language model under supervised training (pretraining, SFT)."""

from __future__ import annotations

from typing import Any

from rlhf_dist.config.hosting import TrainedModel
from rlhf_dist.core.batches import TokenBatch
from rlhf_dist.core.losses import Sums, nll_loss
from rlhf_dist.core.steps import StepReport, TextShare
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.deepspeed.train import LossTerm
from rlhf_dist.distributed.workers.inference import IDLE_TOKENS, MicroBatches, evaluate_nll, pick
from rlhf_dist.distributed.workers.trained import TrainedWorker, build_causal_lm


class LanguageModelWorker(TrainedWorker):
    """Negative log-likelihood of target tokens."""

    def __init__(self, config: TrainedModel, context: RankContext, num_steps: int, template_path: Any = None) -> None:
        tokenizer = load_tokenizer(config.model_path, template_path)
        super().__init__(build_causal_lm(config, context, tokenizer), config, context, num_steps, tokenizer)

    def nll_term(
        self, name: str, micro_batches: list[TokenBatch | None], count: int, coefficient: float = 1.0
    ) -> LossTerm:
        """The mean negative log-likelihood over `count` targets as a term of an optimizer step."""
        return LossTerm(name, micro_batches, self._nll, IDLE_TOKENS, count, coefficient)

    def _nll(self, batch: TokenBatch) -> tuple[Any, Sums]:
        logprobs, _ = self.engine(batch.tokens, batch.lengths, batch.loss_mask)
        return nll_loss(logprobs)

    def update(
        self,
        batch: TokenBatch,
        micro_batches: MicroBatches,
        num_targets: int,
        step: int,
        text: TextShare | None = None,
    ) -> StepReport:
        """One optimizer step; `num_targets` counts the targets of all ranks. `text` is a term of its own, with a count of its
        own."""
        self.seed_dropout(step)
        terms = [self.nll_term("lm", pick(batch, micro_batches), num_targets)]
        if text is not None:
            texts = pick(text.batch, text.micro_batches)
            terms.append(self.nll_term("pretraining", texts, text.num_targets, text.coefficient))
        return self.engine.step(terms)

    def evaluate(self, batch: TokenBatch, micro_batches: MicroBatches) -> dict[str, float]:
        """Sums over this rank's rows: `nll` and `num_targets`."""
        return evaluate_nll(self.engine, pick(batch, micro_batches))
