"""PPO's loop with roles that record what is asked of them, and its arithmetic by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support.trainers import PPO, metrics, open_run, prompts, texts

from rlhf_dist.core.batches import FINISHED, TRUNCATED, RolloutBatch, concat_rows
from rlhf_dist.core.errors import SampleError, TrainingError
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.experience import PPOState, make_experience, shaped_scores
from rlhf_dist.ppo.rewards import RunningMoments
from rlhf_dist.ppo.scoring import Precisions, Scored

SETTINGS = PPOSettings(
    num_iterations=4,
    prompts_per_iteration=3,
    responses_per_prompt=2,
    mini_batch_size=2,
    num_epochs=2,
    ptx_coef=0.5,
    ptx_batch_size=4,
    eval_every_iterations=2,
)
SCORING = {"reward.score", "reference.logprobs", "policy.logprobs", "value.values"}


def calls(events: list[tuple], *names: str) -> list[tuple]:
    return [event for event in events if event[0] in names]


def test_the_order_of_an_iteration(tmp_path: Path):
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS, ptx=texts(7))
        ppo.trainer.step(0)
    names = [event if event[0] == "wait" else event[0] for event in ppo.events]
    assert names[:2] == ["rollout.generate", ("wait", "rollout.generate")]
    # All four score at the same time, then both learn at the same time: asked first, waited for afterwards.
    assert set(names[2:6]) == SCORING
    assert {name for _, name in names[6:10]} == SCORING
    assert names[10:] == [
        "policy.update",
        "value.update",
        ("wait", "policy.update"),
        ("wait", "value.update"),
        "sync",
        ("wait", "sync"),
    ]


def test_every_rollout_comes_from_the_weights_of_its_iteration(tmp_path: Path):
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS)
        ppo.trainer.run(resume=False)
    versions = [(iteration, version) for _, stream, iteration, _, version in calls(ppo.events, "rollout.generate")]
    assert versions == [(i, i) for i in range(4)]
    assert [event[1] for event in calls(ppo.events, "sync")] == [0, 1, 2, 3, 4]


def test_an_epoch_takes_every_row_once(tmp_path: Path):
    with open_run(tmp_path) as run:
        trainer = PPO(run, SETTINGS).trainer
        orders = []
        for iteration in range(2):
            steps = trainer.draw_steps(iteration)
            assert [len(rows) for rows in steps] == [2] * SETTINGS.updates_per_iteration == [2] * 6
            for epoch in (steps[:3], steps[3:]):
                assert sorted(torch.cat(epoch).tolist()) == list(range(6))
                orders.append(torch.cat(epoch).tolist())
        assert len({tuple(order) for order in orders}) == 4


def test_prompts_are_repeated_and_follow_each_other_through_epochs(tmp_path: Path):
    with open_run(tmp_path) as run:
        trainer = PPO(run, SETTINGS).trainer
        drawn = []
        for iteration in range(10):
            batch = trainer.rollouts.draw_prompts(iteration)
            assert len(batch) == 6
            assert batch.sample_ids.tolist() == list(range(6))
            for first, second in ((0, 1), (2, 3), (4, 5)):
                assert torch.equal(batch.tokens[first], batch.tokens[second])
            drawn += [tuple(batch.rows([i]).tokens[0].tolist()) for i in (0, 2, 4)]
    for epoch in range(3):  # 30 draws from 10 prompts
        assert len(set(drawn[epoch * 10 : epoch * 10 + 10])) == 10


def test_ptx_batches(tmp_path: Path):
    with open_run(tmp_path) as run:
        trainer = PPO(run, SETTINGS, ptx=texts(7)).trainer
        batches = [trainer.draw_ptx(iteration) for iteration in range(2)]
        assert [[len(batch) for batch in part] for part in batches] == [[4] * 6] * 2
        # 48 draws from 7 texts: each is drawn 6 or 7 times.
        rows = [tuple(b.rows([i]).tokens[0].tolist()) for part in batches for b in part for i in range(4)]
        assert {rows.count(row) for row in rows} <= {6, 7}
        assert PPO(run, SETTINGS).trainer.draw_ptx(0) is None
        without = SETTINGS.model_copy(update={"ptx_coef": 0.0})
        assert PPO(run, without, ptx=texts(7)).trainer.draw_ptx(0) is None


def test_evaluations_draw_the_same_numbers_and_happen_when_due(tmp_path: Path):
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS, eval_prompts=prompts(5, seed=4))
        summary = ppo.trainer.run(resume=False)
    evaluations = [event for event in calls(ppo.events, "rollout.generate") if event[1] == "eval"]
    assert [event[-1] for event in evaluations] == [0, 2, 4]  # versions: before, in the middle, after
    assert {(stream, iteration, tuple(ids)) for _, stream, iteration, ids, _ in evaluations} == {
        ("eval", 0, (0, 1, 2, 3, 4))
    }
    logged = metrics(tmp_path)
    assert [step for step in logged if "eval/score_mean" in logged[step]] == [0, 2, 4]
    assert summary["before"]["score_mean"] == logged[0]["eval/score_mean"]
    assert summary["after"]["score_mean"] == logged[4]["eval/score_mean"]
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == [f"step_00000{i}.jsonl" for i in (0, 2, 4)]
    assert len((tmp_path / "eval" / "step_000000.jsonl").read_text(encoding="utf-8").splitlines()) == 5


def trained_to_the_end(path: Path) -> tuple[PPO, dict]:
    with open_run(path) as run:
        ppo = PPO(run, SETTINGS, eval_prompts=prompts(5), ptx=texts(7))
        return ppo, ppo.trainer.run(resume=False)


def test_a_resumed_run_ends_where_the_whole_run_ends(tmp_path: Path):
    whole, summary = trained_to_the_end(tmp_path / "whole")
    path = tmp_path / "cut"
    with open_run(path) as run:
        cut = PPO(run, SETTINGS, eval_prompts=prompts(5), ptx=texts(7))
        healthy, started = cut.trainer.step, []

        def killed_in_the_fourth(iteration: int):
            started.append(iteration)
            if iteration == 3:
                raise KeyboardInterrupt
            return healthy(iteration)

        cut.trainer.step = killed_in_the_fourth
        with pytest.raises(KeyboardInterrupt):
            cut.trainer.run(resume=False)
    with open_run(path, resumed_step=2) as run:
        resumed = PPO(run, SETTINGS, eval_prompts=prompts(5), ptx=texts(7))
        assert resumed.trainer.run(resume=True) == summary
    assert (resumed.policy.state, resumed.value.state) == (whole.policy.state, whole.value.state)
    assert metrics(path) == metrics(tmp_path / "whole")
    # The engines get the loaded weights before anything is generated; what was done is not done again.
    names = [event for event in resumed.events if event[0] != "wait"]
    assert [event[0] for event in names[:3]] == ["policy.load", "value.load", "sync"]
    assert names[2] == ("sync", 2)
    assert [event[2] for event in calls(names, "rollout.generate") if event[1] == "rollout"] == [2, 3]


def test_a_run_resumed_after_its_last_iteration_has_the_same_summary(tmp_path: Path):
    _, summary = trained_to_the_end(tmp_path)
    with open_run(tmp_path, resumed_step=4) as run:
        resumed = PPO(run, SETTINGS, eval_prompts=prompts(5), ptx=texts(7))
        assert resumed.trainer.run(resume=True) == summary
    assert not calls(resumed.events, "policy.update")


def test_without_held_out_prompts_there_is_nothing_to_compare(tmp_path: Path):
    with open_run(tmp_path) as run:
        summary = PPO(run, SETTINGS).trainer.run(resume=False)
    assert summary == {"num_iterations": 4, "before": {}, "after": {}}


# Two responses: one of two tokens that ended, one of a single token that was cut off.
ROLLOUT = RolloutBatch(
    tokens=torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]]),
    prompt_lengths=torch.tensor([2, 1]),
    response_lengths=torch.tensor([2, 1]),
    rollout_logprobs=torch.tensor([[-1.0, -2.125], [-3.0, 0.0]]),
    finish_reasons=torch.tensor([FINISHED, TRUNCATED]),
    policy_version=0,
)
SCORED = Scored(
    scores=torch.tensor([2.0, -0.25]),
    logprobs=torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
    ref_logprobs=torch.tensor([[-1.5, -1.0], [-3.0, 0.0]]),
    state_values=torch.tensor([[0.2, 0.4, 0.9], [0.25, 0.6, 0.0]]),
)
BY_HAND = PPOSettings(
    prompts_per_iteration=2,
    mini_batch_size=2,
    kl_coef=0.1,
    gamma=1.0,
    gae_lambda=0.5,
    whiten_advantages=False,
    score_clip=1.0,
    missing_eos_penalty=0.5,
)


def test_experience_by_hand():
    # Row 1: KL 0.5 and −1, score clipped to 1: rewards −0.05 and 1.1; δ = 0.15 and 0.7; A_0 = 0.15 + 0.5·0.7.
    # Row 2: KL 0, score −0.25 less the penalty of 0.5: reward −0.75; A = −0.75 − 0.25.
    experience, _ = make_experience(ROLLOUT, SCORED, BY_HAND, PPOState(0.1), 4)
    assert torch.allclose(experience.advantages, torch.tensor([[0.5, 0.7], [-1.0, 0.0]]))
    assert torch.allclose(experience.returns, torch.tensor([[0.7, 1.1], [-0.75, 0.0]]))
    assert torch.equal(experience.old_logprobs, SCORED.logprobs)
    assert torch.equal(experience.old_values, torch.tensor([[0.2, 0.4], [0.25, 0.0]]))  # no value of an end
    assert torch.equal(experience.response_mask, ROLLOUT.response_mask)


def test_metrics_by_hand():
    _, found = make_experience(ROLLOUT, SCORED, BY_HAND, PPOState(0.1), 4)
    assert found["reward/score_mean"] == 0.875  # of the reward model's own scores, before clip and penalty
    assert found["reward/score_std"] == 1.125
    assert found["reward/total_mean"] == pytest.approx(0.15)
    assert found["kl/ref_mean"] == pytest.approx(-0.25)
    assert found["kl/ref_per_token"] == pytest.approx(-0.5 / 3)
    assert found["kl/coef"] == 0.1
    assert found["rollout/response_length_mean"] == 1.5
    assert found["rollout/eos_fraction"] == found["rollout/truncated_fraction"] == 0.5
    assert found["rollout/logprob_mismatch"] == 0.125


def test_whitening_is_over_all_response_tokens_and_leaves_returns_alone():
    settings = BY_HAND.model_copy(update={"whiten_advantages": True})
    experience, _ = make_experience(ROLLOUT, SCORED, settings, PPOState(0.1), 4)
    raw = [0.5, 0.7, -1.0]
    mean = sum(raw) / 3
    std = math.sqrt(sum((a - mean) ** 2 for a in raw) / 3)
    white = [(a - mean) / std for a in raw]
    assert torch.allclose(experience.advantages, torch.tensor([white[:2], [white[2], 0.0]]), atol=1e-6)
    assert torch.allclose(experience.returns, torch.tensor([[0.7, 1.1], [-0.75, 0.0]]))


def test_the_value_function_warms_up_alone(tmp_path: Path):
    settings = SETTINGS.model_copy(update={"value_warmup_iterations": 2})
    with open_run(tmp_path / "warm") as run:
        warm = PPO(run, settings, ptx=texts(7))
        warm.trainer.run(resume=False)
    with open_run(tmp_path / "cold") as run:
        cold = PPO(run, SETTINGS, ptx=texts(7))
        cold.trainer.run(resume=False)
    updates = [event[0] for event in calls(warm.events, "policy.update", "value.update")]
    assert updates == ["value.update", "value.update", *["policy.update", "value.update"] * 2]
    # No text is skipped: the first policy update gets the first texts.
    first = [ppo.trainer.draw_ptx(iteration) for ppo, iteration in ((warm, 2), (cold, 0))]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(*first, strict=True))


def test_unchanged_weights_are_not_pushed(tmp_path: Path):
    settings = SETTINGS.model_copy(update={"value_warmup_iterations": 2, "num_iterations": 4})
    with open_run(tmp_path) as run:
        ppo = PPO(run, settings)
        ppo.trainer.run(resume=False)
    names = ("sync", "rollout.generate", "policy.update")
    assert [event[0] for event in calls(ppo.events, *names)] == [
        "sync",
        *("rollout.generate",) * 2,
        *("rollout.generate", "policy.update", "sync") * 2,
    ]
    assert [event[1] for event in calls(ppo.events, "sync")] == [0, 1, 2]
    assert [event[-1] for event in calls(ppo.events, "rollout.generate")] == [0, 0, 0, 1], "versions of the weights"
    assert [settings.policy_version(iteration) for iteration in range(5)] == [0, 0, 0, 1, 2]


def test_the_kl_coefficient_adapts_and_is_resumed(tmp_path: Path):
    # FakePolicy and FakeReference differ by 0.5 nats a token, 1 nat a response: twice the target, an error clipped to 0.2.
    settings = SETTINGS.model_copy(update={"kl_coef": 0.1, "adaptive_kl_target": 0.5, "kl_horizon": 12})
    with open_run(tmp_path) as run:
        PPO(run, settings).trainer.run(resume=False)
    coefs = [metrics(tmp_path)[step]["kl/coef"] for step in range(1, 5)]
    assert coefs == pytest.approx([0.1 * 1.1**i for i in range(4)])
    with open_run(tmp_path / "again") as run:
        halfway = PPO(run, settings.model_copy(update={"num_iterations": 2, "normalize_scores": "mean_std"}))
        halfway.trainer.run(resume=False)
        resumed = PPO(run, settings)
        resumed.trainer._start(resume=True)
    assert resumed.trainer.state == halfway.trainer.state
    assert resumed.trainer.state.kl_coef == pytest.approx(0.1 * 1.1**2)
    assert resumed.trainer.state.moments.count == 2 * 6


@pytest.mark.parametrize("part", ["scores", "logprobs", "ref_logprobs", "values"])
def test_what_is_not_finite_stops_the_iteration_with_its_samples(tmp_path: Path, part: str):
    role, method = {
        "scores": ("reward", "score"),
        "logprobs": ("policy", "logprobs"),
        "ref_logprobs": ("reference", "logprobs"),
        "values": ("value", "values"),
    }[part]
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS)
        fake = getattr(ppo.trainer.roles, role)
        healthy = getattr(fake, method)

        def broken(batch):
            answer = healthy(batch)
            value = answer.result()
            value.view(len(value), -1)[4, 0] = math.nan
            return answer

        setattr(fake, method, broken)
        with pytest.raises(SampleError, match=r"of responses 4\. No weight was touched") as caught:
            ppo.trainer.step(0)
    assert calls(ppo.events, "policy.update", "value.update", "sync") == []
    (line,) = (tmp_path / "aborted_step_000001.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert (row["source"], row["row"]) == ("rollouts", 4)
    assert row["text"] == " ".join(map(str, row["tokens"]))
    assert "aborted_step_000001.jsonl" in str(caught.value)


def test_a_rejected_update_writes_down_its_samples_and_texts(tmp_path: Path):
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS, ptx=texts(7))

        def reject(*_):
            raise SampleError("policy: a loss is not finite.", {"ppo": [5], "ptx": [0, 3]}, step=1)

        drawn = ppo.trainer.draw_ptx(0)
        experience = make_experience(ROLLOUT, SCORED, BY_HAND, PPOState(0.1), 4)[0]
        message = r"not finite\. Samples: .*aborted_step_000001"
        batch = concat_rows([experience] * 3)
        with pytest.raises(SampleError, match=message), ppo.trainer._dumping(0, batch, drawn):
            reject()
    rows = [json.loads(line) for line in (tmp_path / "aborted_step_000001.jsonl").read_text("utf-8").splitlines()]
    assert [(row["source"], row["row"]) for row in rows] == [("ppo", 5), ("ptx", 0), ("ptx", 3)]
    assert rows[0]["returns"] == [-0.75]
    assert rows[2]["tokens"] == drawn[1].tokens[3, : drawn[1].lengths[3]].tolist()


def test_a_policy_that_is_not_its_reference_is_rejected_before_its_first_update(tmp_path: Path):
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS)  # the fakes differ by 0.5 nats a token
        ppo.trainer.scorer.precisions = Precisions(rollout="fp32", same_start="bf16")
        said = r"policy and reference have the same weights .*differ by 0\.5 nats a token .*at most 0\.369 in bf16"
        with pytest.raises(TrainingError, match=said):
            ppo.trainer.step(0)
        assert calls(ppo.events, "policy.update", "value.update") == []
        ppo.trainer.roles.weight_sync.push(1)
        ppo.trainer.step(1)  # later they differ, and should
        ppo.trainer.scorer.settings = SETTINGS.model_copy(update={"self_checks": False})
        ppo.trainer.roles.weight_sync.push(0)
        ppo.trainer.step(0)


def test_rollouts_of_other_weights_or_another_temperature_are_rejected(tmp_path: Path):
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS)
        healthy = ppo.trainer.roles.rollout.generate

        def stale(prompts, **kwargs):
            answer = healthy(prompts, **kwargs)
            answer.result().rollout_logprobs.mul_(1.25)
            return answer

        ppo.trainer.roles.rollout.generate = stale  # pyright: ignore[reportAttributeAccessIssue]
        ppo.trainer.roles.weight_sync.push(1)
        said = "policy and rollout engine have the same weights in iteration 1, .*differ by 0.25 nats"
        with pytest.raises(TrainingError, match=said):
            ppo.trainer.step(1)
    assert calls(ppo.events, "policy.update", "value.update") == []


def test_the_coefficient_waits_for_the_policy(tmp_path: Path):
    changes = {"kl_coef": 0.1, "adaptive_kl_target": 0.5, "kl_horizon": 12, "value_warmup_iterations": 2}
    with open_run(tmp_path) as run:
        PPO(run, SETTINGS.model_copy(update=changes)).trainer.run(resume=False)
    coefs = [metrics(tmp_path)[step]["kl/coef"] for step in range(1, 5)]
    assert coefs == pytest.approx([0.1, 0.1, 0.1, 0.11])


def test_the_gradients_of_ppo_and_ptx_are_compared_now_and_then(tmp_path: Path):
    settings = SETTINGS.model_copy(update={"ptx_ratio_every_iterations": 3})
    for ptx, expected in ((texts(7), [True, False, False, True]), (None, [False] * 4)):
        with open_run(tmp_path / str(bool(ptx))) as run:
            ppo = PPO(run, settings, ptx=ptx)
            measured = []
            healthy = ppo.policy.update
            ppo.policy.update = lambda *args, h=healthy, m=measured: m.append(args[4]) or h(*args)  # pyright: ignore
            ppo.trainer.run(resume=False)
        assert measured == expected


def test_bootstrapping_counts_what_follows_a_cut_off_response_only():
    settings = BY_HAND.model_copy(update={"bootstrap_truncated": True})
    experience, _ = make_experience(ROLLOUT, SCORED, settings, PPOState(0.1), 4)
    # Row 2 was cut off in a state worth 0.6; row 1 ended.
    assert torch.allclose(experience.advantages, torch.tensor([[0.5, 0.7], [-0.4, 0.0]]))


def test_kl_in_the_loss_is_not_in_the_rewards_too(tmp_path: Path):
    changes = {"kl_in": "loss", "kl_estimator": "k2", "kl_coef": 0.3, "ptx_coef": 0.0}
    settings = SETTINGS.model_copy(update=changes)
    with open_run(tmp_path) as run:
        ppo = PPO(run, settings)
        coefs = []
        healthy = ppo.policy.update
        ppo.policy.update = lambda *args: coefs.append(args[3]) or healthy(*args)  # pyright: ignore
        ppo.trainer.step(0)
    assert coefs == [0.3]
    in_loss, found = make_experience(ROLLOUT, SCORED, BY_HAND.model_copy(update=changes), PPOState(0.3), 4)
    without, _ = make_experience(ROLLOUT, SCORED, BY_HAND, PPOState(0.0), 4)
    assert torch.equal(in_loss.advantages, without.advantages)
    assert found["kl/ref_mean"] == pytest.approx(-0.25)


def test_normalized_scores_and_the_overlong_penalty_enter_the_rewards():
    changes = {"normalize_scores": "mean_std", "score_clip": None, "overlong_penalty": 1.0, "overlong_buffer_tokens": 2}
    settings = BY_HAND.model_copy(update=changes)
    state = PPOState(0.0).with_scores(SCORED.scores)  # mean 0.875, standard deviation 1.125
    _, found = make_experience(ROLLOUT, SCORED, settings, state, 3)
    # Normalized to 1 and −1; two of three tokens are half of the buffer: −0.5; the cut-off response loses 0.5.
    assert found["reward/total_mean"] == pytest.approx((1 - 0.5 - 1 - 0.5) / 2)
    assert found["reward/shaped_mean"] == found["reward/total_mean"]
    assert found["reward/score_mean"] == 0.875


def test_saved_moments_are_the_same_in_every_iteration():
    fixed = RunningMoments(count=1, mean=2.0, sum_squares=4.0)
    state = PPOState.start(PPOSettings(normalize_scores="saved"), fixed)
    assert state.with_scores(torch.tensor([100.0, 200.0])) == state
    assert PPOState.from_json(state.to_json()) == state
    rollout = RolloutBatch(
        tokens=torch.ones(2, 3, dtype=torch.long),
        prompt_lengths=torch.tensor([1, 1]),
        response_lengths=torch.tensor([2, 2]),
        rollout_logprobs=torch.zeros(2, 2),
        finish_reasons=torch.tensor([FINISHED, FINISHED]),
        policy_version=0,
    )
    shaped = shaped_scores(rollout, torch.tensor([2.0, 6.0]), PPOSettings(normalize_scores="saved"), state, 2)
    assert shaped.tolist() == [0.0, 2.0]
