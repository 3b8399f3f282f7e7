"""A schema has no key that its command does not read."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_dist.config.data import PPOData, RewardData, SFTData
from rlhf_dist.evaluation.config import EvalConfig

PROMPTS = [{"path": "a.jsonl", "kind": "prompt"}]


def evaluation(**changes: Any) -> EvalConfig:
    data = {"prompts": PROMPTS, "max_length_tokens": 64}
    rollout = {"max_response_tokens": 16}
    return EvalConfig.model_validate(
        {"run_dir": "r", "policy": {"model_path": "p"}, "data": data, "rollout": rollout} | changes
    )


def test_only_training_sets_are_split():
    for schema in (SFTData, RewardData):
        assert (
            schema.model_validate({"train": [{"path": "a", "kind": "text"}], "eval_fraction": 0.5}).eval_fraction == 0.5
        )
    with pytest.raises(ValidationError, match="eval_fraction"):
        PPOData.model_validate({"prompts": PROMPTS, "eval_fraction": 0.5})
    with pytest.raises(ValidationError, match="eval_fraction"):
        evaluation(data={"prompts": PROMPTS, "eval_fraction": 0.5})


@pytest.mark.parametrize("changes", [{"resume": "auto"}, {"checkpoint": {"every_steps": 1}}])
def test_an_evaluation_has_no_checkpoints(changes: dict[str, Any]):
    assert evaluation().resume == "no"
    with pytest.raises(ValidationError, match="Extra inputs"):
        evaluation(**changes)


def test_an_evaluation_that_generates_leaves_room_for_prompts():
    with pytest.raises(ValidationError, match="max_response_tokens 64 leaves no room for a prompt"):
        evaluation(rollout={"max_response_tokens": 64})
    text = {"instructions": [{"path": "a", "kind": "text"}], "max_length_tokens": 64}
    assert evaluation(data=text, rollout={"max_response_tokens": 64}), "nothing is generated"
