"""Settings of PPO that concern its rollouts: what fits together, and what `auto` comes to."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_dist.ppo.build import _precisions
from rlhf_dist.ppo.config import PPOConfig


def config(
    ppo: dict[str, Any], rollout: dict[str, Any] | None = None, policy: dict[str, Any] | None = None
) -> PPOConfig:
    return PPOConfig.model_validate(
        {
            "run_dir": "never-written",
            "policy": {"model_path": "p", "precision": "fp32"} | (policy or {}),
            "reward": {"model_path": "r"},
            "rollout": rollout or {},
            "data": {"prompts": [{"path": "a.jsonl", "kind": "prompt"}]},
            "ppo": ppo,
        }
    )


@pytest.mark.parametrize(
    ("ppo", "rollout", "cap"),
    [
        ({}, {}, None),
        ({}, {"engine": "vllm"}, 2.0),
        ({}, {"top_p": 0.9}, 2.0),
        ({"off_policy_iterations": 1}, {}, 2.0),
        ({"importance_cap": "off", "off_policy_iterations": 1}, {"engine": "vllm"}, None),
        ({"importance_cap": 3}, {}, 3.0),
    ],
)
def test_the_automatic_cap_is_on_where_rollouts_are_not_the_policys(ppo: dict, rollout: dict, cap: float | None):
    assert config(ppo, rollout).importance_cap == cap


@pytest.mark.parametrize(
    ("ppo", "rollout", "said"),
    [
        ({}, {"engine": "vllm"}, "rollout.engine is vllm, but .* only with hf"),
        ({}, {"precision": "bf16"}, "rollout.precision is bf16, but .* only with the policy's fp32"),
        ({}, {"top_p": 0.9}, "rollout.top_p is 0.9, but .* only with 1"),
        ({}, {"top_k": 5}, "rollout.top_k is 5, but .* only with 0"),
        ({}, {"min_p": 0.1}, "rollout.min_p is 0.1, but .* only with 0"),
        ({"off_policy_iterations": 1}, {}, "ppo.off_policy_iterations is 1, but .* only with 0"),
        ({"importance_cap": 2.0}, {}, "ppo.importance_cap is 2.0, but .* only with auto or off"),
        ({"importance_range": 1.5}, {}, "ppo.importance_range is 1.5, but .* only with null"),
    ],
)
def test_log_probs_of_rollouts_need_an_engine_that_computes_as_the_policy(ppo: dict, rollout: dict, said: str):
    with pytest.raises(ValidationError, match=f"ppo.old_logprobs is rollout and {said}; set that"):
        config({"old_logprobs": "rollout"} | ppo, rollout)
    config(ppo, rollout)


def test_log_probs_of_rollouts_in_the_policys_precision():
    assert (
        config({"old_logprobs": "rollout"}, {"precision": "bf16"}, {"precision": "bf16"}).ppo.old_logprobs == "rollout"
    )


@pytest.mark.parametrize("value", [-1, 0, "yes", False])
def test_a_cap_is_a_word_or_a_positive_number(value: object):
    with pytest.raises(
        ValidationError, match=re.escape(f"importance_cap is {value!r}; set it to auto, off or a number")
    ):
        config({"importance_cap": value})


@pytest.mark.parametrize("changes", [{"importance_range": 1}, {"off_policy_iterations": 2}])
def test_limits(changes: dict):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        config(changes)


def test_only_log_probs_of_one_distribution_are_compared():
    assert _precisions(config({})).rollout == "fp32"
    assert _precisions(config({}, {"precision": "bf16"})).rollout == "bf16"
    assert _precisions(config({})).same_distribution
    assert not _precisions(config({}, {"top_k": 5})).same_distribution


SHARED = {"gpus_per_rank": 0.5}


@pytest.mark.parametrize(
    ("ppo", "rollout", "policy", "says"),
    [
        ({}, SHARED | {"num_chunks": 2}, SHARED, "colocate is true and rollout.num_chunks is 2"),
        ({"off_policy_iterations": 1}, SHARED, SHARED, "colocate is true and ppo.off_policy_iterations is 1"),
        ({}, SHARED, {}, "no two roles share GPUs; set gpus_per_rank"),
    ],
)
def test_roles_cannot_take_turns_where_phases_overlap_or_nobody_shares(
    ppo: dict[str, Any], rollout: dict[str, Any], policy: dict[str, Any], says: str
):
    apart = config(ppo, rollout, policy)
    with pytest.raises(ValueError, match=says):
        PPOConfig.model_validate(apart.model_dump() | {"colocate": True})


def test_only_roles_that_share_gpus_take_turns():
    shared = config({}, SHARED, SHARED).model_dump() | {"colocate": True}
    assert PPOConfig.model_validate(shared).colocated_roles == ("policy", "rollout")
    assert len(PPOConfig.model_validate(shared | {"cluster": "inline"}).colocated_roles) == 5
