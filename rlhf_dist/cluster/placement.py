"""Which rank gets which bundle of resources. Pure: no Ray here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_dist.cluster.group import WorkerSpec
from rlhf_dist.errors import ConfigError


@dataclass
class PlacementPlan:
    """Bundles to reserve, and where each rank goes."""

    bundles: list[dict[str, float]] = field(default_factory=list)
    ranks: dict[str, list[int]] = field(default_factory=dict)
    """Role → bundle of each rank."""

    @property
    def total_cpus(self) -> float:
        """CPUs over all bundles."""
        return sum(b.get("CPU", 0.0) for b in self.bundles)

    @property
    def total_gpus(self) -> float:
        """GPUs over all bundles."""
        return sum(b.get("GPU", 0.0) for b in self.bundles)


def plan_placement(specs: Sequence[WorkerSpec], device: str) -> PlacementPlan:
    """A bundle a rank; on GPUs, rank i of all roles with a fraction of a GPU shares one bundle with a whole GPU.

    Two ranks of one role never share a GPU: NCCL refuses two ranks on a device.

    Raises:
        ConfigError: the fractions on a shared GPU add up to more than one.
    """
    plan = PlacementPlan()
    shared: list[int] = []
    load: list[dict[str, float]] = []
    for spec in specs:
        p = spec.placement
        if device != "cuda" or p.gpus_per_rank == 1:
            bundle = {"CPU": p.cpus_per_rank} | ({"GPU": 1.0} if device == "cuda" else {})
            first = len(plan.bundles)
            plan.bundles += [dict(bundle) for _ in range(p.num_ranks)]
            plan.ranks[spec.role] = list(range(first, first + p.num_ranks))
            continue
        while len(shared) < p.num_ranks:
            shared.append(len(plan.bundles))
            load.append({})
            plan.bundles.append({"CPU": 0.0, "GPU": 1.0})
        for rank in range(p.num_ranks):
            plan.bundles[shared[rank]]["CPU"] += p.cpus_per_rank
            load[rank][spec.role] = p.gpus_per_rank
        plan.ranks[spec.role] = shared[: p.num_ranks]
    for index, shares in enumerate(load):
        if sum(shares.values()) > 1 + 1e-6:
            listed = " + ".join(f"{role} {share:g}" for role, share in shares.items())
            raise ConfigError(
                f"shared GPU {index} is given {listed} = {sum(shares.values()):g} of itself; lower gpus_per_rank of these "
                "roles to a sum of 1, or give one of them gpus_per_rank 1"
            )
    return plan
