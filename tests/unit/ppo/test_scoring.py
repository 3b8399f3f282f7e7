"""Scoring as responses arrive, and the checks of log-probs, with roles that record what is asked of them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.roles import Answer, RaggedRollout
from support.trainers import PPO, metrics, open_run, prompts

from rlhf_dist.core.errors import SampleError, TrainingError
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.scoring import Precisions, Scored

SETTINGS = PPOSettings(num_iterations=3, prompts_per_iteration=5, responses_per_prompt=2, mini_batch_size=5)
SCORING = {"reward.score", "reference.logprobs", "policy.logprobs", "value.values"}


def scored_in(run: Any, num_chunks: int) -> tuple[Any, Scored]:
    trainer = PPO(run, SETTINGS, rollout=RaggedRollout, num_chunks=num_chunks).trainer
    return trainer.scorer.score(trainer.rollouts.take(0).arriving(), run.phase)


def test_a_part_is_scored_while_the_next_is_generated(tmp_path: Path):
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS, num_chunks=2)
        ppo.trainer.step(0)
    names = [event if event[0] == "wait" else event[0] for event in ppo.events]
    assert names[:3] == ["rollout.generate", "rollout.generate", ("wait", "rollout.generate")]
    assert set(names[3:7]) == SCORING
    assert names[7] == ("wait", "rollout.generate"), "the second part is waited for when the first is with the models"
    assert set(names[8:12]) == SCORING
    assert {name for _, name in names[12:20]} == SCORING
    assert names[20] == "policy.update"
    ids = [event[3] for event in ppo.events if event[0] == "rollout.generate"]
    assert ids == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], "parts are contiguous"


@pytest.mark.parametrize("num_chunks", [2, 3, 10, 64])
def test_parts_change_no_row(tmp_path: Path, num_chunks: int):
    with open_run(tmp_path) as run:
        whole, parts = scored_in(run, 1), scored_in(run, num_chunks)
    for expected, found in zip(whole, parts, strict=True):
        for field in fields(expected):
            a, b = getattr(expected, field.name), getattr(found, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_parts_change_no_run(tmp_path: Path):
    states = []
    for num_chunks in (1, 3):
        with open_run(tmp_path / str(num_chunks)) as run:
            ppo = PPO(run, SETTINGS, rollout=RaggedRollout, num_chunks=num_chunks, eval_prompts=prompts(4))
            ppo.trainer.run(resume=False)
            states.append((ppo.policy.state, ppo.value.state))
    assert states[0] == states[1]
    assert metrics(tmp_path / "1") == metrics(tmp_path / "3")


def other_logprobs(ppo: PPO, change: float, rows: slice = slice(None)) -> None:
    """Rollouts whose log-probs are `change` higher."""
    healthy = ppo.rollout.generate

    def changed(prompts: Any, **kwargs: Any) -> Answer:
        answer = healthy(prompts, **kwargs)
        answer._value.rollout_logprobs[rows] += change
        return answer

    ppo.rollout.generate = changed  # pyright: ignore[reportAttributeAccessIssue]


def test_log_probs_of_another_distribution_are_not_compared(tmp_path: Path):
    for same in (False, True):
        with open_run(tmp_path / str(same)) as run:
            ppo = PPO(run, SETTINGS, precisions=Precisions(rollout="bf16", same_distribution=same))
            other_logprobs(ppo, -0.9)
            if not same:
                rollout, scored = ppo.trainer.scorer.score(ppo.trainer.rollouts.take(0).arriving(), run.phase)
                ppo.trainer.scorer.check(0, rollout, scored)
            else:
                with pytest.raises(TrainingError, match="policy and rollout engine have the same weights"):
                    ppo.trainer.step(0)


def test_log_probs_of_older_weights_are_not_compared(tmp_path: Path):
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS.model_copy(update={"off_policy_iterations": 1}))
        ppo.trainer.step(0)
        for part in ppo.trainer.rollouts.ahead.parts:  # pyright: ignore[reportOptionalMemberAccess]
            part.result().rollout_logprobs.sub_(0.9)
        found = ppo.trainer.step(1)
    assert found["rollout/staleness"] == 1
    assert found["rollout/logprob_mismatch"] == pytest.approx(0.9)


def test_log_probs_of_rollouts_spare_the_policy_a_forward_pass_but_for_a_sample(tmp_path: Path):
    settings = SETTINGS.model_copy(update={"old_logprobs": "rollout"})
    with open_run(tmp_path) as run:
        ppo = PPO(run, settings)
        asked = []
        healthy = ppo.policy.logprobs
        ppo.policy.logprobs = lambda rollout: asked.append(len(rollout)) or healthy(rollout)  # pyright: ignore
        other_logprobs(ppo, 0.125, slice(8, None))  # the last two are not looked at
        rollout, scored = ppo.trainer.scorer.score(ppo.trainer.rollouts.take(0).arriving(), run.phase)
        assert asked == []
        ppo.trainer.scorer.check(0, rollout, scored)
        assert asked == [8]
        assert torch.equal(scored.logprobs, rollout.rollout_logprobs)
        wrong = replace(rollout, rollout_logprobs=torch.where(rollout.response_mask, -1.25, 0.0))
        with pytest.raises(TrainingError, match=r"policy and rollout engine have the same weights .* 0\.25 nats"):
            ppo.trainer.scorer.check(0, wrong, scored)
        ppo.trainer.scorer.settings = settings.model_copy(update={"self_checks": False})
        ppo.trainer.scorer.check(0, wrong, scored)
    assert asked == [8, 8]


def test_a_log_prob_of_the_engine_that_is_not_finite_stops_the_iteration(tmp_path: Path):
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS)
        other_logprobs(ppo, -float("inf"), slice(3, 4))
        with pytest.raises(SampleError, match="rollout log-prob of responses 3"):
            ppo.trainer.step(0)


@pytest.mark.parametrize("changes", [{"off_policy_iterations": 1}, {}], ids=["off-policy", "cut off"])
def test_where_rollouts_cannot_be_compared_a_probe_after_each_sync_is(tmp_path: Path, changes: dict[str, Any]):
    precisions = Precisions(rollout="fp32", same_distribution=bool(changes))
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS.model_copy(update=changes), precisions=precisions)
        ppo.trainer.sync(0)
        probed = ppo.rollout.probe

        def wrong(prompts: Any) -> Answer:
            answer = probed(prompts)
            answer._value.rollout_logprobs.sub_(0.01)
            return answer

        ppo.rollout.probe = wrong  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(TrainingError, match=r"after the sync of version 1 .* differ by 0\.01"):
            ppo.trainer.sync(1)
        ppo.trainer.scorer.settings = SETTINGS.model_copy(update=changes | {"self_checks": False})
        ppo.trainer.sync(1)


def test_where_rollouts_are_compared_there_is_no_probe(tmp_path: Path):
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS)
        ppo.rollout.probe = lambda prompts: pytest.fail("probed")  # pyright: ignore[reportAttributeAccessIssue]
        ppo.trainer.sync(0)
