"""The RLHF maths as loops over Python floats (float64), written to be read beside the papers and for nothing else.

No tensor, no mask, no vectorization: a response is a list as long as it is, so padding cannot enter. Written from the papers,
not from `rlhf_dist.ppo`, which `test_golden_loops.py` compares with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

Row = Sequence[float]


# ------------------------------------------------------------------------------------------------------ distributions


def log_softmax(logits: Row, temperature: float) -> list[float]:
    """log p_i = z_i/T − log Σ_j exp(z_j/T)."""
    scaled = [z / temperature for z in logits]
    highest = max(scaled)
    log_total = highest + math.log(math.fsum(math.exp(z - highest) for z in scaled))
    return [z - log_total for z in scaled]


def entropy(logits: Row, temperature: float) -> float:
    """H = −Σ_i p_i log p_i; an impossible token adds nothing."""
    return -math.fsum(math.exp(lp) * lp for lp in log_softmax(logits, temperature) if lp > -math.inf)


# ------------------------------------------------------------------------------------------------------ KL, per token


def k1(logprob: float, ref_logprob: float) -> float:
    """Schulman 2020: −log r, with r = π_ref/π."""
    return -(ref_logprob - logprob)


def k2(logprob: float, ref_logprob: float) -> float:
    """Schulman 2020: ½ (log r)²."""
    return 0.5 * (ref_logprob - logprob) ** 2


def k3(logprob: float, ref_logprob: float) -> float:
    """Schulman 2020: (r − 1) − log r."""
    log_r = ref_logprob - logprob
    return (math.exp(log_r) - 1) - log_r


def adapted_kl_coef(kl_coef: float, kl: float, target: float, horizon: int, num_responses: int) -> float:
    """Ziegler et al. 2019, section 2.2: e = clip(KL/target − 1, −0.2, 0.2), β ← β (1 + K e) with K = n/horizon."""
    error = kl / target - 1
    if error > 0.2:
        error = 0.2
    if error < -0.2:
        error = -0.2
    return kl_coef * (1 + num_responses / horizon * error)


# ------------------------------------------------------------------------------------------------------------ rewards


def shaped_score(
    score: float,
    truncated: bool,
    score_clip: float | None = None,
    missing_eos_penalty: float = 0.0,
    overlong_penalty: float = 0.0,
) -> float:
    """Clip, then what the form of the response costs."""
    if score_clip is not None:
        score = min(max(score, -score_clip), score_clip)
    if truncated:
        score -= missing_eos_penalty
    return score - overlong_penalty


def overlong_penalty(length: int, limit: int, buffer: int, penalty: float) -> float:
    """DAPO, eq. 13, case by case, turned to be subtracted."""
    if length <= limit - buffer:
        return 0.0
    if length <= limit:
        return penalty * -((limit - buffer) - length) / buffer
    return penalty


def token_rewards(score: float, kl: Row, kl_coef: float) -> list[float]:
    """−β·kl_t at every token; the score where the response ends."""
    rewards = [-kl_coef * k for k in kl]
    rewards[len(kl) - 1] += score
    return rewards


def running_std(batches: Sequence[Row]) -> float:
    """Population standard deviation of all scores that were ever seen, from all of them at once."""
    seen = [score for batch in batches for score in batch]
    return math.sqrt(variance(seen))


# --------------------------------------------------------------------------------------------------------- advantages


def gae(
    rewards: Row, values: Row, gamma: float, gae_lambda: float, end_value: float = 0.0
) -> tuple[list[float], list[float]]:
    """Schulman et al. 2016, eq. 14 and 16: A_t = Σ_l (γλ)^l δ_{t+l}, the sum written out; R_t = A_t + V_t.

    `end_value` is the value of the state after the last token: 0 where the episode ended, V(s_T) where it was cut off.
    """
    num = len(rewards)
    after = [*values[1:], end_value]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(num)]
    advantages = [
        math.fsum((gamma * gae_lambda) ** steps * deltas[t + steps] for steps in range(num - t)) for t in range(num)
    ]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def mean(values: Row) -> float:
    return math.fsum(values) / len(values)


def variance(values: Row) -> float:
    """Population variance."""
    center = mean(values)
    return math.fsum((v - center) ** 2 for v in values) / len(values)


def whiten(rows: Sequence[Row], eps: float = 1e-8) -> list[list[float]]:
    """Mean 0 and variance 1 over the tokens of all rows together."""
    tokens = [x for row in rows for x in row]
    center, scale = mean(tokens), math.sqrt(variance(tokens) + eps)
    return [[(x - center) / scale for x in row] for row in rows]


# ------------------------------------------------------------------------------------------------------------- losses


def policy_token_loss(
    logprob: float,
    old_logprob: float,
    advantage: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> float:
    """Schulman et al. 2017, eq. 7, as the four cases of its figure 1; then Ye et al. 2020, eq. 5 ("dual clip").

    The objective is A·ρ, except that moving the ratio beyond the range in the direction that A asks for earns no more.
    """
    ratio = math.exp(logprob - old_logprob)
    if advantage >= 0:
        return -advantage * min(ratio, 1 + clip_high)
    objective = advantage * max(ratio, 1 - clip_low)
    if dual_clip is not None:
        objective = max(objective, dual_clip * advantage)
    return -objective


def policy_token_is_clipped(
    logprob: float, old_logprob: float, advantage: float, clip_low: float, clip_high: float
) -> bool:
    """Whether the clipping of the ratio took this token's gradient away."""
    ratio = math.exp(logprob - old_logprob)
    return (advantage > 0 and ratio > 1 + clip_high) or (advantage < 0 and ratio < 1 - clip_low)


