"""The reward-model task of the supervised loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.core.batches import PreferenceBatch
from rlhf_dist.core.rankings import PairClasses, ranked_pairs
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
    pair_classes: PairClasses | None = None
    """Classes of pairs whose accuracy is reported apart."""

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
        return pair_metrics(lambda batch: self.model.score_pairs(batch).result(), self.eval, self.pair_classes)


def pair_metrics(
    score_pairs: Callable[[PreferenceBatch], Tensor], dataset: Any, pair_classes: PairClasses | None = None
) -> dict[str, float]:
    """Held-out loss, accuracy (equal scores count one half) and score difference of whatever gives [P, K] scores.

    Means over prompts of each prompt's mean over its pairs. The loss is without margins, weights and centering, so that runs
    with other coefficients, and other models, compare. With `pair_classes`, also `reward_model/eval_CLASS_accuracy` of each
    class that has pairs, over the same weights.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    classes: dict[str, Tensor] = {}  # of each the right ones and all
    for chunk in chunks(len(dataset)):
        batch: PreferenceBatch = dataset.batch(chunk)
        scores = score_pairs(batch).double()
        loss, pair_sums = ranking_loss(scores, batch.present, ranks=batch.ranks)
        better, worse, weights = ranked_pairs(batch.present, batch.ranks)
        equal = (scores[:, better] == scores[:, worse]) * weights
        sums += torch.stack([loss, pair_sums["accuracy"] + 0.5 * equal.sum(), pair_sums["margin"]])
        right = (scores[:, better] > scores[:, worse]) * weights + 0.5 * equal
        for name, members in pair_classes(batch, better, worse).items() if pair_classes else ():
            found = torch.stack([(x * members).sum() for x in (right, weights)]).double()
            classes[name] = classes.get(name, 0) + found
    means = (sums / len(dataset)).tolist()
    names = ("reward_model/eval_loss", "reward_model/eval_accuracy", "reward_model/eval_margin")
    metrics: dict[str, float] = dict(zip(names, means, strict=True))
    for name, (correct, total) in ((name, found.tolist()) for name, found in classes.items()):
        if total:
            metrics[f"reward_model/eval_{name}_accuracy"] = correct / total
    return metrics
