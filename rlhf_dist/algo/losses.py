"""Losses, as *sums* over the tokens or pairs they are given.

`engine/` alone divides, by the count over the whole optimiser step on all ranks, so that no loss depends on how a
batch is split. Each function also returns the sums that metrics are made of.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_dist.algo.kl import KL_ESTIMATORS, kl_k3
from rlhf_dist.algo.masking import masked_sum
from rlhf_dist.algo.near_ties import NearTieRule

Sums = dict[str, Tensor]


def nll_loss(logprobs: Tensor) -> tuple[Tensor, Sums]:
    """−Σ log p(target) (SFT, pretraining, PTX).

    Args:
        logprobs: [N] log-probs of the target tokens.
    """
    loss = -logprobs.sum()
    return loss, {"loss": loss.detach()}


def ranked_pairs(
    present: Tensor, ranks: Tensor | None = None, left_out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of ranked responses, and how much each weighs.

    Args:
        present: [P, K] bool, a prefix of each row: prompts may have fewer than K responses.
        ranks: [P, K], rising along a row. A pair of equal ranks is a tie and is left out, as InstructGPT's are; None: no ties.
        left_out: [P, C(K,2)] bool, True for pairs that are to be none either.

    Returns:
        (columns of the better, columns of the worse, weights [P, C(K,2)] fp32: 1 / number of the prompt's pairs, and 0 where
        there is no pair).
    """
    num = present.shape[1]
    better, worse = torch.triu_indices(num, num, offset=1, device=present.device)
    pairs = present[:, better] & present[:, worse]
    if ranks is not None:
        pairs = pairs & (ranks[:, better] < ranks[:, worse])
    if left_out is not None:
        pairs = pairs & ~left_out
    return better, worse, pairs / pairs.sum(1, keepdim=True).clamp(min=1)