def policy_token_is_bounded(
    logprob: float, old_logprob: float, advantage: float, clip_low: float, dual_clip: float | None
) -> bool:
    """Whether Ye et al.'s bound took effect: a ratio above c where A < 0."""
    ratio = math.exp(logprob - old_logprob)
    return dual_clip is not None and advantage < 0 and max(ratio, 1 - clip_low) > dual_clip


def policy_token_distance(logprob: float, old_logprob: float) -> float:
    """How far the ratio is from 1; a token that is more than twice as likely as before counts as that."""
    ratio = math.exp(logprob - old_logprob)
    if ratio > 2:
        return 1.0
    return ratio - 1 if ratio > 1 else 1 - ratio


def value_token_loss(value: float, old_value: float, target: float, clip_range: float | None) -> float:
    """½ (V − R)², or of V held within ±ε of the old value, whichever is larger."""
    error = 0.5 * (value - target) ** 2
    if clip_range is None:
        return error
    held = min(max(value, old_value - clip_range), old_value + clip_range)
    return max(error, 0.5 * (held - target) ** 2)


def minus_log_sigmoid(x: float) -> float:
    """log(1 + e^−x), for any x."""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def pair_loss(chosen: float, rejected: float, margin: float = 0.0, centering_coef: float = 0.0) -> float:
    """Bradley–Terry with the margin of Llama 2 (eq. 2) and the centering term β (r_w + r_l)² of Eisenstein et al. 2023."""
    return minus_log_sigmoid(chosen - rejected - margin) + centering_coef * (chosen + rejected) ** 2


def prompt_ranking_loss(
    scores: Row, ratings: Row | None = None, centering_coef: float = 0.0, ranks: Sequence[int] | None = None
) -> float:
    """InstructGPT, eq. 1: the mean over all C(K,2) pairs of one prompt's responses, the best first. A tie is no pair."""
    losses = []
    for better, worse in ranked_pairs(len(scores), ranks):
        margin = 0.0 if ratings is None else ratings[better] - ratings[worse]
        losses.append(pair_loss(scores[better], scores[worse], margin, centering_coef))
    assert ranks is not None or len(losses) == math.comb(len(scores), 2)
    return mean(losses) if losses else 0.0


def prompt_ranking_accuracy(scores: Row, ranks: Sequence[int] | None = None) -> float:
    """The share of one prompt's pairs whose better response has the higher score."""
    found = [scores[i] > scores[j] for i, j in ranked_pairs(len(scores), ranks)]
    return found.count(True) / len(found) if found else 0.0


def prompt_ranking_margin(scores: Row, ranks: Sequence[int] | None = None) -> float:
    """By how much the better response's score is higher, over one prompt's pairs."""
    found = [scores[i] - scores[j] for i, j in ranked_pairs(len(scores), ranks)]
    return mean(found) if found else 0.0


def ranked_pairs(num: int, ranks: Sequence[int] | None) -> list[tuple[int, int]]:
    """(better, worse) of responses in order, the best first. A tie is no pair."""
    return [(i, j) for i, j in combinations(range(num), 2) if ranks is None or ranks[i] != ranks[j]]


def explained_variance(values: Row, returns: Row) -> float:
    """1 − Var(R − V)/Var(R)."""
    return 1 - variance([r - v for v, r in zip(values, returns, strict=True)]) / variance(returns)


def negative_log_likelihood(rows_of_logits: Sequence[Row], tokens: Sequence[int], temperature: float = 1.0) -> float:
    """−Σ log p(token)."""
    return -math.fsum(log_softmax(z, temperature)[token] for z, token in zip(rows_of_logits, tokens, strict=True))
