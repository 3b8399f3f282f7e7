"""What a run must share with its checkpoints to go on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.run.launch import checkpoints
from rlhf_dist.run.prepared import Prepared


def identity(run_dir: Path, **ppo: Any) -> dict[str, Any]:
    config = PPOConfig.model_validate(
        {
            "run_dir": run_dir,
            "policy": {"model_path": "lm"},
            "reward": {"model_path": "rm"},
            "data": {"prompts": [{"path": "p.jsonl", "kind": "prompt"}], "max_length_tokens": 256},
            "ppo": ppo,
        }
    )
    return checkpoints(config, Prepared([], None, {"prompts": 3})).identity


def test_a_check_that_stopped_a_run_may_be_switched_off_on_resume(tmp_path: Path):
    assert identity(tmp_path, self_checks=False) == identity(tmp_path)


def test_what_changes_the_numbers_may_not_change(tmp_path: Path):
    now = identity(tmp_path, adaptive_kl_target=6.0, ema_decay=0.9)
    differing = {key for key, value in identity(tmp_path).items() if now[key] != value}
    assert differing == {"ppo.adaptive_kl_target", "ppo.ema_decay"}
