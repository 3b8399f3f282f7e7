"""Which GPU of which node each rank sits on, and what the roles on a GPU and a node need together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rlhf_dist.config.hosting import Placement
from rlhf_dist.distributed.ray.placement import PlacementPlan, Slot, misfit, plan_placement
from rlhf_dist.planning.hardware import Cluster
from rlhf_dist.planning.memory import RoleMemory
from rlhf_dist.planning.roles import Role
from rlhf_dist.planning.turns import gpu_bytes, resting_bytes


class Device(NamedTuple):
    """A GPU; on CPUs, a rank's share of its node."""

    slot: Slot
    position: int
    """Among those of its bundle: the ranks of an engine have a bundle together."""


@dataclass(frozen=True)
class Layout:
    """Ranks on nodes. On CPUs every slot is a share of its node."""

    placement: PlacementPlan
    nodes: dict[Slot, int]
    """Slot → node."""
    misfit: str
    """Why the cluster cannot hold the placement, or ""; slots that found no room are then on nodes that do not exist."""

    def nodes_of(self, role: str) -> list[int]:
        """Nodes of a role's ranks, in rank order."""
        return [self.nodes[slot] for slot in self.placement.ranks[role]]

    def shares(self) -> dict[Device, list[str]]:
        """GPU → roles with a rank on it."""
        found: dict[Device, list[str]] = {}
        for role, slots in self.placement.ranks.items():
            taken: dict[Slot, int] = {}
            for slot in slots:
                taken[slot] = taken.get(slot, -1) + 1
                found.setdefault(Device(slot, taken[slot]), []).append(role)
        return found


def lay_out(roles: Sequence[Role], cluster: Cluster) -> Layout:
    """Place the roles as a run would, as closely as can be said without asking Ray: node by node in the order of the roles, but
    engines of several GPUs first, as Ray does; spread roles one rank, or engine, a node.

    Raises:
        ConfigError: roles that share GPUs ask for more than there is of one.
    """
    device = "cpu" if cluster.on_cpu else "cuda"
    placements = {role.name: role.placement for role in roles}
    if any(role.inline for role in roles):
        placements = {name: Placement(gpus_per_rank=1 / len(roles)) for name in placements}
    plan = plan_placement(placements, device)
    if cluster.on_cpu:
        # Ranks take turns on the cores there are: they only have to be somewhere.
        slots = [Slot(i, j) for i, r in enumerate(plan.reservations) for j in range(len(r.bundles))]
        return Layout(plan, {slot: i % cluster.num_nodes for i, slot in enumerate(slots)}, "")
    reason = ""
    if plan.total_gpus > cluster.num_gpus:
        reason = f"the roles ask for {plan.total_gpus:g} GPUs and there are {cluster.num_gpus}"
    reason = reason or misfit(plan, [{"GPU": float(cluster.gpus_per_node)}] * cluster.num_nodes, ["GPU"]) or ""
    free = [cluster.gpus_per_node] * cluster.num_nodes
    nodes: dict[Slot, int] = {}
    for i, reservation in enumerate(plan.reservations):
        spread = reservation.strategy in ("SPREAD", "STRICT_SPREAD")
        turn = 0
        sizes = [round(bundle["GPU"]) for bundle in reservation.bundles]
        for j in sorted(range(len(sizes)), key=lambda j: -sizes[j]):
            order = [(turn + k) % len(free) for k in range(cluster.num_nodes)] if spread else range(len(free))
            node = next((n for n in order if free[n] >= sizes[j]), None)
            if node is None:
                free.append(max(cluster.gpus_per_node, sizes[j]))
                node = len(free) - 1
                reason = reason or "the roles do not fit on the nodes there are"
            free[node] -= sizes[j]
            nodes[Slot(i, j)] = node
            turn = node + 1
    return Layout(plan, nodes, reason or plan.split_engine(nodes) or "")


def slowest_link(layout: Layout, cluster: Cluster, *roles: str) -> float:
    """Bytes a second of the narrowest link between the ranks of roles: that between nodes, where they are on several."""
    link = cluster.gpu.link_bytes_per_s
    several = len({node for role in roles for node in layout.nodes_of(role)}) > 1
    return min(link, cluster.node_link_bytes_per_s) if several else link


def gpu_totals(layout: Layout, memory: dict[str, RoleMemory]) -> dict[Device, int]:
    """GPU → bytes of all ranks on it."""
    totals = {}
    for device, roles in layout.shares().items():
        turns = [memory[role] for role in roles if memory[role].role.takes_turns]
        apart = sum(memory[role].gpu_bytes for role in roles if not memory[role].role.takes_turns)
        totals[device] = apart + (gpu_bytes(turns) if turns else 0)
    return totals


def host_totals(layout: Layout, memory: dict[str, RoleMemory], on_cpu: bool) -> dict[int, int]:
    """Node → bytes of host memory of all ranks there; on CPUs that is all they hold."""
    totals: dict[int, int] = {}
    for (slot, _), roles in layout.shares().items():
        for role in roles:
            need = memory[role].host_bytes + (memory[role].total(memory[role].worst_phase).gpu if on_cpu else 0)
            if memory[role].role.takes_turns and not on_cpu:
                need += resting_bytes(memory[role], "full")
            totals[layout.nodes[slot]] = totals.get(layout.nodes[slot], 0) + need
    return totals
