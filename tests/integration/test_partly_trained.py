"""Whole runs of models that are trained in part, on Ray: what they leave, and that they resume bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.runs import metrics, weights
from transformers import AutoModelForSequenceClassification

from rlhf_dist.ppo.build import run_ppo
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.reward.build import run_reward
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.sft.build import run_sft
from rlhf_dist.sft.config import SFTConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Make = Callable[..., dict[str, Any]]
LORA = {"rank": 4, "alpha": 8.0}


def resumed(whole: Path, folder: Path) -> Path:
    """A copy of a finished run as it stood after its checkpoint at step 2."""
    shutil.copytree(whole, folder)
    for name in ("checkpoints/step_000004", "model", "adapter"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "summary.json").unlink()
    return folder


@pytest.mark.parametrize(("ranks", "stage", "cluster"), [(2, 3, "ray"), (1, 2, "inline")])
def test_a_reward_model_with_adapters_and_low_margin_pairs(
    make_config: Make, tiny_lm: Path, tmp_path: Path, ranks: int, stage: int, cluster: str
):
    rows = [
        {"prompt": f"say {i}", "chosen": f"good {i}", "rejected": "bad", "margin": 0.2 if i % 3 else 1.5}
        for i in range(30)
    ]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def config(run_dir: Path, **changes: Any) -> RewardConfig:
        made = make_config("reward", run_dir, ranks=ranks, zero_stage=stage, cluster=cluster) | changes
        made["model"] |= {"lora": LORA, "gradient_checkpointing": True}
        made["data"]["train"] = [{"path": str(source), "kind": "preference"}]
        made["reward"] |= {"low_margin": {"below": 0.5}}
        return RewardConfig.model_validate(made | {"checkpoint": {"every_steps": 2}})

    whole = tmp_path / "whole"
    run_reward(config(whole))
    steps = dict(metrics(whole))
    assert {"reward_model/eval_low_margin_accuracy", "reward_model/eval_other_accuracy"} <= steps[4].keys()

    base = AutoModelForSequenceClassification.from_pretrained(tiny_lm, num_labels=1)
    merged = peft.PeftModel.from_pretrained(base, str(whole / "adapter")).merge_and_unload()
    saved = weights(whole)
    for name, parameter in merged.named_parameters():
        assert torch.allclose(parameter, saved[name], atol=1e-6), name

    again = resumed(whole, tmp_path / "again")
    run_reward(config(again, resume="auto"))
    assert all(torch.equal(weights(again)[name], tensor) for name, tensor in saved.items())
    assert metrics(again) == metrics(whole)
    adapters = [run / "adapter" / "adapter_model.safetensors" for run in (whole, again)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_frozen_layers_resume_bit_for_bit(make_config: Make, tmp_path: Path, tiny_lm: Path):
    def config(run_dir: Path, **changes: Any) -> SFTConfig:
        made = make_config("sft", run_dir, ranks=2, zero_stage=2) | changes
        made["model"] |= {"freeze": {"num_layers": 1, "embeddings": True}}
        return SFTConfig.model_validate(made | {"checkpoint": {"every_steps": 2}})

    whole = tmp_path / "whole"
    run_sft(config(whole))
    again = resumed(whole, tmp_path / "again")
    run_sft(config(again, resume="auto"))
    start, end, after = weights(tiny_lm.parent, tiny_lm.name), weights(whole), weights(again)
    assert start.keys() == end.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in end.items())
    moved = {name for name, tensor in end.items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if not name.startswith(("model.embed_tokens", "model.layers.0."))}


@pytest.mark.parametrize("stage", [2, 3])
def test_ppo_with_adapters_in_policy_and_value(make_config: Make, tmp_path: Path, tiny_lm: Path, stage: int):
    """Its own checks are on: rollouts come from the weights that were sent, merged, and updates start on policy."""
    made = make_config("ppo", tmp_path / "run", zero_stage=stage, cluster="inline")
    made["policy"] |= {"lora": LORA}
    made["value"] |= {"lora": LORA}
    run_ppo(PPOConfig.model_validate(made))
    mismatch = [line["rollout/logprob_mismatch"] for _, line in metrics(tmp_path / "run") if "policy/loss" in line]
    assert len(mismatch) == 3
    assert max(mismatch) < 1e-4
    start, end = weights(tiny_lm.parent, tiny_lm.name), weights(tmp_path / "run")
    moved = {name for name, tensor in end.items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if "_proj." in name}
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
