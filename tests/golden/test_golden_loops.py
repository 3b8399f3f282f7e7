"""The formulas (fp32, batched, masked) against loops over Python floats (`reference_loops.py`) on random ragged batches."""

from __future__ import annotations

import math
import random

import pytest
import reference_loops as loops
import torch
from golden_ragged import POLICY_OPTIONS, Ragged, close
from torch.testing import assert_close

from rlhf_dist.core import kl
from rlhf_dist.core.batches import length_mask
from rlhf_dist.core.logprobs import taken_logprobs
from rlhf_dist.core.losses import nll_loss
from rlhf_dist.core.masking import masked_mean, masked_var, masked_whiten
from rlhf_dist.ppo import losses
from rlhf_dist.ppo.advantages import gae
from rlhf_dist.ppo.kl_controller import adapted_kl_coef
from rlhf_dist.ppo.rewards import RunningMoments, normalize_scores, overlong_penalty, shape_scores, token_rewards
from rlhf_dist.reward.losses import pairwise_loss, ranking_loss

SEEDS = (0, 1, 2)


@pytest.fixture(params=SEEDS)
def ragged(request: pytest.FixtureRequest) -> Ragged:
    return Ragged(request.param)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("chunk", [3, 512])
def test_logprobs_and_entropy(temperature, chunk):
    rng = random.Random(0)
    logits = torch.tensor([[rng.gauss(0, 4) for _ in range(11)] for _ in range(10)])
    logits[4] += 300.0  # would overflow an exponential that does not subtract the maximum
    taken = [rng.randrange(11) for _ in range(10)]
    logprobs, entropies = taken_logprobs(logits, torch.tensor(taken), temperature, chunk)
    assert entropies is not None
    for i, row in enumerate(logits.tolist()):
        close(logprobs[i], loops.log_softmax(row, temperature)[taken[i]])
        close(entropies[i], loops.entropy(row, temperature))
    close(nll_loss(logprobs)[0], loops.negative_log_likelihood(logits.tolist(), taken, temperature))


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_estimators(ragged, name):
    new, ref = ragged.rows(0.7, -2), ragged.rows(0.7, -2)
    ours = kl.KL_ESTIMATORS[name](ragged.padded(new), ragged.padded(ref))
    estimator = getattr(loops, name)
    ragged.assert_equal(
        ours, [[estimator(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(new, ref, strict=True)]
    )
    if name != "k1":
        loss, _ = losses.kl_loss(ragged.padded(new), ragged.padded(ref), ragged.mask, name)
        close(loss, ragged.total(estimator, new, ref))


@pytest.mark.parametrize("reached", [0.1, 5.5, 6.0, 6.5, 40.0])
def test_adaptive_kl_coefficient(reached):
    ours = adapted_kl_coef(0.1, reached, target=6.0, horizon=10_000, num_responses=512)
    close(ours, loops.adapted_kl_coef(0.1, reached, target=6.0, horizon=10_000, num_responses=512))


@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("with_overlong", [False, True])
def test_scores_from_the_reward_model_to_the_tokens(ragged, clip, with_overlong):
    """Every step of the order of operations at once."""
    limit, buffer, penalty, missing_eos, beta = ragged.mask.shape[1] - 2, 4, 0.8, 1.3, 0.05
    scores, divergence = ragged.scores(), ragged.rows(0.5)
    truncated = [n == limit for n in ragged.lengths.tolist()]
    overlong = overlong_penalty(ragged.lengths, max_response_tokens=limit, buffer_tokens=buffer, penalty=penalty)
    shaped = shape_scores(
        torch.tensor(scores),
        torch.tensor(truncated),
        score_clip=clip,
        missing_eos_penalty=missing_eos,
        overlong=overlong if with_overlong else None,
    )
    rewards = token_rewards(shaped, ragged.padded(divergence), ragged.mask, beta)
    expected = []
    for i, length in enumerate(ragged.lengths.tolist()):
        late = loops.overlong_penalty(length, limit, buffer, penalty)
        close(overlong[i], late)
        score = loops.shaped_score(scores[i], truncated[i], clip, missing_eos, late if with_overlong else 0.0)
        expected.append(loops.token_rewards(score, divergence[i], beta))
    ragged.assert_equal(rewards, expected)
    assert torch.all(rewards[~ragged.mask] == 0)


def test_running_score_normalization(ragged):
    batches = [ragged.scores(3.0), ragged.scores(0.5)[:4], ragged.scores(1.0)]
    moments = RunningMoments()
    for batch in batches:
        moments = moments.updated(torch.tensor(batch))
    seen = [score for batch in batches for score in batch]
    close(moments.std, loops.running_std(batches))
    close(moments.mean, loops.mean(seen))
    # What normalizing is for: of all scores so far, the spread is 1, and the mean 0 where it is subtracted.
    scaled = normalize_scores(torch.tensor(seen), moments, subtract_mean=False)
    centered = normalize_scores(torch.tensor(seen), moments, subtract_mean=True)
    for normal in (scaled, centered):
        close(loops.variance(normal.tolist()), 1)
    close(loops.mean(centered.tolist()), 0)
    # Dividing alone keeps signs and ratios; subtracting moves every score by the same.
    for score, normal in zip(seen, scaled, strict=True):
        close(normal * seen[0], score * float(scaled[0]))
    apart = (scaled - centered).tolist()
    assert max(apart) - min(apart) < 1e-5
    # Nothing of that is particular to the scores it was made of: a batch by itself is mapped as it was among them.
    last = normalize_scores(torch.tensor(batches[-1]), moments, subtract_mean=True)
    assert torch.equal(last, centered[-len(batches[-1]) :])


def test_running_score_normalization_by_hand():
    moments = (
        RunningMoments().updated(torch.tensor([1.0, 3.0])).updated(torch.tensor([5.0, 7.0, 9.0]))
    )  # mean 5, variance 8
    scores = torch.tensor([5.0, 5.0 + 8**0.5, -(8**0.5)])
    assert_close(normalize_scores(scores, moments, subtract_mean=False), torch.tensor([5 / 8**0.5, 1 + 5 / 8**0.5, -1]))
    assert_close(normalize_scores(scores, moments, subtract_mean=True), torch.tensor([0, 1, -1 - 5 / 8**0.5]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("cut_off", [False, True])
def test_gae(ragged, gamma, lam, cut_off):
    rewards, values = ragged.rows(), ragged.rows(2.0)
    ends = ragged.scores() if cut_off else [0.0] * len(ragged.lengths)
    advantages, returns = gae(
        ragged.padded(rewards),
        ragged.padded(values),
        ragged.mask,
        gamma,
        lam,
        end_values=torch.tensor(ends) if cut_off else None,
    )
    expected = [loops.gae(r, v, gamma, lam, end) for r, v, end in zip(rewards, values, ends, strict=True)]
    ragged.assert_equal(advantages, [a for a, _ in expected])
    ragged.assert_equal(returns, [r for _, r in expected])
    assert torch.all(advantages[~ragged.mask] == 0)
    assert torch.all(returns[~ragged.mask] == 0)


def test_statistics_and_whitening(ragged):
    rows = ragged.rows(3.0, 5.0)
    tokens = [x for row in rows for x in row]
    padded = ragged.padded(rows)
    close(masked_mean(padded, ragged.mask), loops.mean(tokens))
    close(masked_var(padded, ragged.mask), loops.variance(tokens))
    ragged.assert_equal(masked_whiten(padded, ragged.mask), loops.whiten(rows))


@pytest.mark.parametrize("options", POLICY_OPTIONS, ids=str)
def test_policy_loss(ragged, options):
    old, new, advantages = ragged.rows(0.5, -2), ragged.rows(0.9, -2), ragged.rows()
    low, bound = options["clip_range"], options.get("dual_clip")
    high = options.get("clip_range_high", low)
    loss, sums = losses.policy_loss(
        ragged.padded(new), ragged.padded(old), ragged.padded(advantages), ragged.mask, **options
    )
    close(loss, ragged.total(lambda n, o, a: loops.policy_token_loss(n, o, a, low, high, bound), new, old, advantages))
    clipped = ragged.total(lambda n, o, a: loops.policy_token_is_clipped(n, o, a, low, high), new, old, advantages)
    assert clipped > 0
    close(sums["clip_fraction"], clipped)
    close(sums["approx_kl"], ragged.total(lambda n, o: loops.k3(o, n), new, old))
    bounded = ragged.total(lambda n, o, a: loops.policy_token_is_bounded(n, o, a, low, bound), new, old, advantages)
    assert (bounded > 0) == (bound is not None), "there are tokens at the bound"
    close(sums["dual_clip_fraction"], bounded)
    close(sums["ratio"], ragged.total(lambda n, o: math.exp(n - o), new, old))
    close(sums["ratio_deviation"], ragged.total(loops.policy_token_distance, new, old))
    assert any(n - o > math.log(2) for x, y in zip(new, old, strict=True) for n, o in zip(x, y, strict=True))


@pytest.mark.parametrize("clip_range", [None, 0.3])
def test_value_loss(ragged, clip_range):
    values, old, returns = ragged.rows(), ragged.rows(), ragged.rows(2.0)
    loss, _ = losses.value_loss(
        ragged.padded(values), ragged.padded(old), ragged.padded(returns), ragged.mask, clip_range
    )
    close(loss, ragged.total(lambda v, o, r: loops.value_token_loss(v, o, r, clip_range), values, old, returns))


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("centering", [0.0, 0.3])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_pairwise_loss(ragged, margins, centering, scale):
    """Scores of 60 overflow a naive log σ."""
    chosen, rejected = ragged.scores(scale), ragged.scores(scale)
    asked = ragged.scores() if margins else None
    loss, _ = pairwise_loss(
        torch.tensor(chosen),
        torch.tensor(rejected),
        None if asked is None else torch.tensor(asked),
        centering,
    )
    pairs = zip(chosen, rejected, asked or [0.0] * len(chosen), strict=True)
    close(loss, sum(loops.pair_loss(c, r, m, centering) for c, r, m in pairs))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("centering", [0.0, 0.3])
@pytest.mark.parametrize("with_ratings", [False, True])
def test_ranking_loss(seed, centering, with_ratings):
    """Prompts with 2 to 9 responses: all pairs of a prompt together weigh as much as one pair of another."""
    ragged = Ragged(seed)
    ragged.lengths = torch.tensor([2, 9, 4, 5, 3, 2])
    ragged.mask = length_mask(ragged.lengths, 9)
    scores = ragged.rows(2.0)
    ratings = [sorted(row, reverse=True) for row in ragged.rows()] if with_ratings else None
    loss, sums = ranking_loss(
        ragged.padded(scores), ragged.mask, None if ratings is None else ragged.padded(ratings), centering
    )
    expected = 0.0
    for i, row in enumerate(scores):
        expected += loops.prompt_ranking_loss(row, None if ratings is None else ratings[i], centering)
    close(loss, expected)
    # The margin that was reached, whatever margin was asked for.
    close(sums["margin"], sum(loops.prompt_ranking_margin(row) for row in scores))
    accuracy = sum(loops.prompt_ranking_accuracy(row) for row in scores)
    assert 0 < accuracy < len(scores)
    close(sums["accuracy"], accuracy)


def test_ranking_loss_with_ties():
    """Pairs of equal rank count neither in the sum nor in C(K,2); a prompt of ties alone adds nothing."""
    ragged = Ragged(3)
    ragged.lengths = torch.tensor([4, 5, 2, 3])
    ragged.mask = length_mask(ragged.lengths, 5)
    scores, ranks = ragged.rows(2.0), [[0, 0, 1, 2], [0, 1, 1, 1, 2], [0, 0], [0, 1, 2]]
    padded_ranks = torch.zeros(4, 5, dtype=torch.long)
    for i, row in enumerate(ranks):
        padded_ranks[i, : len(row)] = torch.tensor(row)
    loss, sums = ranking_loss(ragged.padded(scores), ragged.mask, centering_coef=0.1, ranks=padded_ranks)
    close(loss, sum(loops.prompt_ranking_loss(s, None, 0.1, r) for s, r in zip(scores, ranks, strict=True)))
    for name, loop in (("accuracy", loops.prompt_ranking_accuracy), ("margin", loops.prompt_ranking_margin)):
        close(sums[name], sum(loop(s, r) for s, r in zip(scores, ranks, strict=True)))


def test_entropy_bonus_and_explained_variance(ragged):
    entropies, values, returns = ragged.rows(0.3, 2), ragged.rows(), ragged.rows(2.0)
    loss, _ = losses.entropy_loss(ragged.padded(entropies), ragged.mask)
    close(loss, ragged.total(lambda h: -h, entropies))
    explained = losses.explained_variance(ragged.padded(values), ragged.padded(returns), ragged.mask)
    close(explained, loops.explained_variance([v for r in values for v in r], [v for r in returns for v in r]))
