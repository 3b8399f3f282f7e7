"""Hosted models against plain torch: updates, scores, idle micro-batches, and the weights of rollouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import (
    experience_batch,
    hosted,
    prompt_batch,
    random_rows,
    rollout_batch,
    save_tiny_lm,
    token_batch,
    trained,
    whole_weights,
    worker_of,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.config.hosting import FrozenModel
from rlhf_dist.core.batches import PreferenceBatch, concat_rows
from rlhf_dist.core.errors import ModelError
from rlhf_dist.core.steps import StepShare
from rlhf_dist.distributed.role_groups import ReferenceRole, RewardRole
from rlhf_dist.distributed.rollout_engines import GroupWeightSync, RolloutRole
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.distributed.workers.reference import ReferenceWorker
from rlhf_dist.distributed.workers.reward import RewardWorker
from rlhf_dist.distributed.workers.rollout import RolloutWorker
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.policy_worker import PolicyWorker
from rlhf_dist.ppo.roles import PolicyRole, ValueRole
from rlhf_dist.ppo.value_worker import ValueWorker
from rlhf_dist.reward.roles import PreferenceModelRole
from rlhf_dist.reward.worker import PreferenceModelWorker
from rlhf_dist.rollout.config import RolloutConfig

POLICY, VALUE = PolicyWorker, ValueWorker
REFERENCE, REWARD = ReferenceWorker, RewardWorker
RM, ROLLOUT = PreferenceModelWorker, RolloutWorker
FLAT = {"schedule": "constant", "warmup_fraction": 0.0}
EXPERIENCE = experience_batch([3, 6, 2, 4, 5], [4, 2, 7, 1, 3], seed=1)
STEPS = [torch.tensor([4, 0, 2]), torch.tensor([1, 3])]
PTX = [token_batch([6, 4], seed=5), token_batch([3, 9, 5], seed=6)]
TEMPERATURE, CLIP, PTX_COEF = 0.8, 0.2, 0.7


def policy_kwargs(path: Path, **changes) -> dict:
    config = trained(path, optimizer=FLAT, **changes)
    return {
        "config": config,
        "num_steps": 2,
        "temperature": TEMPERATURE,
        # The old log-probs of these tests are no policy's.
        "settings": PPOSettings(clip_range=CLIP, ptx_coef=PTX_COEF, self_checks=False),
    }


def plain_adamw(model) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], 1e-3, (0.9, 0.95)
    )


def take(model, optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def response(experience, row: int) -> tuple[torch.Tensor, int, int]:
    n, m = int(experience.prompt_lengths[row]), int(experience.response_lengths[row])
    return experience.tokens[row : row + 1, : n + m], n, m


def assert_close(actual: dict[str, torch.Tensor], model) -> None:
    for name, tensor in model.named_parameters():
        difference = (actual[name] - tensor.detach()).abs()
        assert difference.mean() < 1e-6, name
        assert difference.max() < 3e-4, name


@pytest.fixture(scope="module")
def plain_ppo(tiny_lm: Path):
    """Two PPO steps with PTX, token by token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32)
    optimizer, losses = plain_adamw(model), []
    for rows, text in zip(STEPS, PTX, strict=True):
        surrogate, nll = [], []
        for row in rows.tolist():
            tokens, n, m = response(EXPERIENCE, row)
            log_p = torch.log_softmax(model(tokens).logits[0] / TEMPERATURE, -1)
            for t in range(m):
                ratio = (log_p[n + t - 1, tokens[0, n + t]] - EXPERIENCE.old_logprobs[row, t]).exp()
                advantage = EXPERIENCE.advantages[row, t]
                surrogate.append(-torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage))
        for row, n in enumerate(text.lengths.tolist()):
            log_p = torch.log_softmax(model(text.tokens[row : row + 1, :n]).logits[0], -1)  # text has temperature 1
            nll += [-log_p[t - 1, text.tokens[row, t]] for t in range(n) if text.loss_mask[row, t]]
        means = torch.stack(surrogate).mean(), torch.stack(nll).mean()
        losses.append([mean.item() for mean in means])
        take(model, optimizer, means[0] + PTX_COEF * means[1])
    return torch.tensor(losses).mean(0).tolist(), model


