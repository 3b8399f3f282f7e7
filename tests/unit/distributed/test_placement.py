"""Which rank gets which bundle."""

from __future__ import annotations

import re

import pytest

from rlhf_dist.config.hosting import Placement
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.distributed.group import WorkerSpec, describe
from rlhf_dist.distributed.ray.placement import PlacementPlan, Slot, misfit, plan_placement
from rlhf_dist.rollout.config import RolloutConfig


def ask(num_ranks: int, gpus: float = 1.0, cpus: float = 1.0, strategy: str = "PACK") -> Placement:
    return Placement(num_ranks=num_ranks, gpus_per_rank=gpus, cpus_per_rank=cpus, placement_strategy=strategy)  # pyright: ignore


def only(plan: PlacementPlan):
    (reservation,) = plan.reservations
    return reservation.bundles


def test_on_cpus_every_rank_has_a_bundle_and_fractions_do_not_matter():
    plan = plan_placement({"policy": ask(2, gpus=0.5, cpus=2), "value": ask(1)}, "cpu")
    assert only(plan) == [{"CPU": 2}, {"CPU": 2}, {"CPU": 1}]
    assert plan.ranks == {"policy": [(0, 0), (0, 1)], "value": [(0, 2)]}
    assert (plan.total_cpus, plan.total_gpus) == (5, 0)


def test_whole_gpus_are_not_shared():
    plan = plan_placement({"policy": ask(2), "value": ask(2)}, "cuda")
    assert plan.total_gpus == 4
    assert not set(plan.ranks["policy"]) & set(plan.ranks["value"])


def test_fractions_share_gpu_by_rank_and_never_within_a_role():
    plan = plan_placement(
        {"policy": ask(2), "reference": ask(2, 0.3, cpus=2), "rollout": ask(1, 0.5), "reward": ask(3, 0.2)}, "cuda"
    )
    assert plan.total_gpus == 2 + 3
    assert plan.ranks["reference"] == plan.ranks["reward"][:2]
    assert plan.ranks["rollout"] == plan.ranks["reference"][:1]
    assert all(len(set(slots)) == len(slots) for slots in plan.ranks.values())
    assert not set(plan.ranks["policy"]) & set(plan.ranks["reward"])
    assert [only(plan)[slot.bundle]["CPU"] for slot in plan.ranks["reward"]] == [4, 3, 1]
    assert all(bundle["GPU"] == 1 for bundle in only(plan))


def test_fractions_that_fill_a_gpu_are_accepted():
    tenths = {f"role{i}": ask(1, 0.1) for i in range(10)}  # their floating-point sum is not 1
    assert plan_placement(tenths, "cuda").total_gpus == 1


def test_more_than_a_gpu_is_rejected_with_the_sum():
    with pytest.raises(ConfigError, match=r"reference 0.6 \+ reward 0.7 = 1.3 of itself; lower gpus_per_rank"):
        plan_placement({"reference": ask(1, 0.6), "reward": ask(2, 0.7)}, "cuda")


def test_another_strategy_is_a_reservation_of_its_own():
    plan = plan_placement(
        {
            "policy": ask(4, strategy="STRICT_PACK"),
            "value": ask(2),
            "reward": ask(2, 0.5, strategy="SPREAD"),
            "rollout": ask(3, 0.5, strategy="SPREAD"),
            "reference": ask(1),
        },
        "cuda",
    )
    assert [(r.strategy, r.roles, len(r.bundles)) for r in plan.reservations] == [
        ("STRICT_PACK", ["policy"], 4),
        ("PACK", ["value", "reference"], 3),
        ("SPREAD", ["reward", "rollout"], 3),
    ]
    assert plan.ranks["reference"] == [Slot(1, 2)]
    assert plan.ranks["reward"] == plan.ranks["rollout"][:2] == [Slot(2, 0), Slot(2, 1)]


