"""Low-margin pairs: dropped or down-weighted, and evaluated apart.

In sets of preferences many pairs have a small margin: responses that raters hardly tell apart, whose labels are close to coin
flips (Wang et al. 2024, "Secrets of RLHF in Large Language Models Part II: Reward Modeling", sort pairs by preference strength
and find wrong labels among the weak ones). With m the margin of a pair (difference of ratings) and t = `below`, a pair is a
low-margin pair if m < t. One whose record states no margin is not. Its loss is multiplied by `weight`; with weight 0 it is no
pair at all, and the other pairs of its prompt share the prompt's weight, as around a tie. The weight is a constant of the
configuration: which pairs meet in a step, and on which rank, changes no weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_dist.core.batches import PreferenceBatch
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.core.rankings import ranked_pairs
from rlhf_dist.data.datasets import PreferenceDataset, Split
from rlhf_dist.evaluation.losses import chunks

_ROUNDING = 4 * 2.0**-23
"""Of a difference of fp32 ratings, relative to these: 4.1 − 3.6 is no less than 0.5."""


@dataclass(frozen=True)
class LowMargin:
    """What a training does about low-margin pairs; a `PairWeights` and, by `classes`, a `PairClasses`."""

    below: float
    """t; a pair of a smaller margin is a low-margin pair."""
    weight: float
    """What its loss is multiplied by; 0 drops it."""

    def __call__(self, batch: PreferenceBatch, better: Tensor, worse: Tensor) -> Tensor:
        """[P, C] fp32, what the loss of each pair is multiplied by.

        Args:
            batch: P prompts of at most K responses.
            better, worse: [C] columns, of `ranked_pairs`.
        """
        return torch.where(self._is_low(batch, better, worse), self.weight, 1.0)

    def classes(self, batch: PreferenceBatch, better: Tensor, worse: Tensor) -> dict[str, Tensor]:
        """Name of a class → [P, C] bool, which pairs are of it. Arguments as of a call."""
        low = self._is_low(batch, better, worse)
        return {"low_margin": low, "other": ~low}

    def _is_low(self, batch: PreferenceBatch, better: Tensor, worse: Tensor) -> Tensor:
        high, low = batch.ratings[:, better], batch.ratings[:, worse]
        tolerance = _ROUNDING * high.abs().maximum(low.abs())
        return batch.rated[:, None] & (high - low < self.below - tolerance)

    def apply(self, data: Split[PreferenceDataset]) -> tuple[Split[PreferenceDataset], dict[str, str]]:
        """(the data as they are trained on, lines of the run summary): under weight 0 without the training records that have
        no other pair.

        Raises:
            ConfigError: no record states a margin; or all pairs are low-margin pairs and they are to be dropped.
        """
        counts = self._count(data.train)
        if counts.num_unrated == counts.num_low + counts.num_other:
            raise ConfigError(
                "reward.low_margin is set but no record of data.train states a margin; give records a margin (pairs) or "
                "ratings (rankings), or set it to null"
            )
        if not counts.num_other and self.weight == 0:
            raise ConfigError(
                f"reward.low_margin.weight is 0, but all {counts.num_low} pairs of data.train have a margin below "
                f"reward.low_margin.below {self.below:g}, so none is left to train on; lower below, or raise weight"
            )
        summary = {"training pairs": counts.describe(self.below)}
        if self.weight == 0:
            dropped = len(data.train) - len(counts.with_other)
            data = replace(data, train=data.train.keeping(counts.with_other))
            summary["low-margin pairs"] = f"dropped, and with them {dropped} training records that have no other pair"
        else:
            summary["low-margin pairs"] = f"weight {self.weight:g}"
        if data.eval is not None:
            summary["held-out pairs"] = self._count(data.eval).describe(self.below)
        return data, summary

    def _count(self, dataset: PreferenceDataset) -> _Counts:
        counts = _Counts()
        for items in chunks(len(dataset)):
            batch = dataset.batch(items)
            better, worse, weights = ranked_pairs(batch.present, batch.ranks)
            pairs, low = weights > 0, self._is_low(batch, better, worse)
            counts.num_low += int((pairs & low).sum())
            counts.num_other += int((pairs & ~low).sum())
            counts.num_unrated += int((pairs & ~batch.rated[:, None]).sum())
            counts.with_other += items[(pairs & ~low).any(1)].tolist()
        return counts


class _Counts:
    """Of the pairs of a data set."""

    def __init__(self) -> None:
        self.num_low = self.num_other = 0
        self.num_unrated = 0
        """Of the others, pairs of records that state no margin."""
        self.with_other: list[int] = []
        """Items that have a pair that is not a low-margin pair."""

    def describe(self, below: float) -> str:
        total = self.num_low + self.num_other
        unrated = f", of which {self.num_unrated:,} state no margin" if self.num_unrated else ""
        return (
            f"{self.num_low:,} of {total:,} low-margin pairs (margin below {below:g}; {self.num_low / total:.1%}), "
            f"{self.num_other:,} others{unrated}"
        )
