"""What evaluation says of responses, pairs and texts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support.roles import Answer, FakePolicy, FakeReference, FakeReward, FakeRollout
from support.trainers import decode, open_run, prompts

from rlhf_dist.core.batches import FINISHED, TRUNCATED, PreferenceBatch, RolloutBatch
from rlhf_dist.evaluation.generation import generation_metrics, sample_rows, score_responses
from rlhf_dist.evaluation.reward_input import as_generated
from rlhf_dist.evaluation.trainer import evaluate_all, score_pairs

ROLLOUT = RolloutBatch(
    tokens=torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]]),
    prompt_lengths=torch.tensor([2, 1]),
    response_lengths=torch.tensor([2, 1]),
    rollout_logprobs=torch.zeros(2, 2),
    finish_reasons=torch.tensor([FINISHED, TRUNCATED]),
    policy_version=0,
)


def test_sample_rows():
    logprobs, ref = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.tensor([[-1.5, -1.0], [-4.0, 0.0]])
    rows = sample_rows(decode, ROLLOUT, torch.tensor([1.0, 2.0]), logprobs, ref)
    assert rows == [
        {"prompt": "5 6", "response": "7 8", "score": 1.0, "kl": -0.5, "response_tokens": 2, "truncated": False},
        {"prompt": "5", "response": "9", "score": 2.0, "kl": 1.0, "response_tokens": 1, "truncated": True},
    ]
    assert [(row["score"], row["kl"]) for row in sample_rows(decode, ROLLOUT, None, logprobs, None)] == [
        (None, None)
    ] * 2


def test_generation_metrics():
    found = generation_metrics(ROLLOUT, torch.tensor([1.0, 3.0]))
    assert (found["reward/score_mean"], found["reward/score_std"]) == (2.0, 1.0)
    assert (found["rollout/response_length_mean"], found["rollout/truncated_fraction"]) == (1.5, 0.5)


def roles() -> tuple[FakeRollout, FakeReward, FakeReference]:
    events: list = []
    return FakeRollout(events, FakePolicy(events, "policy")), FakeReward(events, "reward"), FakeReference(events, "ref")


def test_means_and_standard_errors_are_over_prompts():
    rows, found = score_responses(prompts(6), decode, *roles())
    scores = [row["score"] for row in rows]
    mean = sum(scores) / 6
    assert found["score_mean"] == pytest.approx(mean)
    assert found["score_sem"] == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in scores) / 5 / 6))
    assert found["kl_ref_mean"] == pytest.approx(1.0)  # two tokens, −1 against −1.5
    assert found["kl_ref_sem"] == pytest.approx(0.0)
    assert (found["num_prompts"], found["response_length_mean"], found["eos_fraction"]) == (6, 2, 1)


def test_one_prompt_has_no_standard_error():
    _, found = score_responses(prompts(1), decode, *roles())
    assert math.isnan(found["score_sem"])


def test_without_reward_model_and_reference_lengths_remain():
    _, found = score_responses(prompts(3), decode, roles()[0], None, None)
    assert "score_mean" not in found
    assert "kl_ref_mean" not in found
    assert found["response_length_mean"] == 2


def test_a_frozen_reward_model_scores_all_responses():
    class FirstToken:
        def score(self, sequences) -> Answer:
            return Answer([], "", sequences.tokens[:, 0].float())

    batch = PreferenceBatch.of([[[1], [7]], [[2, 3], [8], [9]]])
    assert score_pairs(FirstToken(), batch).tolist() == [[1, 7, 0], [2, 8, 9]]


def test_evaluate_all_measures_what_it_is_given(tmp_path: Path):
    rollout, reward, reference = roles()
    data = {
        "instructions": None,
        "preferences": None,
        "prompts": prompts(4),
        "decode": decode,
        "reward_input": as_generated,
    }
    with open_run(tmp_path) as run:
        summary = evaluate_all(run, {"rollout": rollout, "reward": reward, "reference": reference}, data)
    assert summary.keys() == {"generation"}
    lines = (tmp_path / "eval" / "step_000000.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["response_tokens"] for line in lines] == [2] * 4
