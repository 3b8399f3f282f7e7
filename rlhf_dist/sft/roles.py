"""The language model under supervised training, over its worker group."""

from __future__ import annotations

from concurrent.futures import Future

from rlhf_dist.core.batches import (
    TokenBatch,
)
from rlhf_dist.core.futures import mapped
from rlhf_dist.core.steps import (
    TextShare,
    UpdateReport,
)
from rlhf_dist.distributed.metrics_reduce import MetricNames, update_report
from rlhf_dist.distributed.role_groups import TrainedRole, evaluate_nll, pick_rows


class LanguageModelRole(TrainedRole):
    """`roles.LanguageModel`."""

    def update(
        self, batch: TokenBatch, step: int, text: TokenBatch | None = None, text_coef: float = 0.0
    ) -> Future[UpdateReport]:
        """See `roles.LanguageModel`."""
        if text is None:
            return self.one_step(batch, batch.lengths, "lm", batch.num_targets, step, LM_METRICS)
        batches = {"lm": batch, "pretraining": text}
        counts = {term: [part.num_targets] for term, part in batches.items()}
        shares = {term: [self.split(part.lengths)] for term, part in batches.items()}
        calls = []
        for rank in range(self.group.num_ranks):
            rows, local = pick_rows([shares["lm"][0][rank]])
            text_rows, text_local = pick_rows([shares["pretraining"][0][rank]])
            share = TextShare(text.rows(text_rows), text_local[0], text.num_targets, text_coef)
            calls.append((batch.rows(rows), local[0], batch.num_targets, step, share))
        return mapped(
            self.group.scatter("update", calls),
            lambda ranks: update_report(self.group.role, [ranks], counts, shares, LM_METRICS),
        )

    def evaluate(self, batch: TokenBatch) -> Future[dict[str, float]]:
        """See `roles.LanguageModel`."""
        return evaluate_nll(self, batch)


LM_METRICS = MetricNames("train", {"sft/loss": ("lm", "loss"), "sft/pretraining_loss": ("pretraining", "loss")})
