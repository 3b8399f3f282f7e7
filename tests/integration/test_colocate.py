"""PPO whose roles take turns on their memory ends where PPO whose roles do not ends, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import metrics, weights

from rlhf_dist.ppo.build import run_ppo
from rlhf_dist.ppo.config import PPOConfig

pytestmark = [pytest.mark.timeout(600)]
Make = Callable[..., dict[str, Any]]
ROLES = ("policy", "value", "reference", "reward", "rollout")


@pytest.mark.parametrize(
    ("cluster", "ranks", "stage", "precision"),
    [("inline", 1, 2, "bf16"), ("inline", 1, 3, "fp32"), ("ray", 2, 2, "fp32"), ("ray", 2, 3, "bf16")],
)
def test_taking_turns_changes_no_result(
    make_config: Make, tmp_path: Path, cluster: str, ranks: int, stage: int, precision: str
):
    def run(folder: Path, colocate: bool) -> None:
        made = make_config("ppo", folder, ranks=ranks, zero_stage=stage, cluster=cluster)
        for role in ROLES:
            made[role] |= {"gpus_per_rank": 0.2}
            if role != "rollout":
                made[role] |= {"precision": precision}
        made["ppo"] |= {"num_iterations": 2, "eval_every_iterations": 1, "ema_decay": 0.9}
        made["checkpoint"] = {"every_steps": 1}
        run_ppo(PPOConfig.model_validate(made | {"colocate": colocate}))

    apart, turns = tmp_path / "apart", tmp_path / "turns"
    run(apart, False)
    run(turns, True)
    for model in ("model", "model_ema"):
        expected, found = weights(apart, model), weights(turns, model)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())
    assert metrics(turns) == metrics(apart)