def test_two_spread_roles_are_spread_each_by_itself():
    plan = plan_placement({"policy": ask(2, strategy="SPREAD"), "value": ask(2, strategy="SPREAD")}, "cpu")
    assert [r.roles for r in plan.reservations] == [["policy"], ["value"]]


def test_roles_on_the_same_gpus_cannot_lie_differently():
    with pytest.raises(ConfigError, match=r"differs \(reward PACK, rollout SPREAD\); make them equal"):
        plan_placement({"reward": ask(1, 0.5), "rollout": ask(1, 0.5, strategy="SPREAD")}, "cuda")


def test_ranks_are_numbered_node_by_node():
    plan = plan_placement({"policy": ask(4), "value": ask(2)}, "cpu")
    numbered = plan.numbered_by_node([["b", "a", "b", "a", "a", "b"]])
    assert numbered.ranks == {
        "policy": [Slot(0, 0), Slot(0, 2), Slot(0, 1), Slot(0, 3)],  # b b a a
        "value": [Slot(0, 4), Slot(0, 5)],
    }


def test_numbering_changes_no_gpu_of_a_role():
    """On several nodes rank i of one role need not share its GPU with rank i of another; the roles on a GPU stay."""
    plan = plan_placement({"value": ask(4, 0.5), "reward": ask(2, 0.25)}, "cuda")
    numbered = plan.numbered_by_node([["a", "b", "a", "b"]])
    assert numbered.ranks == {
        "value": [Slot(0, 0), Slot(0, 2), Slot(0, 1), Slot(0, 3)],  # a a b b
        "reward": [Slot(0, 0), Slot(0, 1)],
    }
    assert {role: set(slots) for role, slots in numbered.ranks.items()} == {r: set(s) for r, s in plan.ranks.items()}
    assert plan.numbered_by_node([["a"] * 4]).ranks == plan.ranks, "on one node rank i of every role shares GPU i"


TWO_NODES = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}]


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        ({"policy": ask(4, strategy="STRICT_PACK")}, None),
        ({"policy": ask(5, strategy="STRICT_PACK")}, r"policy must lie on one node .* 5 GPUs there, which none has"),
        ({"policy": ask(2, strategy="STRICT_SPREAD")}, None),
        ({"policy": ask(3, strategy="STRICT_SPREAD")}, r"3 different nodes \(STRICT_SPREAD\), and 2 nodes can"),
        ({"policy": ask(2, cpus=6, strategy="STRICT_PACK")}, r"12 CPUs and 2 GPUs"),
        ({"policy": ask(1, cpus=9)}, r"one rank of policy needs 9 CPUs and 1 GPU, which no single node has"),
        ({"policy": ask(6, strategy="SPREAD")}, None),
    ],
)
def test_what_nodes_cannot_hold(roles, says):
    found = misfit(plan_placement(roles, "cuda"), TWO_NODES, ("CPU", "GPU"))
    if says is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(says, found)


def test_the_demand_in_words():
    specs = [WorkerSpec("policy", ask(2, 0.5, 3), object), WorkerSpec("value", ask(1), object)]
    assert describe(specs, "cuda") == "policy 2 x 0.5 GPU, value 1 x 1 GPU"
    assert describe(specs, "cpu") == "policy 2 x 3 CPU, value 1 x 1 CPU"


def engines(num_ranks: int, size: int, gpus: float = 1.0, cpus: float = 1.0, strategy: str = "PACK") -> RolloutConfig:
    """A rollout role of vLLM engines of `size` ranks."""
    return RolloutConfig.model_validate(
        {
            "engine": "vllm",
            "num_ranks": num_ranks,
            "tensor_parallel_size": size,
            "gpus_per_rank": gpus,
            "cpus_per_rank": cpus,
            "placement_strategy": strategy,
        }
    )


