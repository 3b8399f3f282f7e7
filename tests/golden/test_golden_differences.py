"""Where this project differs from TRL or DeepSpeed-Chat on purpose: by how much exactly, and why.

Each test computes what they do from what we do and the difference that is claimed, and compares it with the recorded numbers.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from golden_data import RUNS, PpoRun, ppo_run
from torch.testing import assert_close

from rlhf_dist.core.kl import kl_k2
from rlhf_dist.core.logprobs import taken_logprobs
from rlhf_dist.core.masking import masked_mean, masked_sum, masked_whiten
from rlhf_dist.ppo.advantages import gae
from rlhf_dist.ppo.losses import policy_loss, value_loss
from rlhf_dist.ppo.rewards import token_rewards

assert_near = functools.partial(assert_close, rtol=1e-5, atol=2e-6)
INVALID_LOGPROB = 1.0
"""What TRL writes for the log-prob of a padding token."""


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> PpoRun:
    return ppo_run(request.param)


def our_rewards(run: PpoRun) -> torch.Tensor:
    return token_rewards(run.rollout["scores"], run.rollout["kl"], run.response_mask, run.config["kl_coef"])


# ------------------------------------------------------------------------------------------ TRL: one position too far


def test_trl_pays_the_score_one_position_past_the_last_token(run):
    """TRL: at `sequence_lengths + 1`, an action that nobody took, unless the response fills the row.

    Here: on the last response token, the action that ended the episode (InstructGPT, Ziegler et al. 2019).
    """
    ours, theirs = our_rewards(run), run.rollout["rewards_unwhitened"]
    assert len(run.shorter) >= 6
    for row in run.shorter.tolist():
        last = int(run.lengths[row]) - 1
        moved = ours[row].clone()
        moved[last] -= run.rollout["scores"][row]
        moved[last + 1] += run.rollout["scores"][row]
        assert_near(moved, theirs[row])
        assert not run.response_mask[row, last + 1], "the position is padding"
        assert abs(float(run.rollout["scores"][row])) > 0.01


def test_trl_runs_gae_through_padding():
    """What it costs: TRL's episode has one step more, from the end of the response into padding.

    With L response tokens, V_L the value at the first padding position and s the score, its last true advantage is

        r_{L−1} + γ V_L − V_{L−1} + γλ (s − V_L)       instead of       r_{L−1} + s − V_{L−1}

    so that it differs by D = γ(1−λ) V_L − (1−γλ) s there, and by (γλ)^(L−1−t) D at token t. An episode that ended has no value
    left: V_L is a number that the critic was never asked for in this project, and any bias of it enters every advantage.
    """
    run = ppo_run("k1")  # without reward whitening: TRL's rewards are ours but for the position
    gamma, lam = run.config["gamma"], run.config["lam"]
    ours, _ = gae(our_rewards(run), run.rollout["values"], run.response_mask, gamma, lam)
    theirs, shifts, starts = run.rollout["advantages_unwhitened"], [], []
    for row in run.shorter.tolist():
        num = int(run.lengths[row])
        score, value = float(run.rollout["scores"][row]), float(run.rollout["values"][row, num])
        shift = gamma * (1 - lam) * value - (1 - gamma * lam) * score
        shifts.append(abs(shift))
        for t in range(num):
            expected = float(ours[row, t]) + (gamma * lam) ** (num - 1 - t) * shift
            assert float(theirs[row, t]) == pytest.approx(expected, rel=1e-5, abs=2e-6)
        # TRL's recursion starts in the padding, with an advantage that is not 0.
        assert float(theirs[row, num]) == pytest.approx(score - value, rel=1e-5, abs=2e-6)
        starts.append(abs(score - value))
    assert max(shifts) > 0.05
    assert max(starts) > 0.5
    full = run.lengths == run.response_mask.shape[1]
    assert_near(ours[full], theirs[full])


def test_padding_cannot_reach_our_advantages(run):
    """Where TRL reads values and rewards of padding, ours may hold anything."""
    rewards, values = our_rewards(run), run.rollout["values"]
    mask, c = run.response_mask, run.config
    clean = gae(rewards, values, mask, c["gamma"], c["lam"])
    for poison in (math.nan, math.inf, 1e30):
        dirty = gae(torch.where(mask, rewards, poison), torch.where(mask, values, poison), mask, c["gamma"], c["lam"])
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(a, b)


def test_trl_trains_its_critic_on_a_padding_position(run):
    """Its value loss counts one position more in each shorter row, with the score as its target. Ours stops at the last token:
    the state after the end has no return to learn."""
    differences = 0
    for m in run.micro_batches:
        rows = m["rows"]
        arguments = (m["values"], run.rollout["values"][rows], run.rollout["returns"][rows])
        ours, theirs = run.response_mask[rows], run.mask_p1[rows]
        loss, _ = value_loss(*arguments, ours, run.config["cliprange_value"])
        extra, _ = value_loss(*arguments, theirs & ~ours, run.config["cliprange_value"])
        assert float((loss + extra) / theirs.sum()) == pytest.approx(m["vf_loss"], rel=1e-5, abs=2e-6)
        differences += abs(float(loss / ours.sum()) - m["vf_loss"]) > 1e-3
    assert differences >= len(run.micro_batches) // 2


# ------------------------------------------------------------------------------------------------ TRL: unmasked means


def test_trl_averages_approx_kl_over_padding(run):
    """Its `approxkl` is the mean of k2 over all B·R positions, in which padding counts as 0. The true mean over tokens is
    larger by the share of padding; so its size depends on how long the longest response of the batch is."""
    for m in run.micro_batches:
        old, mask = run.rollout["logprobs"][m["rows"]], run.response_mask[m["rows"]]
        k2 = kl_k2(m["logprobs"], old)
        assert float(masked_sum(k2, mask) / mask.numel()) == pytest.approx(m["approxkl"], rel=1e-4, abs=1e-12)
        padding = mask.numel() / int(mask.sum())
        assert float(masked_mean(k2, mask)) == pytest.approx(m["approxkl"] * padding, rel=1e-4, abs=1e-12)
    assert any(not run.response_mask[m["rows"]].all() for m in run.micro_batches)


def test_trl_averages_the_ratio_over_padding(run):
    """Padding counts as 1, which hides how far the policy has moved."""
    for m in run.micro_batches:
        old, mask = run.rollout["logprobs"][m["rows"]], run.response_mask[m["rows"]]
        _, sums = policy_loss(m["logprobs"], old, torch.zeros_like(old), mask, run.config["cliprange"])
        num_padding = int((~mask).sum())
        assert float(sums["ratio"] + num_padding) / mask.numel() == pytest.approx(m["ratio"], rel=1e-5)


def test_trl_averages_the_entropy_over_padding():
    """The entropy of what the policy would say after its own end, or after padding, counts like that of a response token."""
    run = ppo_run("k1")  # the other run's first micro-batch has no padding
    first = run.micro_batches[0]
    mask, responses = run.response_mask[first["rows"]], run.rollout["responses"][first["rows"]]
    _, entropies = taken_logprobs(first["logits"].flatten(0, 1), responses.flatten(), run.config["temperature"])
    assert entropies is not None
    entropies = entropies.view_as(mask)
    everywhere = (masked_sum(entropies, mask) + masked_sum(entropies, ~mask)) / mask.numel()
    assert float(everywhere) == pytest.approx(first["entropy"], rel=1e-5)
    assert abs(float(masked_mean(entropies, mask)) - first["entropy"]) > 0.01


def optimizer_steps(run: PpoRun) -> list[list[dict[str, Any]]]:
    """TRL's micro-batches, by the optimizer step that they belong to."""
    steps: list[list[dict[str, Any]]] = [[]]
    for m in run.micro_batches:
        steps[-1].append(m)
        if m["is_optimizer_step"]:
            steps.append([])
    assert not steps.pop(), "the last micro-batch ends a step"
    return steps