@pytest.mark.parametrize(("stage", "size"), [(0, 1), (1, 2), (2, 5), (3, 2)])
def test_a_policy_update_equals_plain_torch(tiny_lm: Path, plain_ppo, stage: int, size: int):
    (surrogate, nll), model = plain_ppo
    with hosted(POLICY, **policy_kwargs(tiny_lm, zero_stage=stage)) as group:
        report = PolicyRole(group, size).update(EXPERIENCE, STEPS, PTX).result()
        assert_close(whole_weights(group), model)
    assert report.metrics["policy/loss"] == pytest.approx(surrogate, rel=1e-4, abs=1e-5)
    assert report.metrics["policy/ptx_loss"] == pytest.approx(nll, rel=1e-4)
    assert report.num_steps == 2


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_idle_micro_batches_change_nothing(tiny_lm: Path, stage: int):
    def share(idle: list) -> StepShare:
        return StepShare([[0, 2], *idle, [1]], 13, [*idle, [0], [1], *idle], PTX[0].num_targets)

    results = []
    for idle in ([], [[]]):
        with hosted(POLICY, **policy_kwargs(tiny_lm, zero_stage=stage)) as group:
            reports = worker_of(group).update_ppo(EXPERIENCE.rows([4, 0, 2]), [share(idle)], [PTX[0]], 0.0)
            results.append((reports, whole_weights(group)))
    (busy, expected), (also_idle, actual) = results
    assert also_idle[0].sums == busy[0].sums
    assert also_idle[0].grad_norm == pytest.approx(busy[0].grad_norm, rel=1e-6)
    for name in expected:
        assert torch.allclose(actual[name], expected[name], atol=1e-6), name


def test_a_rank_with_nothing_to_do_still_takes_part(tiny_lm: Path):
    with hosted(POLICY, **policy_kwargs(tiny_lm, zero_stage=3)) as group:
        worker = worker_of(group)
        none = EXPERIENCE.rows([])
        report = worker.update_ppo(none, [StepShare([[]], 10, [[]], 4)], [PTX[0].rows([])], 0.0)[0]
        assert report.sums == {}
        assert report.grad_norm == 0
        assert worker.logprobs(rollout_batch([2], [3]).rows([]), [[], []]).shape == (0, 0)
        assert worker.evaluate(PTX[0].rows([]), [[]]) == {"nll": 0.0, "num_targets": 0.0}


def test_logprobs_of_policy_and_reference_agree_and_padding_is_0(tiny_lm: Path):
    rollout = rollout_batch([3, 6, 2, 4, 5], [4, 2, 7, 1, 3], seed=1)
    results = []
    with hosted(POLICY, **policy_kwargs(tiny_lm, zero_stage=2)) as group:
        results += [PolicyRole(group, size).logprobs(rollout).result() for size in (1, 2, 5)]
    for stage in (0, 3):
        config = FrozenModel(model_path=str(tiny_lm), precision="fp32", zero_stage=stage)
        with hosted(REFERENCE, config=config, temperature=TEMPERATURE) as group:
            results.append(ReferenceRole(group, 2).logprobs(rollout).result())
    model = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32)
    for row in range(5):
        tokens, n, m = response(rollout, row)
        with torch.no_grad():
            log_p = torch.log_softmax(model(tokens).logits[0] / TEMPERATURE, -1)
        expected = torch.stack([log_p[n + t - 1, tokens[0, n + t]] for t in range(m)])
        assert all(torch.allclose(result[row, :m], expected, atol=1e-4) for result in results)
        assert all((result[row, m:] == 0).all() for result in results)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("clip", [0.2, None])
