"""`algo/` (fp32, batched, masked) against loops over Python floats (`reference_loops.py`) on random ragged batches."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import reference_loops as loops
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_dist.algo import kl, losses
from rlhf_dist.algo.advantages import gae
from rlhf_dist.algo.logprobs import taken_logprobs
from rlhf_dist.algo.masking import masked_mean, masked_var, masked_whiten
from rlhf_dist.algo.rewards import (
    RunningMoments,
    normalise_scores,
    overlong_penalty,
    shape_scores,
    token_rewards,
)
from rlhf_dist.batches import length_mask

Rows = list[list[float]]
SEEDS = (0, 1, 2)
REL, ABS = 1e-5, 1e-6


def close(ours: Tensor | float, expected: float) -> None:
    assert float(ours) == pytest.approx(expected, rel=REL, abs=ABS)


class Ragged:
    """Random responses of different lengths, as lists for the loops and padded with rubbish for `algo/`."""

    def __init__(self, seed: int, num: int = 6, longest: int = 9) -> None:
        self.random = random.Random(seed)
        lengths = [1, longest, *(self.random.randint(1, longest) for _ in range(num - 2))]
        self.lengths = torch.tensor(lengths)
        self.mask = length_mask(self.lengths, longest + 2)

    def rows(self, scale: float = 1.0, centre: float = 0.0) -> Rows:
        """fp32 numbers: both sides must start from the same."""
        drawn = [[self.random.gauss(centre, scale) for _ in range(n)] for n in self.lengths.tolist()]
        return [torch.tensor(row, dtype=torch.float32).tolist() for row in drawn]

    def scores(self, scale: float = 2.0) -> list[float]:
        return torch.tensor([self.random.gauss(0, scale) for _ in self.lengths]).tolist()

    def padded(self, rows: Rows, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, R]; what lies in the padding is neither 0 nor small."""
        out = torch.full(self.mask.shape, 7.5, dtype=dtype)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row, dtype=dtype)
        return out

    def assert_equal(self, ours: Tensor, expected: Rows) -> None:
        assert_close(ours[self.mask], self.padded(expected)[self.mask], rtol=REL, atol=ABS)

    def total(self, function: Callable[..., float], *columns: Rows) -> float:
        """Σ over all tokens of `function` of the columns there."""
        return sum(function(*at) for rows in zip(*columns, strict=True) for at in zip(*rows, strict=True))


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
    close(losses.nll_loss(logprobs)[0], loops.negative_log_likelihood(logits.tolist(), taken, temperature))


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
    ours = kl.adapted_kl_coef(0.1, reached, target=6.0, horizon=10_000, num_responses=512)
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


def test_running_score_normalisation(ragged):
    batches = [ragged.scores(3.0), ragged.scores(0.5)[:4], ragged.scores(1.0)]
    moments = RunningMoments()
    for batch in batches:
        moments = moments.updated(torch.tensor(batch))
    seen = [score for batch in batches for score in batch]
    close(moments.std, loops.running_std(batches))
    close(moments.mean, loops.mean(seen))
    for subtract in (False, True):
        ours = normalise_scores(torch.tensor(batches[-1]), moments, subtract_mean=subtract)
        for score, normal in zip(batches[-1], ours, strict=True):
            close(normal, (score - subtract * loops.mean(seen)) / loops.running_std(batches))


