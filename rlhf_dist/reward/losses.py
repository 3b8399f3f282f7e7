"""The reward-model loss, as a *sum* over prompts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_dist.core.losses import Sums
from rlhf_dist.core.rankings import ranked_pairs


def ranking_loss(
    scores: Tensor,
    present: Tensor,
    ratings: Tensor | None = None,
    centering_coef: float = 0.0,
    ranks: Tensor | None = None,
    pair_weights: Tensor | None = None,
) -> tuple[Tensor, Sums]:
    """−Σ_prompts 1/C(K,2) Σ_{i<j} log σ(r_i − r_j − m_ij), plus λ (r_i + r_j)² in the inner sum.

    All C(K,2) pairs of a prompt weigh as much as one pair of another prompt: they share K forward passes and are correlated.

    Source: InstructGPT, eq. 1; the margin m: Llama 2 (Touvron et al. 2023), eq. 2; the centering term, which fixes the scores'
    free constant: Eisenstein et al. 2023, "Helping or herding?".

    Args:
        scores: [P, K], the best response first.
        present: as in `ranked_pairs`.
        ratings: [P, K], in whose differences m_ij = ratings_i − ratings_j margins are given; None: no margins.
        centering_coef: λ.
        ranks: as in `ranked_pairs`; tied pairs do not count in C(K,2) either.
        pair_weights: [P, C(K,2)] what the loss of each pair is multiplied by; a pair of weight 0 does not count in C(K,2)
            either. None: 1.

    Returns:
        (sum over prompts, sums over prompts of each prompt's mean over pairs: `loss`, `accuracy`, `margin`).
    """
    excluded = pair_weights == 0 if pair_weights is not None else None
    better, worse, weights = ranked_pairs(present, ranks, excluded)
    # Absent ones are replaced first: a NaN there would reach the gradients even when masked after.
    scores = torch.where(present, scores, 0.0)
    ratings = torch.zeros_like(scores) if ratings is None else torch.where(present, ratings, 0.0).to(scores.dtype)
    margin = scores[:, better] - scores[:, worse]
    required = ratings[:, better] - ratings[:, worse]
    losses = -logsigmoid(margin - required)
    if centering_coef:
        losses = losses + centering_coef * (scores[:, better] + scores[:, worse]).square()
    if pair_weights is not None:
        losses = losses * pair_weights
    # Where, not a product alone: a margin that a wrong rating made infinite must not meet a weight of 0.
    loss = torch.where(weights > 0, losses * weights, 0.0).sum()
    with torch.no_grad():
        sums = {
            "loss": loss.detach(),
            "accuracy": ((margin > 0) * weights).sum(),
            "margin": (margin * weights).sum(),
        }
    return loss, sums


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, centering_coef: float = 0.0
) -> tuple[Tensor, Sums]:
    """`ranking_loss` with K = 2: −Σ log σ(r_chosen − r_rejected − m) (Bradley and Terry 1952).

    Args:
        chosen, rejected: [P] scores.
        margins: [P], m; None: 0.
        centering_coef: λ.
    """
    scores = torch.stack([chosen, rejected], dim=1)
    ratings = None if margins is None else torch.stack([margins, torch.zeros_like(margins)], dim=1)
    return ranking_loss(scores, torch.ones_like(scores, dtype=torch.bool), ratings, centering_coef)
