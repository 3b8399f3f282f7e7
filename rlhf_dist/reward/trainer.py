"""The reward-model task of the supervised loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.core.batches import PreferenceBatch
from rlhf_dist.core.near_ties import pair_margins
from rlhf_dist.core.rankings import ranked_pairs
from rlhf_dist.core.roles import PreferenceModel
from rlhf_dist.core.steps import UpdateReport
from rlhf_dist.evaluation.losses import chunks
from rlhf_dist.reward.losses import ranking_loss


@dataclass
class RewardTask:
    """Log-sigmoid loss of the pairs of each prompt."""

    model: PreferenceModel
    train: Any
    eval: Any | None
    near_ties_below: float | None = None
    """Margin below which a pair is a near-tie, where these are told apart."""

    def update(self, step: int, indices: torch.Tensor) -> Future[UpdateReport]:
        """See `Task`."""
        return self.model.update(self.train.batch(indices), step)

    def drawn(self, step: int, indices: torch.Tensor) -> dict[str, tuple[Any, torch.Tensor]]:
        """See `Task`."""
        return {"rm": (self.train, indices)}

    def evaluate(self) -> dict[str, float]:
        """See `pair_metrics`."""
        if not self.eval:
            return {}
        return pair_metrics(lambda batch: self.model.score_pairs(batch).result(), self.eval, self.near_ties_below)


def pair_metrics(
    score_pairs: Callable[[PreferenceBatch], Tensor], dataset: Any, near_ties_below: float | None = None
) -> dict[str, float]:
    """Held-out loss, accuracy (equal scores count one half) and score difference of whatever gives [P, K] scores.

    Means over prompts of each prompt's mean over its pairs. The loss is without margins and centering, so that runs with
    other coefficients, and other models, compare. With `near_ties_below`, also the accuracy of each class of
    `algo/near_ties.py` that has pairs, over the same weights.
    """
    classes = torch.zeros(2, 2, dtype=torch.float64)  # near-ties, clear pairs; of each the right ones and all
    sums = torch.zeros(3, dtype=torch.float64)
    for chunk in chunks(len(dataset)):
        batch: PreferenceBatch = dataset.batch(chunk)
        scores = score_pairs(batch).double()
        loss, pair_sums = ranking_loss(scores, batch.present, ranks=batch.ranks)
        better, worse, weights = ranked_pairs(batch.present, batch.ranks)
        equal = (scores[:, better] == scores[:, worse]) * weights
        sums += torch.stack([loss, pair_sums["accuracy"] + 0.5 * equal.sum(), pair_sums["margin"]])
        if near_ties_below is not None:
            right = (scores[:, better] > scores[:, worse]) * weights + 0.5 * equal
            _, near = pair_margins(batch.ratings, batch.rated, better, worse, near_ties_below)
            classes += torch.stack([torch.stack([(x * c).sum() for x in (right, weights)]) for c in (near, ~near)])
    means = (sums / len(dataset)).tolist()
    names = ("reward_model/eval_loss", "reward_model/eval_accuracy", "reward_model/eval_margin")
    metrics: dict[str, float] = dict(zip(names, means, strict=True))
    for name, (right, total) in zip(("near_tie", "clear"), classes.tolist(), strict=True):
        if total:
            metrics[f"reward_model/eval_{name}_accuracy"] = right / total
    return metrics
