"""Roles that take turns on GPUs, on paper: the largest phase counts, not the sum; with numbers computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.planning import tables, turns
from rlhf_dist.planning.hardware import GPUS, Cluster
from rlhf_dist.planning.plan import Plan, plan_run
from rlhf_dist.ppo.config import PPOConfig

ROLES = ("policy", "value", "reference", "reward", "rollout")


def planned(lm: Path, rm: Path, gpu: str = "h100", **changes: Any) -> Plan:
    hosted = {"precision": "bf16", "gpus_per_rank": 0.2}
    trained = hosted | {"zero_stage": 2}
    config = PPOConfig.model_validate(
        {
            "run_dir": "never-written",
            "policy": {"model_path": str(lm), **trained},
            "value": {"model_path": str(rm), **trained},
            "reference": {"model_path": str(lm), **hosted},
            "reward": {"model_path": str(rm), **hosted},
            "rollout": {"gpus_per_rank": 0.2, "max_response_tokens": 32},
            "data": {"prompts": [{"path": "p.jsonl", "kind": "prompt"}], "max_length_tokens": 96},
            **changes,
        }
    )
    return plan_run(config, Cluster(GPUS[gpu], 1, 1, 80 * 10**9))


@pytest.fixture(scope="module")
def plans(tiny_lm: Path, tiny_rm: Path) -> tuple[Plan, Plan]:
    """(apart, taking turns)."""
    return planned(tiny_lm, tiny_rm), planned(tiny_lm, tiny_rm, colocate=True)


def test_a_gpu_has_to_hold_the_largest_phase_and_every_context(plans: tuple[Plan, Plan]):
    apart, together = (next(iter(plan.gpus.values())) for plan in plans)
    memory = plans[0].memory
    assert apart == sum(memory[role].gpu_bytes for role in ROLES)
    phases = turns.together([plans[1].memory[role] for role in ROLES])
    assert together == max(phases.values()) + int(0.05 * max(phases.values())) + 5 * 600_000_000
    assert together < apart
    assert phases["generate"] == memory["rollout"].total("generate").gpu
    assert phases["policy"] == max(memory["policy"].total(own).gpu for own in ("update", "step", "save"))


def test_scores_take_weights_without_what_training_holds(plans: tuple[Plan, Plan]):
    policy = plans[1].memory["policy"]
    items = policy.phases["score"]
    assert "optimizer" in items
    kept = sum(items[name].gpu for name in ("optimizer", "gradients", "buffers") if name in items)
    assert turns.held_in(policy, "score") == policy.total("score").gpu - kept
    assert turns.held_in(policy, "generate") == 0


def test_what_moves_between_phases(plans: tuple[Plan, Plan]):
    memory = plans[1].memory
    weights = {role: memory[role].phases["load"]["parameters"].gpu for role in ROLES}
    rest = {role: turns.resting_bytes(memory[role], "full") - weights[role] for role in ("policy", "value")}
    assert min(rest.values()) > 0
    assert turns.moved_bytes([memory[role] for role in ROLES]) == {
        # Out: the policy's weights, which the sync read. The engine's stay: only its KV cache comes anew.
        "generate": weights["policy"],
        "score": weights["rollout"] + sum(weights[role] for role in ROLES if role != "rollout"),
        "policy": rest["policy"] + weights["value"] + weights["reference"] + weights["reward"],
        "value": weights["policy"] + rest["policy"] + weights["value"] + rest["value"],
        "sync": weights["value"] + rest["value"] + weights["policy"] + weights["rollout"],
    }


def test_host_memory_and_times_grow_by_what_moves(plans: tuple[Plan, Plan]):
    apart, together = plans
    memory = together.memory
    more = sum(turns.resting_bytes(memory[role], "full") for role in ROLES)
    assert together.hosts[0] - apart.hosts[0] == more
    moved = turns.moved_bytes([memory[role] for role in ROLES])
    for phase, own in (
        ("generate", ["generate"]),
        ("score", ["score"]),
        ("update", ["policy", "value"]),
        ("sync", ["sync"]),
    ):
        seconds = sum(moved[name] for name in own) / together.rates.host_copy_bytes_per_s
        assert together.timeline.seconds[phase] - apart.timeline.seconds[phase] == pytest.approx(seconds)


def test_vllm_may_take_the_whole_gpu_while_the_others_sleep(tiny_lm: Path, tiny_rm: Path):
    rollout = {"gpus_per_rank": 0.2, "max_response_tokens": 32, "engine": "vllm"}
    apart, together = (planned(tiny_lm, tiny_rm, rollout=rollout, colocate=turn) for turn in (False, True))
    taken = [plan.memory["rollout"].engine.taken(80 * 10**9) for plan in (apart, together)]  # pyright: ignore
    assert taken == [int(0.9 * 0.2 * 80e9), int(0.9 * 80e9)]
    assert together.problems == []
    assert together.others_bytes("rollout") == 4 * 600_000_000


def test_the_table_says_what_roles_hold_together(plans: tuple[Plan, Plan]):
    assert "take turns (colocate), and hold together: load " in tables.phases(plans[1]).note
    assert "take turns" not in tables.phases(plans[0]).note
