"""Which rank gets which bundle."""

from __future__ import annotations

import pytest

from rlhf_dist.cluster.group import WorkerSpec, describe
from rlhf_dist.cluster.placement import plan_placement
from rlhf_dist.config import Placement
from rlhf_dist.errors import ConfigError


def spec(role: str, num_ranks: int, gpus: float = 1.0, cpus: float = 1.0) -> WorkerSpec:
    return WorkerSpec(role, "x:Y", Placement(num_ranks=num_ranks, gpus_per_rank=gpus, cpus_per_rank=cpus))


def test_on_cpus_every_rank_has_a_bundle_and_fractions_do_not_matter():
    plan = plan_placement([spec("policy", 2, gpus=0.5, cpus=2), spec("value", 1)], "cpu")
    assert plan.bundles == [{"CPU": 2}, {"CPU": 2}, {"CPU": 1}]
    assert plan.ranks == {"policy": [0, 1], "value": [2]}
    assert (plan.total_cpus, plan.total_gpus) == (5, 0)


def test_whole_gpus_are_not_shared():
    plan = plan_placement([spec("policy", 2), spec("value", 2)], "cuda")
    assert plan.total_gpus == 4
    assert not set(plan.ranks["policy"]) & set(plan.ranks["value"])


def test_fractions_share_gpu_by_rank_and_never_within_a_role():
    plan = plan_placement(
        [spec("policy", 2), spec("reference", 2, 0.3, cpus=2), spec("rollout", 1, 0.5), spec("reward", 3, 0.2)], "cuda"
    )
    assert plan.total_gpus == 2 + 3
    assert plan.ranks["reference"] == plan.ranks["reward"][:2]
    assert plan.ranks["rollout"] == plan.ranks["reference"][:1]
    assert all(len(set(bundles)) == len(bundles) for bundles in plan.ranks.values())
    assert not set(plan.ranks["policy"]) & set(plan.ranks["reward"])
    assert [plan.bundles[i]["CPU"] for i in plan.ranks["reward"]] == [4, 3, 1]
    assert all(bundle["GPU"] == 1 for bundle in plan.bundles)


def test_fractions_that_fill_a_gpu_are_accepted():
    tenths = [spec(f"role{i}", 1, 0.1) for i in range(10)]  # their floating-point sum is not 1
    assert plan_placement(tenths, "cuda").total_gpus == 1


def test_more_than_a_gpu_is_refused_with_the_sum():
    with pytest.raises(ConfigError, match=r"reference 0.6 \+ reward 0.7 = 1.3 of itself; lower gpus_per_rank"):
        plan_placement([spec("reference", 1, 0.6), spec("reward", 2, 0.7)], "cuda")


def test_the_demand_in_words():
    specs = [spec("policy", 2, 0.5, 3), spec("value", 1)]
    assert describe(specs, "cuda") == "policy 2 x 0.5 GPU, value 1 x 1 GPU"
    assert describe(specs, "cpu") == "policy 2 x 3 CPU, value 1 x 1 CPU"
