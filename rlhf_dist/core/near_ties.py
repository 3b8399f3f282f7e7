"""Pairs whose margin is small: what is done about them where they outnumber the clear ones.

In sets of preferences most pairs are often near-ties: responses that raters hardly tell apart, whose labels are close to
coin flips. Taken like the others they decide the gradient by their number. (Wang et al. 2024, "Secrets of RLHF in Large
Language Models Part II: Reward Modeling", sort pairs by preference strength and find that weak ones hold wrong labels and ask
for treatment of their own.)

With m the margin of a pair (difference of ratings) and t the threshold, a pair is a near-tie if m < t. A pair whose record
states no margin is not: nothing says that it is close. `NearTieRule.treat` is one of

- `keep`: nothing; the classes are counted and evaluated apart;
- `drop`: near-ties make no pair, as ties do not; the other pairs of a prompt share its weight;
- `down_weight`: a near-tie weighs f = min(1, W_clear / W_near) times what a clear pair does, where W_c = Σ_prompts (pairs of
  class c) / (pairs of the prompt) over the whole training set: in total near-ties then weigh no more than clear pairs do
  (inverse class frequencies, King and Zeng 2001, "Logistic Regression in Rare Events Data", bounded by 1). All weights are
  multiplied by N / (W_clear + f W_near), so that a prompt weighs 1 on average and the learning rate keeps its meaning. They are
  numbers of the training set, not of a batch: which pairs meet in a step, and on which rank, changes no weight;
- `soft_labels`: the pair's loss is the cross-entropy −p log σ(Δ) − (1 − p) log σ(−Δ) to p = ½ + ½ min(1, m / t): a coin flip
  at margin 0, certain from the threshold on (label smoothing, Szegedy et al. 2016; for weak preferences Wang et al. 2024;
  that the smoothing falls linearly with the margin is a choice made here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Treatment = Literal["keep", "drop", "down_weight", "soft_labels"]
_ROUNDING = 4 * 2.0**-23
"""Of a difference of fp32 ratings, relative to these: 4.1 − 3.6 is no less than 0.5."""


@dataclass(frozen=True)
class NearTieRule:
    """What a training does about near-ties."""

    below: float
    """t; a pair of a smaller margin is a near-tie."""
    treat: Treatment
    near_weight: float = 1.0
    clear_weight: float = 1.0
    """What a pair of each class weighs, under `down_weight`."""

    @classmethod
    def of(cls, below: float, treat: Treatment, near_total: float, clear_total: float) -> NearTieRule:
        """With weights from W_near and W_clear, which are both above 0 under `down_weight`."""
        if treat != "down_weight" or not near_total:
            return cls(below, treat)
        factor = min(1.0, clear_total / near_total)
        level = (near_total + clear_total) / (clear_total + factor * near_total)
        return cls(below, treat, near_weight=level * factor, clear_weight=level)

    def weights(self, near: Tensor) -> Tensor | None:
        """[P, C] bool → what each pair's weight is multiplied by; None: nothing."""
        if self.near_weight == self.clear_weight == 1.0:
            return None
        return near * self.near_weight + ~near * self.clear_weight

    def certainty(self, margins: Tensor, near: Tensor) -> Tensor | None:
        """[P, C] margins and classes → p, the probability that the better response is the better; None: 1."""
        if self.treat != "soft_labels":
            return None
        return (0.5 + 0.5 * margins / self.below).where(near, 1.0)


def pair_margins(ratings: Tensor, rated: Tensor, better: Tensor, worse: Tensor, below: float) -> tuple[Tensor, Tensor]:
    """Margins of pairs, and which are near-ties.

    Args:
        ratings: [P, K].
        rated: [P] bool, whether a record states margins.
        better, worse: [C] columns, of `losses.ranked_pairs`.
        below: t.

    Returns:
        ([P, C] margins, [P, C] bool).
    """
    high, low = ratings[:, better], ratings[:, worse]
    margins = high - low
    tolerance = _ROUNDING * high.abs().maximum(low.abs())
    return margins, rated[:, None] & (margins < below - tolerance)