def test_an_engine_has_one_bundle_for_all_its_ranks():
    plan = plan_placement({"policy": ask(2), "rollout": engines(8, 4, cpus=3)}, "cuda")
    assert only(plan) == [{"CPU": 1, "GPU": 1}] * 2 + [{"CPU": 12, "GPU": 4}] * 2
    assert plan.ranks["rollout"] == [Slot(0, 2)] * 4 + [Slot(0, 3)] * 4
    assert (plan.total_gpus, plan.total_cpus) == (10, 26)
    assert only(plan_placement({"rollout": engines(4, 2)}, "cpu")) == [{"CPU": 2}, {"CPU": 2}]


def test_the_ranks_of_an_engine_stay_neighbors_when_they_are_numbered():
    plan = plan_placement({"rollout": engines(8, 2)}, "cuda")
    numbered = plan.numbered_by_node([["b", "a", "b", "a"]])
    assert numbered.engines("rollout") == [[Slot(0, i)] * 2 for i in (0, 2, 1, 3)]
    assert numbered.split_engine({Slot(0, i): node for i, node in enumerate("baba")}) is None


def test_spread_engines_are_spread_each_as_a_whole():
    plan = plan_placement({"rollout": engines(4, 2, strategy="STRICT_SPREAD")}, "cuda")
    (reservation,) = plan.reservations
    assert (reservation.strategy, reservation.bundles) == ("STRICT_SPREAD", [{"CPU": 2, "GPU": 2}] * 2)


def test_engines_that_share_gpus_have_them_one_by_one_and_are_checked_when_granted():
    """In a bundle of several GPUs Ray could give two ranks of a role the same one."""
    plan = plan_placement({"reward": ask(4, 0.5), "rollout": engines(4, 2, gpus=0.5)}, "cuda")
    assert [bundle["GPU"] for bundle in only(plan)] == [1] * 4
    assert plan.ranks["rollout"] == plan.ranks["reward"] == [Slot(0, i) for i in range(4)]

    def granted(nodes: str) -> str | None:
        return plan.numbered_by_node([list(nodes)]).split_engine({Slot(0, i): node for i, node in enumerate(nodes)})

    assert granted("aaaa") is None
    assert granted("abab") is None
    reason = granted("aaab")
    assert reason is not None
    assert re.search(r"engine 1 of rollout .* \(tensor_parallel_size 2\) on 2 nodes.*gpus_per_rank 1", reason)


@pytest.mark.parametrize("strategy", ["SPREAD", "STRICT_SPREAD"])
def test_shared_gpus_that_are_spread_hold_no_engine(strategy: str):
    roles = {"reward": ask(2, 0.5, strategy=strategy), "rollout": engines(2, 2, gpus=0.5, strategy=strategy)}
    with pytest.raises(ConfigError, match=rf"is {strategy}, which puts .* \(tensor_parallel_size 2\) must lie on one"):
        plan_placement(roles, "cuda")


@pytest.mark.parametrize(
    ("rollout", "says"),
    [
        (engines(4, 4), None),
        (engines(8, 8), r"an engine of rollout \(tensor_parallel_size 8\) needs 8 GPUs and 8 CPUs on one node"),
        (engines(8, 8, gpus=0.5), r"needs 8 GPUs .* none has; lower rollout.tensor_parallel_size"),
        (engines(4, 4, cpus=3), r"needs 4 GPUs and 12 CPUs on one node"),
        (engines(4, 2, strategy="STRICT_SPREAD"), None),
        (engines(6, 2, strategy="STRICT_SPREAD"), r"the engines of rollout must lie on 3 different nodes"),
    ],
)
def test_engines_that_nodes_cannot_hold(rollout: RolloutConfig, says: str | None):
    found = misfit(plan_placement({"rollout": rollout}, "cuda"), TWO_NODES, ("GPU", "CPU"))
    if says is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(says, found)


def test_engines_in_words():
    specs = [WorkerSpec("rollout", engines(16, 8), object)]
    assert describe(specs, "cuda") == "rollout 16 x 1 GPU in engines of 8"
