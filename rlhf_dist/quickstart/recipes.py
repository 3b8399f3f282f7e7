"""The configurations of the quickstart's stages.

They are ordinary configurations: each stage's resolved one is in its run folder, ready to be changed and run by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_dist.config.data import DataSource, PPOData, RecordKind, RewardData, SFTData
from rlhf_dist.config.hosting import (
    FrozenModel,
    OptimizerConfig,
    Precision,
    TrainedModel,
)
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.ppo.config import PPOConfig, PPOSettings
from rlhf_dist.reward.config import RewardConfig, RewardSettings
from rlhf_dist.rollout.config import RolloutConfig
from rlhf_dist.sft.config import SFTConfig, SFTSettings

_CPUS_PER_RANK = 0.25
"""So that PPO's seven processes fit on two cores: they mostly take turns."""

_DEVICE: Literal["cpu"] = "cpu"
"""Also where there are GPUs: the quickstart's placement and its promised minutes are those of two CPU cores."""

ClusterKind = Literal["ray", "inline"]


@dataclass(frozen=True)
class Stages:
    """Folders of the quickstart."""

    run_dir: Path

    @property
    def data(self) -> Path:
        """Starter records."""
        return self.run_dir / "00_data"

    @property
    def init(self) -> Path:
        """The untrained tiny model and its tokenizer."""
        return self.run_dir / "00_init"

    @property
    def pretrain(self) -> Path:
        """Pretraining on plain text (tiny only)."""
        return self.run_dir / "01_pretrain"

    @property
    def sft(self) -> Path:
        """Supervised fine-tuning."""
        return self.run_dir / "02_sft"

    @property
    def reward(self) -> Path:
        """Reward model."""
        return self.run_dir / "03_reward"

    @property
    def ppo(self) -> Path:
        """PPO."""
        return self.run_dir / "04_ppo"


@dataclass(frozen=True)
class Recipe:
    """The numbers in which the models differ; everything else is the same path."""

    name: str
    precision: Precision
    max_length_tokens: int
    max_response_tokens: int
    micro_batch_size: int
    pretrain: SFTSettings | None
    """None: the model is pretrained already."""
    sft: SFTSettings
    reward: RewardSettings
    ppo: PPOSettings
    learning_rates: Mapping[str, float]
    """Peak learning rate of each trained model: pretrain, sft, reward, policy, value."""
    eval_prompts: int
    eval_records: int
    trained_ranks: int = 2
    """Ranks of each trained model, with ZeRO-2."""


TINY = Recipe(
    name="tiny",
    precision="fp32",
    max_length_tokens=48,
    max_response_tokens=20,
    micro_batch_size=64,
    pretrain=SFTSettings(batch_size=32, num_steps=260),
    sft=SFTSettings(batch_size=32, num_steps=160),
    reward=RewardSettings(batch_size=48, num_steps=80),
    ppo=PPOSettings(
        num_iterations=14,
        prompts_per_iteration=128,
        mini_batch_size=64,
        num_epochs=2,
        # Large, because the reward model is sure of itself: its scores spread over several units.
        kl_coef=0.4,
        ptx_coef=0.1,
        ptx_batch_size=16,
    ),
    learning_rates={"pretrain": 6e-3, "sft": 2e-3, "reward": 1.5e-3, "policy": 5e-4, "value": 1e-3},
    eval_prompts=256,
    eval_records=512,
)
SMOLLM2 = Recipe(
    name="smollm2",
    precision="bf16",
    # Its chat template puts a system message of some 25 tokens in front.
    max_length_tokens=88,
    max_response_tokens=24,
    micro_batch_size=8,
    pretrain=None,
    sft=SFTSettings(batch_size=16, num_steps=24),
    reward=RewardSettings(batch_size=16, num_steps=40),
    ppo=PPOSettings(
        num_iterations=12,
        prompts_per_iteration=32,
        mini_batch_size=16,
        num_epochs=1,
        kl_coef=0.05,
        ptx_coef=0.05,
        ptx_batch_size=4,
    ),
    learning_rates={"pretrain": 1e-4, "sft": 1e-4, "reward": 5e-5, "policy": 2e-5, "value": 5e-5},
    eval_prompts=64,
    eval_records=128,
)
RECIPES = {recipe.name: recipe for recipe in (TINY, SMOLLM2)}


def recipe_named(name: str) -> Recipe:
    """The recipe of a model; ConfigError for an unknown name."""
    if name not in RECIPES:
        raise ConfigError(f"--model {name}: the quickstart knows {', '.join(RECIPES)}; choose one of them")
    return RECIPES[name]