def ranking_loss(
    scores: Tensor,
    present: Tensor,
    ratings: Tensor | None = None,
    centering_coef: float = 0.0,
    ranks: Tensor | None = None,
    near_ties: NearTieRule | None = None,
    margins: tuple[Tensor, Tensor] | None = None,
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
        ranks: as in `ranked_pairs`; the pairs that ties leave out do not count in C(K,2) either.
        near_ties: what is done about pairs of small margins (`algo/near_ties.py`).
        margins: of `near_ties.pair_margins`, where a rule is given.

    Returns:
        (sum over prompts, sums over prompts of each prompt's mean over pairs: `loss`, `accuracy`, `margin`; with a rule also
        `near_accuracy`, `clear_accuracy` and what they are means over, `near_pairs` and `clear_pairs`).
    """
    near = margins[1] if margins is not None else None
    left_out = near if near_ties is not None and near_ties.treat == "drop" else None
    better, worse, weights = ranked_pairs(present, ranks, left_out)
    # Absent ones are replaced first: a NaN there would reach the gradients even when masked after.
    scores = torch.where(present, scores, 0.0)
    ratings = torch.zeros_like(scores) if ratings is None else torch.where(present, ratings, 0.0).to(scores.dtype)
    margin = scores[:, better] - scores[:, worse]
    required = ratings[:, better] - ratings[:, worse]
    losses = -logsigmoid(margin - required)
    factors = None
    if near_ties is not None and margins is not None:
        certainty, factors = near_ties.certainty(*margins), near_ties.weights(margins[1])
        if certainty is not None:
            losses = certainty * losses - (1 - certainty) * logsigmoid(required - margin)
    if centering_coef:
        losses = losses + centering_coef * (scores[:, better] + scores[:, worse]).square()
    if factors is not None:
        losses = losses * factors
    # Where, not a product alone: a margin that a wrong rating made infinite must not meet a weight of 0.
    loss = torch.where(weights > 0, losses * weights, 0.0).sum()
    with torch.no_grad():
        sums = {
            "loss": loss.detach(),
            "accuracy": ((margin > 0) * weights).sum(),
            "margin": (margin * weights).sum(),
        }
        if near is not None:
            _, _, shares = ranked_pairs(present, ranks)  # of all pairs, those that are dropped among them
            for name, of_class in (("near", near), ("clear", ~near)):
                sums[f"{name}_accuracy"] = ((margin > 0) * shares * of_class).sum()
                sums[f"{name}_pairs"] = (shares * of_class).sum()
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


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Sums]:
    """Clipped surrogate: Σ max(−A·ρ, −A·clip(ρ, 1−ε, 1+ε_high)), ρ = π/π_old (Schulman et al. 2017, eq. 7).

    With `dual_clip` = c, a token with A < 0 loses at most −c·A, whatever its ratio (Ye et al. 2020, eq. 5).

    Args:
        logprobs, old_logprobs, advantages: [B, R]; only `logprobs` carries a gradient.
        response_mask: [B, R] bool.
        clip_range: ε.
        clip_range_high: ε_high (DAPO's "clip-higher", Yu et al. 2025, eq. 10); None: ε.
        dual_clip: c > 1; None switches it off.

    Returns:
        (sum over tokens, sums over tokens: `loss`, `clip_fraction`, `dual_clip_fraction`, `approx_kl` (k3 of old against
        new), `ratio`, `ratio_deviation` (min(|ρ − 1|, 1): no single token decides)).
    """
    high = clip_range if clip_range_high is None else clip_range_high
    # Padding is replaced before the exponential: an overflow there would give NaN gradients even when masked after.
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + high)
    losses = torch.maximum(unclipped, clipped)
    bounded = torch.zeros_like(response_mask)
    if dual_clip is not None:
        bounded = (advantages < 0) & (losses > -dual_clip * advantages)
        losses = torch.where(bounded, -dual_clip * advantages, losses)
    loss = masked_sum(losses, response_mask)
    with torch.no_grad():
        sums = {
            "loss": loss.detach(),
            "clip_fraction": masked_sum((clipped > unclipped).to(ratio.dtype), response_mask),
            "dual_clip_fraction": masked_sum(bounded.to(ratio.dtype), response_mask),
            "approx_kl": masked_sum(kl_k3(old_logprobs, logprobs), response_mask),
            "ratio": masked_sum(ratio, response_mask),
            "ratio_deviation": masked_sum((ratio - 1).abs().clamp(max=1), response_mask),
        }
    return loss, sums


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, estimator: str) -> tuple[Tensor, Sums]:
    """Σ kl_t, for the KL to the reference as a term of the loss rather than of the reward.

    Args:
        logprobs, ref_logprobs: [B, R]; only `logprobs` carries a gradient.
        response_mask: [B, R] bool.
        estimator: `k2` (on policy, its gradient is that of KL(π ‖ π_ref)) or `k3` (as in GRPO, Shao et al. 2024, eq. 4). Not
            `k1`: the expectation of its gradient, E[∇ log π], is 0.
    """
    if estimator == "k1":
        raise ValueError("the gradient of k1 as a loss is 0 in expectation; use k2 or k3")
    # As in `policy_loss`: replaced before the exponential of k3.
    pair = (torch.where(response_mask, x, 0.0) for x in (logprobs, ref_logprobs))
    loss = masked_sum(KL_ESTIMATORS[estimator](*pair), response_mask)
    return loss, {"loss": loss.detach()}


def entropy_loss(entropies: Tensor, response_mask: Tensor) -> tuple[Tensor, Sums]:
    """−Σ H: minimising it is the entropy bonus (Williams and Peng 1991; Schulman et al. 2017, eq. 9).

    Args:
        entropies: [B, R] nats, with a gradient.
        response_mask: [B, R] bool.
    """
    loss = -masked_sum(entropies, response_mask)
    return loss, {"entropy": -loss.detach()}


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, clip_range: float | None
) -> tuple[Tensor, Sums]:
    """½ Σ max((V − R)², (clip(V, V_old ± ε) − R)²) (as in OpenAI baselines' ppo2; ε None: no clipping).

    Args:
        values, old_values, returns: [B, R]; only `values` carries a gradient.
        response_mask: [B, R] bool.
        clip_range: ε.
    """
    # As in `policy_loss`: a NaN in padding would reach the gradients even when masked after.
    values, old_values, returns = (torch.where(response_mask, x, 0.0) for x in (values, old_values, returns))
    errors = (values - returns).square()
    clip_fraction = torch.zeros_like(errors)
    if clip_range is not None:
        change = values - old_values
        clipped = (old_values + change.clamp(-clip_range, clip_range) - returns).square()
        # Both conditions: inside the range, old + (new − old) may differ from new in the last bit.
        clip_fraction = ((change.abs() > clip_range) & (clipped > errors)).to(errors.dtype)
        errors = torch.maximum(errors, clipped)
    loss = 0.5 * masked_sum(errors, response_mask)
    return loss, {"loss": loss.detach(), "clip_fraction": masked_sum(clip_fraction, response_mask).detach()}


def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> float:
    """1 − Var(R − V) / Var(R) over response tokens; 1 is perfect, ≤ 0 is no better than a constant. NaN if Var(R) = 0."""
    v, r = values[response_mask].double(), returns[response_mask].double()
    spread = r.var(unbiased=False)
    return float(1 - (r - v).var(unbiased=False) / spread) if spread > 0 else float("nan")