def test_a_value_update_equals_plain_torch(tiny_rm: Path, stage: int, clip: float | None):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_rm, dtype=torch.float32)
    optimizer, losses = plain_adamw(model), []
    for rows in STEPS:
        errors = []
        for row in rows.tolist():
            tokens, n, m = response(EXPERIENCE, row)
            for t in range(m):
                # The value of a state is the score of the text so far.
                value = model(tokens[:, : n + t]).logits[0, 0]
                old, target = EXPERIENCE.old_values[row, t], EXPERIENCE.returns[row, t]
                error = (value - target) ** 2
                if clip is not None:
                    error = torch.max(error, (value.clamp(old - clip, old + clip) - target) ** 2)
                errors.append(error / 2)
        loss = torch.stack(errors).mean()
        losses.append(loss.item())
        take(model, optimizer, loss)
    kwargs = {"config": trained(tiny_rm, zero_stage=stage, optimizer=FLAT), "num_steps": 2, "clip_range": clip}
    with hosted(VALUE, **kwargs) as group:
        report = ValueRole(group, 2).update(EXPERIENCE, STEPS).result()
        assert_close(whole_weights(group), model)
    assert report.metrics["value/loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_values_are_scores_of_the_text_so_far(tiny_rm: Path):
    rollout = rollout_batch([3, 6, 2], [4, 2, 7], seed=1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_rm, dtype=torch.float32)
    with hosted(VALUE, config=trained(tiny_rm), num_steps=1, clip_range=None) as group:
        values = ValueRole(group, 2).values(rollout).result()
    for row in range(3):
        tokens, n, m = response(rollout, row)
        expected = [model(tokens[:, : n + t]).logits.item() for t in range(m + 1)]
        assert values[row, : m + 1].tolist() == pytest.approx(expected, abs=1e-4)
        assert (values[row, m + 1 :] == 0).all()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_reward_model_update_equals_plain_torch(tiny_rm: Path, stage: int):
    sides = random_rows([5, 9, 3, 4], 1), random_rows([8, 2, 6, 4], 2)
    batch = PreferenceBatch.of(list(zip(*sides, strict=True)))
    model = AutoModelForSequenceClassification.from_pretrained(tiny_rm, dtype=torch.float32)
    optimizer = plain_adamw(model)
    scores = torch.stack([torch.stack([model(row[None]).logits[0, 0] for row in side]) for side in sides], dim=1)
    margin = scores[:, 0] - scores[:, 1]
    loss = -torch.log(torch.sigmoid(margin)).mean()
    with hosted(RM, config=trained(tiny_rm, zero_stage=stage, optimizer=FLAT), num_steps=1) as group:
        role = PreferenceModelRole(group, 3)
        assert torch.allclose(role.score_pairs(batch).result(), scores, atol=1e-4)
        metrics = role.update(batch, 0).result().metrics
        take(model, optimizer, loss)
        assert_close(whole_weights(group), model)
    assert metrics["reward_model/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["reward_model/accuracy"] == (margin > 0).float().mean()
    assert metrics["reward_model/margin"] == pytest.approx(margin.mean().item(), abs=1e-4)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_reward_model_scores_each_sequence_as_transformers_does(tiny_rm: Path, stage: int):
    sequences = rollout_batch([3, 6, 2, 4], [4, 2, 7, 1]).sequences
    config = FrozenModel(model_path=str(tiny_rm), precision="fp32", zero_stage=stage)
    with hosted(REWARD, config=config) as group:
        scores = RewardRole(group, 3).score(sequences).result()
        assert worker_of(group).score(sequences.rows([]), [[]]).shape == (0,)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_rm)
    expected = [model(row[None, :n]).logits.item() for row, n in zip(sequences.tokens, sequences.lengths, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_language_model_is_rejected_as_a_reward_model(tiny_lm: Path):
    with (
        pytest.raises(ModelError, match="no trained scalar head"),
        hosted(REWARD, config=FrozenModel(model_path=str(tiny_lm))),
    ):
        pass


def test_dropout_is_a_function_of_the_step_and_off_in_rl(tmp_path: Path):
    path = save_tiny_lm(tmp_path / "lm", attention_dropout=0.4)
    batch, results = token_batch([9, 6, 7]), []
    for global_seed, step in ((1, 0), (2, 0), (1, 1)):
        with hosted(LanguageModelWorker, config=trained(path, optimizer=FLAT), num_steps=2) as group:
            torch.manual_seed(global_seed)
            worker_of(group).update(batch, [[0, 1, 2]], batch.num_targets, step)
            results.append(whole_weights(group)["lm_head.weight"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    with hosted(POLICY, **policy_kwargs(path)) as group:
        worker = worker_of(group)
        worker.model.train()
        before = PolicyRole(group, 5).logprobs(rollout_batch([3, 2], [4, 5])).result()
        losses = {worker._ppo_loss(EXPERIENCE, 0.0)[0].item() for _ in range(3)}
        assert len(losses) == 1
        assert torch.equal(PolicyRole(group, 5).logprobs(rollout_batch([3, 2], [4, 5])).result(), before)


def rollout_kwargs(path: Path) -> dict:
    config = RolloutConfig(max_response_tokens=8, temperature=TEMPERATURE)
    return {"config": config, "model_path": str(path), "precision": "fp32"}


@pytest.mark.parametrize("stage", [2, 3])
def test_after_a_sync_rollouts_come_from_the_updated_policy(tiny_lm: Path, stage: int):
    prompts = prompt_batch([4, 2, 6, 3])
    with (
        hosted(POLICY, **policy_kwargs(tiny_lm, zero_stage=stage)) as policy,
        hosted(ROLLOUT, **rollout_kwargs(tiny_lm)) as engine,
    ):
        role, rollouts = PolicyRole(policy, 2), RolloutRole(engine, 3)
        sync = GroupWeightSync(policy, rollouts.engines)
        stale = rollouts.generate(prompts, stream="rollout", iteration=0).result()
        assert stale.policy_version == 0
        role.update(EXPERIENCE, STEPS * 4, PTX * 4).result()
        moved = role.logprobs(stale).result()
        assert not torch.allclose(moved, stale.rollout_logprobs, atol=1e-2)
        for version in (1, 2):
            sync.push(version).result()
        fresh = rollouts.generate(prompts, stream="rollout", iteration=0).result()
        assert fresh.policy_version == 2
        assert torch.allclose(role.logprobs(fresh).result(), fresh.rollout_logprobs, atol=1e-4)


def test_the_batches_of_a_rollout_engine_change_no_response(tiny_lm: Path):
    prompts = prompt_batch([4, 2, 6, 3, 1])
    with hosted(ROLLOUT, **rollout_kwargs(tiny_lm)) as group:
        whole = RolloutRole(group, 64).generate(prompts, stream="rollout", iteration=0).result()
        parts = RolloutRole(group, 2).generate(prompts, stream="rollout", iteration=0).result()
        worker = worker_of(group)
        assert worker.generate(prompts.rows([]), [[]], "rollout", 0) is None
        shuffled = worker.generate(prompts, [[3, 0], [], [4, 2, 1]], "rollout", 0)
    for other in (parts, shuffled):
        assert torch.equal(other.tokens, whole.tokens)
        assert torch.equal(other.response_lengths, whole.response_lengths)
        assert torch.allclose(other.rollout_logprobs, whole.rollout_logprobs, atol=1e-4)


def test_concatenated_rollouts_keep_their_rows(tiny_lm: Path):
    with hosted(ROLLOUT, **rollout_kwargs(tiny_lm)) as group:
        engine = RolloutRole(group, 4)
        prompts = prompt_batch([4, 2, 6])
        whole = engine.generate(prompts, stream="s", iteration=1).result()
        parts = [engine.generate(prompts.rows([i]), stream="s", iteration=1).result() for i in range(3)]
    assert torch.equal(concat_rows(parts).tokens, whole.tokens)
