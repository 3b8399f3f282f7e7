"""The configuration DeepSpeed gets, and what a user's own file may not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.distributed.deepspeed.zero import ds_config


def written(path: Path, content: object) -> Path:
    file = path / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def test_sections_of_the_file_replace_the_generated_ones(tmp_path: Path):
    file = written(
        tmp_path, {"zero_optimization": {"stage": 2, "contiguous_gradients": True}, "bf16": {"enabled": True}}
    )
    config = ds_config(zero_stage=2, precision="bf16", max_grad_norm=0.5, path=file)
    assert config["zero_optimization"] == {"stage": 2, "contiguous_gradients": True}
    assert config["bf16"] == {"enabled": True}
    assert config["gradient_accumulation_steps"] == 1
    assert config["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"is not JSON: line 1"),
        ("[]", r"holds a list; it must hold a JSON object"),
        ({"optimizer": {}}, r"sets optimizer; remove it: optimizer is set by optimizer of the role"),
        ({"train_batch_size": 8, "scheduler": {}}, r"sets scheduler, train_batch_size; remove it"),
        ({"zero_optimization": {"stage": 3}}, r"has ZeRO stage 3 but the role's zero_stage is 2; make them equal"),
        ({}, r"has ZeRO stage 0 but the role's zero_stage is 2"),
        (
            {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
            r"bf16.enabled true but the role's precision is fp32",
        ),
    ],
)
def test_a_file_that_contradicts_the_run_is_rejected(tmp_path: Path, content: object, message: str):
    with pytest.raises(ConfigError, match=message):
        ds_config(zero_stage=2, precision="fp32", path=written(tmp_path, content))


def test_a_missing_file_is_rejected(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        ds_config(zero_stage=2, precision="fp32", path=tmp_path / "none.json")
