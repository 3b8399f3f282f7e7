"""The SFT task of the supervised loop: records, and plain text mixed in beside them."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_dist.core.roles import LanguageModel
from rlhf_dist.core.steps import UpdateReport
from rlhf_dist.data.sampler import Sampler
from rlhf_dist.evaluation.losses import mean_nll, nll_metrics


@dataclass(frozen=True)
class PretrainingMix:
    """Plain text that every step of an SFT run takes beside its records."""

    train: Any
    eval: Any | None
    per_step: int
    """Sequences in a step."""
    coef: float
    """Weight of the text's mean loss."""
    sampler: Sampler

    def drawn(self, step: int) -> torch.Tensor:
        """[per_step] numbers of the step's sequences."""
        return self.sampler.indices(step * self.per_step, self.per_step)


@dataclass
class SFTTask:
    """Negative log-likelihood of target tokens; of plain text beside them, where there is some."""

    model: LanguageModel
    train: Any
    eval: Any | None
    mix: PretrainingMix | None = None

    def update(self, step: int, indices: torch.Tensor) -> Future[UpdateReport]:
        """See `Task`."""
        batch = self.train.batch(indices)
        if self.mix is None:
            return self.model.update(batch, step)
        return self.model.update(batch, step, self.mix.train.batch(self.mix.drawn(step)), self.mix.coef)

    def drawn(self, step: int, indices: torch.Tensor) -> dict[str, tuple[Any, torch.Tensor]]:
        """See `Task`."""
        return {"lm": (self.train, indices)} | (
            {} if self.mix is None else {"pretraining": (self.mix.train, self.mix.drawn(step))}
        )

    def evaluate(self) -> dict[str, float]:
        """See `nll_metrics`; beside them `sft/eval_pretraining_loss`."""
        metrics = nll_metrics(self.model, self.eval, "sft/eval_loss") if self.eval else {}
        if self.mix is not None and self.mix.eval is not None:
            metrics["sft/eval_pretraining_loss"] = mean_nll(self.model, self.mix.eval)
        return metrics
