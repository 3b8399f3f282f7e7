"""What the run summary says of trained and frozen parameters, and which settings of LoRA and freezing are invalid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_dist.config.hosting import TrainedModel
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.reward.build import prepare as prepare_reward
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.sft.build import prepare as prepare_sft
from rlhf_dist.sft.config import SFTConfig


@pytest.fixture
def make(tiny_lm: Path, tmp_path: Path):
    def make(model: Any = ()) -> RewardConfig:
        path = tmp_path / "pairs.jsonl"
        rows = [{"prompt": f"say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(4)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return RewardConfig.model_validate(
            {
                "run_dir": str(tmp_path / "run"),
                "cluster": "inline",
                "model": {"model_path": str(tiny_lm), "precision": "fp32"} | dict(model),
                "data": {"train": [{"path": str(path), "kind": "preference"}], "max_length_tokens": 64},
                "reward": {"batch_size": 2, "num_steps": 1},
            }
        )

    return make


def test_what_is_trained_is_said_in_counts(make):
    summary = prepare_reward(make(model={"lora": {"rank": 2}})).run_summary
    assert summary["model: trained parameters"] == "3,776 of 84,736 (4.46%): adapters 3,712 in 28, head 64 in 1 tensors"
    assert summary["model: frozen parameters"].endswith(
        ": embeddings 19,200 in 1, layers 61,696 in 18, rest 64 in 1 tensors"
    )
    assert "model: trained parameters" not in prepare_reward(make()).run_summary


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"freeze": {"num_layers": 9}}, "freeze.num_layers is 9 but the model has 2 layers"),
        ({"lora": {"target_modules": ["nothing"]}}, "names 'nothing', which no layer"),
    ],
)
def test_what_the_model_does_not_have_is_rejected_before_a_process_starts(
    tiny_lm: Path, tmp_path: Path, model, message
):
    (tmp_path / "a.jsonl").write_text('{"text": "good and bad"}\n' * 4, encoding="utf-8")
    config = SFTConfig.model_validate(
        {
            "run_dir": "r",
            "model": {"model_path": str(tiny_lm)} | model,
            "data": {"train": [{"path": str(tmp_path / "a.jsonl"), "kind": "text"}], "max_length_tokens": 64},
            "sft": {"batch_size": 2},
        }
    )
    with pytest.raises(ConfigError, match=message):
        prepare_sft(config)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"freeze": {"all_but_head": True, "embeddings": True}}, "all_but_head is true and embeddings is true"),
        ({"freeze": {"all_but_head": True, "num_layers": 2}}, "all_but_head is true and num_layers is 2"),
        ({"freeze": {"num_layers": 1}, "lora": {}}, "lora is set, which freezes all .* remove one of the two"),
        ({"lora": {"rank": 0}}, "greater than or equal to 1"),
        ({"lora": {"dropout": 1.0}}, "less than 1"),
        ({"lora": {"target_modules": []}}, "must name at least one layer"),
        ({"lora": {"target_modules": [" "]}}, "must name at least one layer"),
        ({"lora": {"target_modules": "all_linear"}}, "all-linear"),
    ],
)
def test_contradictions_of_what_is_trained(model, message: str):
    with pytest.raises(ValidationError, match=message):
        TrainedModel.model_validate({"model_path": "m"} | model)


def test_an_average_of_adapters_is_rejected():
    config = {
        "run_dir": "r",
        "policy": {"model_path": "p", "lora": {}},
        "reward": {"model_path": "r"},
        "data": {"prompts": [{"path": "a", "kind": "prompt"}]},
        "ppo": {"ema_decay": 0.9},
    }
    with pytest.raises(ValidationError, match=r"ema_decay is 0\.9 and policy.lora is set"):
        PPOConfig.model_validate(config)
