"""The reward model under training, over its worker group."""

from __future__ import annotations

from concurrent.futures import Future

from torch import Tensor

from rlhf_dist.core.batches import (
    PreferenceBatch,
)
from rlhf_dist.core.steps import (
    UpdateReport,
)
from rlhf_dist.distributed.metrics_reduce import MetricNames
from rlhf_dist.distributed.role_groups import TrainedRole


class PreferenceModelRole(TrainedRole):
    """`roles.PreferenceModel`."""

    def update(self, batch: PreferenceBatch, step: int) -> Future[UpdateReport]:
        """See `roles.PreferenceModel`."""
        longest = batch.lengths.amax(1)
        return self.one_step(batch, longest, "rm", len(batch), step, RM_METRICS, num_sequences=batch.num_responses)

    def score_pairs(self, batch: PreferenceBatch) -> Future[Tensor]:
        """See `roles.PreferenceModel`."""
        return self.map_rows("score_pairs", batch, batch.lengths.amax(1), num_sequences=batch.num_responses)


RM_METRICS = MetricNames(
    "train",
    {
        "reward_model/loss": ("rm", "loss"),
        "reward_model/accuracy": ("rm", "accuracy"),
        "reward_model/margin": ("rm", "margin"),
    },
)
