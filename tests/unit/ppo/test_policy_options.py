"""What `ppo` switches on in a policy update: each against plain torch or by what it must do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import experience_batch, hosted, rollout_batch, token_batch, trained, whole_weights, worker_of
from transformers import AutoModelForCausalLM

from rlhf_dist.core.batches import Experience
from rlhf_dist.core.errors import SampleError, TrainingError
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.policy_worker import PolicyWorker
from rlhf_dist.ppo.roles import PolicyRole

POLICY = PolicyWorker
PROMPTS, RESPONSES = [3, 6, 2, 4, 5], [4, 2, 7, 1, 3]
EXPERIENCE = experience_batch(PROMPTS, RESPONSES, seed=1)
STEPS = [torch.tensor([4, 0, 2]), torch.tensor([1, 3])]
PTX = [token_batch([6, 4], seed=5), token_batch([3, 9, 5], seed=6)]
TEMPERATURE = 0.8


def policy(path: Path, num_steps: int = 2, stage: int = 0, learning_rate: float = 1e-3, **settings):
    config = trained(path, zero_stage=stage, optimizer={"learning_rate": learning_rate, "warmup_fraction": 0.0})
    settings = PPOSettings(**{"self_checks": False} | settings)
    return hosted(POLICY, config=config, num_steps=num_steps, temperature=TEMPERATURE, settings=settings)


def on_policy(role: PolicyRole) -> Experience:
    """The experience, with old log-probs that are the policy's."""
    rollout = rollout_batch(PROMPTS, RESPONSES, seed=1)
    fields = {**vars(EXPERIENCE), "old_logprobs": role.logprobs(rollout).result()}
    return Experience(**fields)


