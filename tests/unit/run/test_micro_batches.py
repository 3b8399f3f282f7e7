"""A token budget that a row may exceed is rejected before a model or a data file is looked at."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_dist.config.hosting import FrozenModel
from rlhf_dist.core.errors import ConfigError, ModelError
from rlhf_dist.evaluation.build import prepare as prepare_eval
from rlhf_dist.evaluation.config import EvalConfig
from rlhf_dist.ppo.build import prepare as prepare_ppo
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.reward.build import prepare as prepare_reward
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.run.checks import check_micro_batches
from rlhf_dist.sft.build import prepare as prepare_sft
from rlhf_dist.sft.config import SFTConfig

MISSING = "/there/is/no/such/model"
TEXT = [{"path": "/there/is/none.jsonl", "kind": "text"}]


def supervised(schema: Any, budget: int) -> Any:
    model = {"model_path": MISSING, "micro_batch_tokens": budget}
    return schema.model_validate({"run_dir": "r", "model": model, "data": {"train": TEXT, "max_length_tokens": 100}})


def ppo(role: str, budget: int) -> PPOConfig:
    sections: dict[str, Any] = {"policy": {"model_path": MISSING}, "reward": {"model_path": MISSING}}
    sections[role] = sections.get(role, {}) | {"micro_batch_tokens": budget}
    data = {"prompts": [{"path": "p", "kind": "prompt"}], "max_length_tokens": 100}
    return PPOConfig.model_validate(
        {"run_dir": "r", "data": data, "rollout": {"max_response_tokens": 20}, "ppo": {"ptx_coef": 0}} | sections
    )


def evaluation(budget: int) -> EvalConfig:
    reward = {"model_path": MISSING, "micro_batch_tokens": budget}
    data = {"preferences": [{"path": "p", "kind": "preference"}], "max_length_tokens": 100}
    return EvalConfig.model_validate({"run_dir": "r", "reward": reward, "data": data})


@pytest.mark.parametrize(
    ("prepare", "config", "needed", "role"),
    [
        (prepare_sft, lambda budget: supervised(SFTConfig, budget), 100, "model"),
        (prepare_reward, lambda budget: supervised(RewardConfig, budget), 200, "model"),
        (prepare_ppo, lambda budget: ppo("policy", budget), 100, "policy"),
        (prepare_ppo, lambda budget: ppo("value", budget), 100, "value"),
        (prepare_ppo, lambda budget: ppo("reference", budget), 100, "reference"),
        (prepare_ppo, lambda budget: ppo("reward", budget), 100, "reward"),
        (prepare_eval, evaluation, 100, "reward"),
    ],
)
def test_every_command_checks_every_role(prepare: Any, config: Any, needed: int, role: str):
    remedy = f"{role}.micro_batch_tokens is {needed - 1} .*data.max_length_tokens is 100.*at least {needed}"
    with pytest.raises(ConfigError, match=remedy):
        prepare(config(needed - 1))
    with pytest.raises(ModelError, match=MISSING):  # the next thing that is wrong
        prepare(config(needed))


def test_the_message_says_what_shares_a_pass():
    model = FrozenModel(model_path="m", micro_batch_tokens=30)
    with pytest.raises(ConfigError, match="4 sequences of a row in one forward pass may take 40 tokens"):
        check_micro_batches(model, 10, "model", num_sequences=4)
    check_micro_batches(FrozenModel(model_path="m"), 10**9, "model")


@pytest.mark.parametrize("budget", [0, -1, 1.5])
def test_a_budget_is_a_positive_number_of_tokens(budget: float):
    with pytest.raises(ValidationError, match="micro_batch_tokens"):
        FrozenModel.model_validate({"model_path": "m", "micro_batch_tokens": budget})