def test_trl_averages_micro_batches_of_different_lengths_alike(run):
    """Its loss is the mean of its micro-batches' means (accelerate divides each by `gradient_accumulation_steps`), so a token
    of a short micro-batch weighs more, and the result depends on the micro-batch size. Ours is a sum, divided by the count of
    the optimizer step: the loss of all its rows at once."""
    steps, seen = optimizer_steps(run), []
    assert len(steps) == run.config["num_ppo_epochs"]
    for step in steps:
        assert len(step) == run.config["gradient_accumulation_steps"]
        rows = torch.cat([m["rows"] for m in step])
        assert rows.sort().values.tolist() == list(range(len(run.lengths)))
        mask = run.response_mask[rows]
        loss, _ = policy_loss(
            torch.cat([m["logprobs"] for m in step]),
            run.rollout["logprobs"][rows],
            run.rollout["advantages"][rows],
            mask,
            run.config["cliprange"],
        )
        theirs = sum(m["pg_loss"] for m in step) / run.config["gradient_accumulation_steps"]
        # Theirs from ours: every micro-batch weighted by the same, not by its tokens.
        sizes = [int(run.response_mask[m["rows"]].sum()) for m in step]
        weighted = sum(m["pg_loss"] * n for m, n in zip(step, sizes, strict=True)) / sum(sizes)
        assert float(loss / mask.sum()) == pytest.approx(weighted, rel=1e-5, abs=2e-6)
        seen.append(abs(float(loss / mask.sum()) - theirs))
    assert max(seen) > 0.005