def plain_gradients(path: Path, settings: PPOSettings, kl_coef: float) -> dict[str, torch.Tensor]:
    """Gradients of the mean over the first step's tokens, written out token by token."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    losses = []
    for row in STEPS[0].tolist():
        n, m = PROMPTS[row], RESPONSES[row]
        log_p = torch.log_softmax(model(EXPERIENCE.tokens[row : row + 1, : n + m]).logits[0] / TEMPERATURE, -1)
        for t in range(m):
            here = log_p[n + t - 1]
            new, old = here[EXPERIENCE.tokens[row, n + t]], EXPERIENCE.old_logprobs[row, t]
            ref, advantage = EXPERIENCE.ref_logprobs[row, t], EXPERIENCE.advantages[row, t]
            ratio = (new - old).exp()
            upper = settings.clip_range_high or settings.clip_range
            gain = torch.min(ratio * advantage, ratio.clamp(1 - settings.clip_range, 1 + upper) * advantage)
            if settings.dual_clip and advantage < 0:
                gain = torch.max(gain, settings.dual_clip * advantage)
            kl = (new - ref) ** 2 / 2 if settings.kl_estimator == "k2" else (ref - new).exp() - 1 + new - ref
            entropy = -(here.exp() * here).sum()
            losses.append(-gain + kl_coef * kl - settings.entropy_coef * entropy)
    torch.stack(losses).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("settings", "kl_coef"),
    [
        ({"clip_range_high": 5.0}, 0.0),
        ({"dual_clip": 1.1}, 0.0),
        ({"entropy_coef": 0.3}, 0.0),
        ({"kl_in": "loss", "kl_estimator": "k2"}, 0.2),
        ({"kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.1, "dual_clip": 1.1, "clip_range_high": 5.0}, 0.2),
    ],
)
def test_the_gradient_of_every_option_equals_plain_torch(tiny_lm: Path, settings: dict, kl_coef: float):
    expected = plain_gradients(tiny_lm, PPOSettings(self_checks=False, **settings), kl_coef)
    without = plain_gradients(tiny_lm, PPOSettings(self_checks=False), 0.0)
    with policy(tiny_lm, **settings) as group:
        worker = worker_of(group)
        # Weights cannot be compared after one step of Adam, which forgets the size of a gradient: look at it.
        worker.engine._engine.set_gradient_accumulation_boundary(True)
        rows = EXPERIENCE.rows(STEPS[0])
        loss, _ = worker._ppo_loss(rows, kl_loss_coef=kl_coef)
        worker.engine._engine.backward(loss / int(rows.response_lengths.sum()))
        actual = {name: p.grad for name, p in worker.model.named_parameters()}
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(actual[name], gradient, atol=1e-5 * scale), name
    assert any(not torch.allclose(without[name], g, atol=1e-2 * scale) for name, g in expected.items())


def test_an_update_that_starts_on_policy_passes_the_check(tiny_lm: Path):
    with policy(tiny_lm, self_checks=True) as group:
        role = PolicyRole(group, 2)
        report = role.update(on_policy(role), STEPS, PTX).result()
    assert report.num_steps == 2


@pytest.mark.parametrize("stage", [0, 3])
def test_an_update_that_starts_off_policy_is_rejected(tiny_lm: Path, stage: int):
    with policy(tiny_lm, stage=stage, self_checks=True) as group:
        role, before = PolicyRole(group, 2), whole_weights(group)
        experience = on_policy(role)
        shifted = torch.roll(experience.old_logprobs, 1, dims=1) * experience.response_mask
        with pytest.raises(
            TrainingError, match=r"off policy: mean \|ratio - 1\| over its 14 tokens is .* clip fraction .*not taken"
        ):
            role.update(Experience(**{**vars(experience), "old_logprobs": shifted}), STEPS, None).result()
        assert all(torch.equal(t, before[name]) for name, t in whole_weights(group).items())


@pytest.mark.parametrize("stage", [0, 2])
def test_a_policy_that_moves_too_far_ends_its_update(tiny_lm: Path, stage: int):
    rows = [torch.arange(5)] * 6
    with policy(tiny_lm, 6, stage, learning_rate=3e-2) as group:
        role = PolicyRole(group, 2)
        free = role.update(on_policy(role), rows, None).result()
    with policy(tiny_lm, 6, stage, learning_rate=3e-2, early_stop_kl=0.05) as group:
        role, worker = PolicyRole(group, 2), worker_of(group)
        stopped = role.update(on_policy(role), rows, None).result()
        rate = worker.engine._engine.get_lr()[0]
    assert free.num_steps == free.metrics["policy/num_updates"] == 6
    assert free.metrics["policy/approx_kl"] > 0.05
    assert 1 <= stopped.num_steps == stopped.metrics["policy/num_updates"] < 6
    assert stopped.metrics["policy/approx_kl"] <= 0.05 < stopped.metrics["policy/early_stop_kl"]
    assert "policy/early_stop_kl" not in free.metrics
    assert rate == 0  # linear: the schedule is where six steps would have brought it


def test_ptx_changes_nothing_of_how_the_ppo_loss_is_scaled(tiny_lm: Path):
    norms = {}
    for coef in (0.0, 0.5, 1.0):
        with policy(tiny_lm, ptx_coef=coef) as group:
            role = PolicyRole(group, 2)
            report = role.update(on_policy(role), STEPS[:1], PTX[:1] if coef else None, 0.0, True).result()
            norms[coef] = report.metrics["policy/grad_norm"]
            if coef:
                ratio = report.metrics["policy/ptx_grad_ratio"]
                # Measured in the same run: the norm of the PPO gradient is what it is without PTX.
                norms[f"ptx {coef}"] = ratio * norms[0.0]
                again = role.update(on_policy(role), STEPS[:1], PTX[:1]).result()
                assert "policy/ptx_grad_ratio" not in again.metrics
            else:
                assert "policy/ptx_grad_ratio" not in report.metrics
    assert norms["ptx 1.0"] / norms["ptx 0.5"] == pytest.approx(2, rel=1e-4)
    # Triangle: whatever their angle, the two parts make up the whole.
    assert abs(norms[0.0] - norms["ptx 1.0"]) <= norms[1.0] <= norms[0.0] + norms["ptx 1.0"]


@pytest.mark.parametrize("stage", [0, 3])
def test_old_logprobs_that_are_not_finite_stop_the_update_and_name_the_rows(tiny_lm: Path, stage: int):
    broken = EXPERIENCE.old_logprobs.clone()
    broken[3, 0] = float("nan")
    with policy(tiny_lm, stage=stage) as group:
        role, before = PolicyRole(group, 1), whole_weights(group)
        with pytest.raises(SampleError, match=r"ppo: rows 3\)") as caught:
            role.update(Experience(**{**vars(EXPERIENCE), "old_logprobs": broken}), STEPS[1:], None).result()
        assert all(torch.equal(t, before[name]) for name, t in whole_weights(group).items())
    assert (caught.value.rows, caught.value.step) == ({"ppo": [3]}, 0)


def test_the_average_follows_the_policy_and_is_saved(tiny_lm: Path, tmp_path: Path):
    with policy(tiny_lm, ema_decay=1e-9) as group:
        role = PolicyRole(group, 2)
        role.update(EXPERIENCE, STEPS, PTX).result()
        role.save(tmp_path).result()
        current = whole_weights(group)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model_ema", dtype=torch.float32)
    # Almost without memory the average is the weights after the last step.
    assert all(torch.allclose(saved.get_parameter(name), t, rtol=1e-6) for name, t in current.items())
