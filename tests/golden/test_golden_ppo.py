"""`rlhf_dist/ppo/` against the numbers of a real PPO step of TRL 1.12.0, wherever the two mean the same thing.

Where they do not, on purpose: `test_golden_differences.py`.
"""

from __future__ import annotations

import functools

import pytest
import torch
from golden_data import RUNS, PpoRun, ppo_run
from torch.testing import assert_close

from rlhf_dist.core.kl import KL_ESTIMATORS
from rlhf_dist.core.logprobs import taken_logprobs
from rlhf_dist.core.masking import masked_mean, masked_var, masked_whiten
from rlhf_dist.ppo.advantages import gae
from rlhf_dist.ppo.losses import policy_loss, value_loss
from rlhf_dist.ppo.rewards import shape_scores, token_rewards

assert_near = functools.partial(assert_close, rtol=1e-5, atol=2e-6)
"""Both sides are fp32, in another order of operations."""


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> PpoRun:
    return ppo_run(request.param)


def test_the_runs_have_what_the_comparisons_need(run):
    lengths = run.lengths.tolist()
    assert min(lengths) == 1, "a response of one token"
    assert max(lengths) == run.response_mask.shape[1], "a response without padding"
    assert len(set(lengths)) >= 4
    fractions = [m[name] for m in run.micro_batches for name in ("pg_clipfrac", "vf_clipfrac")]
    assert min(fractions) == 0
    assert 0.4 < max(fractions) < 1, "some tokens clipped, some not"


def test_kl_estimators(run):
    r = run.rollout
    kl = KL_ESTIMATORS[run.config["kl_estimator"]](r["logprobs"], r["ref_logprobs"])
    mask = run.response_mask
    assert_near(kl[mask], r["kl"][mask])


def test_missing_eos_penalty():
    run = ppo_run("k1")
    shaped = shape_scores(
        run.rollout["scores_raw"],
        ~run.rollout["contains_eos"],
        missing_eos_penalty=run.config["missing_eos_penalty"],
    )
    assert_near(shaped, run.rollout["scores"])


def test_token_rewards_of_responses_that_fill_the_row(run):
    """There, TRL has no position past the end and puts the score on the last token, too."""
    r, full = run.rollout, run.lengths == run.response_mask.shape[1]
    ours = token_rewards(r["scores"], r["kl"], run.response_mask, run.config["kl_coef"])
    assert full.sum() >= 3
    assert_near(ours[full], r["rewards_unwhitened"][full])


def test_gae_of_the_same_rewards_and_values(run):
    """On TRL's rewards and on the positions that it sees as the episode (one more than the response has)."""
    r, c = run.rollout, run.config
    advantages, returns = gae(r["rewards"], r["values"], run.mask_p1, c["gamma"], c["lam"])
    assert_near(advantages[run.mask_p1], r["advantages_unwhitened"][run.mask_p1])
    assert_near(returns[run.mask_p1], r["returns"][run.mask_p1])


def test_whitening_up_to_bessels_correction(run):
    """TRL estimates the variance with n − 1. `masked_whiten` takes the population's, so that what it returns has variance 1.

    The ratio of the two is a constant of the batch, known exactly: √((v·n/(n−1) + ε) / (v + ε)).
    """
    assert len(run.whitening) == (2 if run.config["whiten_rewards"] else 1)
    for call in run.whitening:
        mask, x = call["mask"], call["values"].double()
        num, var = int(mask.sum()), masked_var(x, mask)
        correction = ((var * num / (num - 1) + 1e-8) / (var + 1e-8)).sqrt()
        kept_mean = 0.0 if call["shift_mean"] else masked_mean(x, mask)
        theirs = (call["output"].double() - kept_mean) * correction
        ours = masked_whiten(call["values"], mask).double()
        assert_near(ours[mask], theirs[mask])
        assert float(masked_var(ours, mask)) == pytest.approx(1, abs=1e-6)
        assert float(masked_var(theirs / correction, mask)) == pytest.approx((num - 1) / num, abs=1e-6)


def test_policy_loss_and_clip_fraction(run):
    for m in run.micro_batches:
        rows = m["rows"]
        mask = run.response_mask[rows]
        loss, sums = policy_loss(
            m["logprobs"],
            run.rollout["logprobs"][rows],
            run.rollout["advantages"][rows],
            mask,
            clip_range=run.config["cliprange"],
        )
        assert float(loss / mask.sum()) == pytest.approx(m["pg_loss"], rel=1e-5, abs=2e-6)
        assert float(sums["clip_fraction"] / mask.sum()) == pytest.approx(m["pg_clipfrac"], abs=1e-6)


def test_value_loss_and_clip_fraction(run):
    """Over the positions that TRL trains its critic on (one more than the response has)."""
    for m in run.micro_batches:
        rows = m["rows"]
        mask = run.mask_p1[rows]
        loss, sums = value_loss(
            m["values"],
            run.rollout["values"][rows],
            run.rollout["returns"][rows],
            mask,
            clip_range=run.config["cliprange_value"],
        )
        assert float(loss / mask.sum()) == pytest.approx(m["vf_loss"], rel=1e-5, abs=2e-6)
        assert float(sums["clip_fraction"] / mask.sum()) == pytest.approx(m["vf_clipfrac"], abs=1e-6)


def test_logprobs_and_entropy_at_the_sampling_temperature(run):
    """From the logits of the first micro-batch, before any update: the log-probs that generation recorded."""
    first = run.micro_batches[0]
    responses, mask = run.rollout["responses"][first["rows"]], run.response_mask[first["rows"]]
    logprobs, entropies = taken_logprobs(first["logits"].flatten(0, 1), responses.flatten(), run.config["temperature"])
    assert entropies is not None
    logprobs = logprobs.view_as(mask)
    assert_near(logprobs[mask], first["logprobs"][mask])
    assert_near(logprobs[mask], run.rollout["logprobs"][first["rows"]][mask])
    assert float(entropies.mean()) == pytest.approx(first["entropy"], rel=1e-5)
    at_one, _ = taken_logprobs(first["logits"].flatten(0, 1), responses.flatten())
    assert (at_one.view_as(mask) - logprobs)[mask].abs().max() > 0.1, "the temperature matters here"


def test_the_score_is_taken_and_rewards_are_whole(run):
    """Whatever the position, a response's rewards sum to its score less β times its KL."""
    r = run.rollout
    ours = token_rewards(r["scores"], r["kl"], run.response_mask, run.config["kl_coef"])
    assert_near(ours.sum(1), r["rewards_unwhitened"].sum(1))
    assert torch.all(ours[~run.response_mask] == 0)