# ----------------------------------------------------------------------------------------- TRL: an invalid probability


def test_trl_writes_an_impossible_logprob_into_padding(run):
    """`INVALID_LOGPROB = 1.0` is a probability of e. It cancels where both sides of a difference are padded alike, and shifts
    every statistic that forgets the mask: here the mean log-prob, by the share of padding × (1 − mean)."""
    logprobs, mask = run.rollout["logprobs"], run.response_mask
    assert torch.all(logprobs[~mask] == INVALID_LOGPROB)
    assert torch.all(logprobs[mask] <= 0)
    true_mean, padding = float(masked_mean(logprobs, mask)), float((~mask).float().mean())
    unmasked = float(logprobs.mean())
    assert unmasked == pytest.approx(true_mean + padding * (INVALID_LOGPROB - true_mean), rel=1e-5)
    assert unmasked - true_mean > 0.3


def test_our_policy_loss_does_not_know_what_padding_holds(run):
    """No constant is special: 1.0, 0, NaN or a log-prob that overflows the exponential give the same loss and gradient."""
    m = run.micro_batches[-1]
    mask, advantages = run.response_mask[m["rows"]], run.rollout["advantages"][m["rows"]]
    old = run.rollout["logprobs"][m["rows"]]
    results = []
    for filler in (INVALID_LOGPROB, 0.0, math.nan, 1e30):
        new = torch.where(mask, m["logprobs"], filler).requires_grad_()
        loss, sums = policy_loss(new, torch.where(mask, old, 0.0), advantages, mask, run.config["cliprange"])
        (gradient,) = torch.autograd.grad(loss, new)
        results.append((loss.detach(), gradient, *(sums[k] for k in sorted(sums))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ------------------------------------------------------------------------------------------------------ DeepSpeed-Chat


def test_deepspeed_chat_does_not_whiten(run):
    """There, advantages enter the loss as they are: a reward model whose scores are ten times as large makes steps ten times as
    large (before clipping the gradient). Whitened advantages do not know the scale of the rewards."""
    mask = run.response_mask
    old = run.rollout["logprobs"]
    advantages, _ = gae(our_rewards(run), run.rollout["values"], mask, run.config["gamma"], run.config["lam"])

    def gradient(used: torch.Tensor) -> torch.Tensor:
        new = old.clone().requires_grad_()
        (result,) = torch.autograd.grad(policy_loss(new, old, used, mask, run.config["cliprange"])[0], new)
        return result[mask]

    plain, scaled = gradient(advantages), gradient(10 * advantages)
    assert_close(scaled, 10 * plain, rtol=1e-5, atol=1e-6)
    assert_near(gradient(masked_whiten(10 * advantages, mask)), gradient(masked_whiten(advantages, mask)))
