"""The recipes on real data train: GSM8K as instructions, movie reviews with human ratings as preferences, PPO on both.

With the tiny model and a few steps: whether they run, not what they achieve.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny import save_tiny_lm

from rlhf_dist.config.load import load_config
from rlhf_dist.distributed.inline import InlineSession
from rlhf_dist.ppo.build import run_ppo
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.reward.build import run_reward
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.sft.build import run_sft
from rlhf_dist.sft.config import SFTConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"
SMALL = ["--cluster", "inline", "--device", "cpu"]


def test_sft_reward_and_ppo_run_from_yaml_on_real_data(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RECIPES.parents[1])
    # Its tokenizer knows little English, so a record has about a token a letter.
    tiny_lm = save_tiny_lm(tmp_path / "base", max_position_embeddings=512)
    session = InlineSession("cpu")

    def overrides(stage: str, **keys: object) -> list[str]:
        pairs = [("run_dir", tmp_path / stage), *((name.replace("__", "."), value) for name, value in keys.items())]
        return [*SMALL, *(word for name, value in pairs for word in (f"--{name}", str(value)))]

    model = {
        "model__model_path": tiny_lm,
        "model__precision": "fp32",
        "model__num_ranks": 1,
        "data__on_too_long": "skip",
    }
    short = {"data__max_length_tokens": 512}
    sft = load_config(
        SFTConfig, RECIPES / "gsm8k_sft.yaml", overrides("sft", **model, **short, sft__num_steps=2, sft__batch_size=4)
    )
    assert run_sft(sft, session)["num_steps"] == 2
    reward = load_config(
        RewardConfig,
        RECIPES / "movie_reward.yaml",
        overrides("reward", **model, **short, reward__num_steps=3, reward__batch_size=8),
    )
    summary = run_reward(reward, session)
    assert 0 < summary["after"]["eval_accuracy"] < 1
    frozen = {f"{role}__precision": "fp32" for role in ("policy", "value", "reference", "reward")}
    ppo = load_config(
        PPOConfig,
        RECIPES / "movie_ppo.yaml",
        overrides(
            "ppo",
            policy__model_path=tmp_path / "sft" / "model",
            reward__model_path=tmp_path / "reward" / "model",
            reference__model_path="null",
            value__model_path="null",
            policy__num_ranks=1,
            value__num_ranks=1,
            data__max_length_tokens=512,
            data__on_too_long="skip",
            rollout__max_response_tokens=8,
            ppo__num_iterations=1,
            ppo__prompts_per_iteration=4,
            ppo__mini_batch_size=2,
            ppo__ptx_batch_size=2,
            **frozen,
        ),
    )
    assert run_ppo(ppo, session)["num_iterations"] == 1
    for stage in ("sft", "reward", "ppo"):
        assert json.loads((tmp_path / stage / "summary.json").read_text())["seed"] == 0
        assert (tmp_path / stage / "model" / "model.safetensors").is_file()