@pytest.mark.parametrize(("discount", "lam"), [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("cut_off", [False, True])
def test_gae(ragged, discount, lam, cut_off):
    rewards, values = ragged.rows(), ragged.rows(2.0)
    ends = ragged.scores() if cut_off else [0.0] * len(ragged.lengths)
    advantages, returns = gae(
        ragged.padded(rewards),
        ragged.padded(values),
        ragged.mask,
        discount,
        lam,
        end_values=torch.tensor(ends) if cut_off else None,
    )
    expected = [loops.gae(r, v, discount, lam, end) for r, v, end in zip(rewards, values, ends, strict=True)]
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


POLICY_OPTIONS = [
    {"clip_range": 0.2},
    {"clip_range": 0.1, "clip_range_high": 0.28},
    {"clip_range": 0.2, "dual_clip": 1.5},
    {"clip_range": 0.2, "clip_range_high": 0.3, "dual_clip": 3.0},
]


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
    loss, _ = losses.pairwise_loss(
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
    loss, _ = losses.ranking_loss(
        ragged.padded(scores), ragged.mask, None if ratings is None else ragged.padded(ratings), centering
    )
    expected = 0.0
    for i, row in enumerate(scores):
        expected += loops.prompt_ranking_loss(row, None if ratings is None else ratings[i], centering)
    close(loss, expected)


# -------------------------------------------------------------------------------------------------------- gradients


def assert_gradient(
    loss_of: Callable[[Tensor], Tensor], total_of: Callable[[Rows], float], at: Rows, ragged: Ragged
) -> None:
    """Autograd's gradient (in fp64) against central differences of the loop: a term that is detached by mistake, or a clip that
    lets the gradient through, has the right value and the wrong gradient."""
    x = ragged.padded(at, torch.float64).requires_grad_()
    (ours,) = torch.autograd.grad(loss_of(x), x)
    step = 1e-6
    for i, row in enumerate(at):
        for t in range(len(row)):
            up, down = [list(r) for r in at], [list(r) for r in at]
            up[i][t] += step
            down[i][t] -= step
            slope = (total_of(up) - total_of(down)) / (2 * step)
            assert float(ours[i, t]) == pytest.approx(slope, rel=1e-5, abs=1e-7)
    assert torch.all(ours[~ragged.mask] == 0)


@pytest.mark.parametrize("options", POLICY_OPTIONS, ids=str)
def test_gradient_of_the_policy_loss(options):
    ragged = Ragged(0)
    old, new, advantages = ragged.rows(0.5, -2), ragged.rows(0.9, -2), ragged.rows()
    low, bound = options["clip_range"], options.get("dual_clip")
    high = options.get("clip_range_high", low)
    wide_old, wide_advantages = (ragged.padded(rows, torch.float64) for rows in (old, advantages))

    def total(rows: Rows) -> float:
        return ragged.total(lambda n, o, a: loops.policy_token_loss(n, o, a, low, high, bound), rows, old, advantages)

    assert_gradient(
        lambda x: losses.policy_loss(x, wide_old, wide_advantages, ragged.mask, **options)[0], total, new, ragged
    )


@pytest.mark.parametrize("clip_range", [None, 0.3])
def test_gradient_of_the_value_loss(clip_range):
    ragged = Ragged(1)
    values, old, returns = ragged.rows(), ragged.rows(), ragged.rows(2.0)
    wide_old, wide_returns = (ragged.padded(rows, torch.float64) for rows in (old, returns))

    def total(rows: Rows) -> float:
        return ragged.total(lambda v, o, r: loops.value_token_loss(v, o, r, clip_range), rows, old, returns)

    assert_gradient(
        lambda x: losses.value_loss(x, wide_old, wide_returns, ragged.mask, clip_range)[0], total, values, ragged
    )


def test_gradient_of_the_ranking_loss():
    ragged = Ragged(2)
    ragged.lengths = torch.tensor([2, 5, 3, 4])
    ragged.mask = length_mask(ragged.lengths, 5)
    scores = ragged.rows(1.5)
    ratings = [sorted(row, reverse=True) for row in ragged.rows()]

    def total(rows: Rows) -> float:
        return sum(loops.prompt_ranking_loss(r, m, 0.1) for r, m in zip(rows, ratings, strict=True))

    assert_gradient(
        lambda x: losses.ranking_loss(x, ragged.mask, ragged.padded(ratings, torch.float64), 0.1)[0],
        total,
        scores,
        ragged,
    )