def source(stages: Stages, name: str, kind: RecordKind, limit: int | None = None) -> DataSource:
    """A starter file as a data source."""
    return DataSource(path=str(stages.data / f"{name}.jsonl"), kind=kind, limit=limit)


def _trained(recipe: Recipe, role: str, model_path: Path, schedule: Literal["constant", "cosine"]) -> dict[str, Any]:
    return {
        "model_path": str(model_path),
        "precision": recipe.precision,
        "num_ranks": recipe.trained_ranks,
        "cpus_per_rank": _CPUS_PER_RANK,
        "zero_stage": 2,
        "micro_batch_size": recipe.micro_batch_size,
        "optimizer": OptimizerConfig(
            learning_rate=recipe.learning_rates[role], schedule=schedule, warmup_fraction=0.05
        ),
    }


def pretrain_config(recipe: Recipe, stages: Stages, model_path: Path, seed: int, cluster: ClusterKind) -> SFTConfig:
    """Plain text, full-sequence loss, from random weights."""
    assert recipe.pretrain is not None
    return SFTConfig(
        run_dir=stages.pretrain,
        seed=seed,
        cluster=cluster,
        device=_DEVICE,
        model=TrainedModel(**_trained(recipe, "pretrain", model_path, "cosine")),
        data=SFTData(
            max_length_tokens=recipe.max_length_tokens,
            train=(source(stages, "pretrain", "text"),),
            eval=(source(stages, "pretrain_eval", "text", recipe.eval_records),),
        ),
        sft=recipe.pretrain,
    )


def sft_config(recipe: Recipe, stages: Stages, model_path: Path, seed: int, cluster: ClusterKind) -> SFTConfig:
    """Instructions (loss on the answers only) mixed with a quarter of plain text."""
    return SFTConfig(
        run_dir=stages.sft,
        seed=seed,
        cluster=cluster,
        device=_DEVICE,
        model=TrainedModel(**_trained(recipe, "sft", model_path, "cosine")),
        data=SFTData(
            max_length_tokens=recipe.max_length_tokens,
            # Some plain text keeps the spelling of words alive while the format of answers is learned.
            train=(source(stages, "sft_train", "instruction"), source(stages, "ptx", "text")),
            eval=(source(stages, "sft_eval", "instruction", recipe.eval_records),),
        ),
        sft=recipe.sft,
    )


def reward_config(recipe: Recipe, stages: Stages, seed: int, cluster: ClusterKind) -> RewardConfig:
    """Human preferences, from the SFT model."""
    return RewardConfig(
        run_dir=stages.reward,
        seed=seed,
        cluster=cluster,
        device=_DEVICE,
        model=TrainedModel(**_trained(recipe, "reward", stages.sft / "model", "cosine")),
        data=RewardData(
            max_length_tokens=recipe.max_length_tokens,
            train=(source(stages, "pairs_train", "preference"),),
            eval=(source(stages, "pairs_eval", "preference", recipe.eval_records),),
        ),
        reward=recipe.reward,
    )


def ppo_config(recipe: Recipe, stages: Stages, seed: int, cluster: ClusterKind) -> PPOConfig:
    """Four roles: policy and value on `trained_ranks` ranks each, rollout, reference and reward on one each."""
    frozen = {
        "precision": recipe.precision,
        "micro_batch_size": recipe.micro_batch_size,
        "cpus_per_rank": _CPUS_PER_RANK,
    }
    value = _trained(recipe, "value", stages.reward / "model", "constant")
    return PPOConfig(
        run_dir=stages.ppo,
        seed=seed,
        cluster=cluster,
        device=_DEVICE,
        policy=TrainedModel(**_trained(recipe, "policy", stages.sft / "model", "constant")),
        reward=FrozenModel(model_path=str(stages.reward / "model"), **frozen),
        value=TrainedModel(**value),
        reference=FrozenModel(model_path=str(stages.sft / "model"), **frozen),
        rollout=RolloutConfig(
            max_response_tokens=recipe.max_response_tokens, batch_size=128, cpus_per_rank=_CPUS_PER_RANK
        ),
        data=PPOData(
            max_length_tokens=recipe.max_length_tokens,
            prompts=(source(stages, "prompts_train", "prompt"),),
            eval_prompts=(source(stages, "prompts_eval", "prompt", recipe.eval_prompts),),
            ptx=(source(stages, "ptx", "text"),),
        ),
        ppo=recipe.ppo,
    )
