"""The quickstart's configurations: two-rank ZeRO-2 where something is trained, one rank elsewhere, stages chained."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.quickstart.recipes import (
    RECIPES,
    TINY,
    Stages,
    ppo_config,
    pretrain_config,
    recipe_named,
    reward_config,
    sft_config,
)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_stages_chain_and_train_on_two_ranks(recipe, tmp_path: Path):
    stages, base = Stages(tmp_path), tmp_path / "base"
    sft = sft_config(recipe, stages, base, 7, "ray")
    reward = reward_config(recipe, stages, 7, "ray")
    ppo = ppo_config(recipe, stages, 7, "ray")
    assert sft.model.model_path == str(base)
    assert reward.model.model_path == ppo.policy.model_path == str(sft.run_dir / "model")
    assert ppo.reward.model_path == ppo.value.model_path == str(reward.run_dir / "model")
    assert ppo.reference.model_path == ppo.policy.model_path
    for trained in (sft.model, reward.model, ppo.policy, ppo.value):
        assert (trained.num_ranks, trained.zero_stage) == (2, 2)
    for single in (ppo.reward, ppo.reference, ppo.rollout):
        assert single.num_ranks == 1
    assert {config.seed for config in (sft, reward, ppo)} == {7}
    assert ppo.ppo.ptx_coef > 0


def test_seven_processes_fit_on_two_cores(tmp_path: Path):
    ppo = ppo_config(TINY, Stages(tmp_path), 0, "ray")
    roles = (ppo.policy, ppo.value, ppo.reward, ppo.reference, ppo.rollout)
    assert sum(role.num_ranks for role in roles) == 7
    assert sum(role.num_ranks * role.cpus_per_rank for role in roles) <= 2


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_gpus_are_left_alone(recipe, tmp_path: Path):
    stages, base = Stages(tmp_path), tmp_path / "base"
    configs = [sft_config(recipe, stages, base, 0, "ray"), reward_config(recipe, stages, 0, "ray")]
    configs += [ppo_config(recipe, stages, 0, "ray")]
    configs += [pretrain_config(recipe, stages, base, 0, "ray")] if recipe.pretrain else []
    assert {config.device for config in configs} == {"cpu"}


def test_the_tiny_model_is_pretrained_first(tmp_path: Path):
    config = pretrain_config(TINY, Stages(tmp_path), tmp_path / "init", 0, "inline")
    assert config.run_dir == tmp_path / "01_pretrain"
    assert {source.kind for source in config.data.train} == {"text"}


def test_an_unknown_model_is_rejected():
    with pytest.raises(ConfigError, match="--model huge: the quickstart knows tiny, smollm2"):
        recipe_named("huge")
