"""Which rank gets which bundle of resources, and which bundles are asked for together. Pure: no Ray here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rlhf_dist.config.hosting import Placement, PlacementStrategy
from rlhf_dist.core.errors import ConfigError

Bundle = dict[str, float]
"""Resource (`CPU`, `GPU`) → amount, on one node."""


class Slot(NamedTuple):
    """Where a rank goes."""

    reservation: int
    """Index into `PlacementPlan.reservations`."""
    bundle: int
    """Index into its bundles. The ranks of an engine with GPUs of its own have one bundle together."""


@dataclass
class Reservation:
    """Bundles that are granted together, laid out over nodes by one strategy (a placement group of Ray)."""

    strategy: PlacementStrategy
    roles: list[str] = field(default_factory=list)
    bundles: list[Bundle] = field(default_factory=list)

    def total(self, resource: str) -> float:
        """Of a resource, over all bundles."""
        return sum(bundle.get(resource, 0.0) for bundle in self.bundles)


@dataclass
class PlacementPlan:
    """What to reserve, and where each rank goes."""

    reservations: list[Reservation] = field(default_factory=list)
    ranks: dict[str, list[Slot]] = field(default_factory=dict)
    """Role → slot of each rank."""
    together: dict[str, int] = field(default_factory=dict)
    """Role → neighboring ranks that must lie on one node (an engine's), of roles where there are several."""

    def engines(self, role: str) -> list[list[Slot]]:
        """Of a role's ranks, those that must lie on one node: the slots of each such group."""
        slots, number = self.ranks[role], self.together.get(role, 1)
        return [slots[first : first + number] for first in range(0, len(slots), number)]

    @property
    def total_cpus(self) -> float:
        """CPUs over all reservations."""
        return sum(r.total("CPU") for r in self.reservations)

    @property
    def total_gpus(self) -> float:
        """GPUs over all reservations."""
        return sum(r.total("GPU") for r in self.reservations)

    def numbered_by_node(self, nodes: Sequence[Sequence[str]]) -> PlacementPlan:
        """The plan with every role's ranks numbered node by node, so that neighboring ranks share a node where any do: the
        collectives of DeepSpeed (hpZ, hierarchical all-reduce) take that for granted.

        Args:
            nodes: reservation → the node that each of its bundles was granted on.
        """
        ranks = {}
        for role, slots in self.ranks.items():
            # Nodes in the order in which the role meets them.
            order = list(dict.fromkeys(nodes[slot.reservation][slot.bundle] for slot in slots))
            # A stable sort: the ranks of an engine, which have one bundle, stay neighbors.
            ranks[role] = sorted(slots, key=lambda slot: order.index(nodes[slot.reservation][slot.bundle]))
        return PlacementPlan(self.reservations, ranks, self.together)

    def split_engine(self, node_of: Mapping[Slot, object]) -> str | None:
        """The first engine that lies on several nodes, in words with what helps, or None. Only ranks that share GPUs with
        other roles can come to that: Ray is asked for their GPUs one by one.

        Args:
            node_of: the node that each slot was granted on.
        """
        for role, number in self.together.items():
            for index, slots in enumerate(self.engines(role)):
                if (count := len({node_of[slot] for slot in slots})) > 1:
                    return (
                        f"engine {index} of {role} has its {number} ranks (tensor_parallel_size {number}) on {count} nodes, "
                        "and they must lie on one; give the role gpus_per_rank 1, by which an engine gets GPUs of one node, "
                        "set a tensor_parallel_size that divides the GPUs of each node, or placement_strategy STRICT_PACK "
                        "of all roles that share these GPUs"
                    )
        return None


def plan_placement(placements: Mapping[str, Placement], device: str) -> PlacementPlan:
    """A bundle a rank; on GPUs, rank i of all roles with a fraction of a GPU shares one bundle with a whole GPU. (Which
    rank that is may change when ranks are numbered by the nodes that were granted; which roles share a GPU does not.)

    Ranks that must lie on one node (those of an engine) get one bundle together, for a bundle is on one node. Where they share
    their GPUs with other roles they do not: within a bundle of several GPUs Ray may give two ranks of a role the same one.
    Whether they came to one node is then seen when it is granted (`PlacementPlan.split_engine`).

    Two ranks of one role never share a GPU: NCCL rejects two ranks on a device. Roles of the default strategy are reserved in
    one piece, so that a run gets all of them or none; another strategy is a statement about one role (or the roles that share
    its GPUs), which Ray can only be given as a reservation of its own.

    Args:
        placements: role → what it asks for.
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: the fractions on a shared GPU add up to more than one, or roles that share GPUs are to be laid out by
            different strategies, or spread although an engine's ranks must lie on one node.
    """
    plan = PlacementPlan(together={role: p.ranks_together for role, p in placements.items() if p.ranks_together > 1})
    shared = {role: p for role, p in placements.items() if device == "cuda" and p.gpus_per_rank < 1}
    for role, p in placements.items():
        if role not in shared:
            number = p.ranks_together
            bundles = [_bundle(p, device)] * (p.num_ranks // number)
            plan.ranks[role] = [
                slot for slot in _reserve(plan, p.placement_strategy, [role], bundles) for _ in range(number)
            ]
    if shared:
        strategy = _common_strategy(shared)
        _check_spread(shared, strategy)
        slots = _reserve(plan, strategy, list(shared), _shared_bundles(shared))
        plan.ranks |= {role: slots[: p.num_ranks] for role, p in shared.items()}
    return plan


def _reserve(
    plan: PlacementPlan, strategy: PlacementStrategy, roles: list[str], bundles: Sequence[Bundle]
) -> list[Slot]:
    """Add bundles to the reservation of all `PACK` roles, or as a reservation of their own."""
    index = next((i for i, r in enumerate(plan.reservations) if r.strategy == strategy == "PACK"), None)
    if index is None:
        index = len(plan.reservations)
        plan.reservations.append(Reservation(strategy))
    reservation = plan.reservations[index]
    first = len(reservation.bundles)
    reservation.roles += roles
    reservation.bundles += [dict(bundle) for bundle in bundles]
    return [Slot(index, bundle) for bundle in range(first, len(reservation.bundles))]


def _bundle(p: Placement, device: str) -> Bundle:
    """Of one rank, or of all ranks of an engine."""
    number = p.ranks_together
    return {"CPU": number * p.cpus_per_rank} | ({"GPU": float(number)} if device == "cuda" else {})


def _common_strategy(shared: Mapping[str, Placement]) -> PlacementStrategy:
    strategies: dict[str, PlacementStrategy] = {role: p.placement_strategy for role, p in shared.items()}
    if len(set(strategies.values())) > 1:
        listed = ", ".join(f"{role} {strategy}" for role, strategy in strategies.items())
        raise ConfigError(
            f"roles that share GPUs lie on the same nodes, but their placement_strategy differs ({listed}); make them equal, "
            "or give one of them gpus_per_rank 1"
        )
    return next(iter(strategies.values()))


def _check_spread(shared: Mapping[str, Placement], strategy: PlacementStrategy) -> None:
    for role, p in shared.items():
        if p.ranks_together > 1 and strategy in ("SPREAD", "STRICT_SPREAD"):
            raise ConfigError(
                f"placement_strategy of {', '.join(shared)} is {strategy}, which puts the GPUs that they share on different "
                f"nodes, but the {p.ranks_together} ranks of an engine of {role} (tensor_parallel_size {p.ranks_together}) "
                "must lie on one; use PACK or STRICT_PACK, or give the role gpus_per_rank 1"
            )


def _shared_bundles(shared: Mapping[str, Placement]) -> list[Bundle]:
    bundles: list[Bundle] = []
    for index in range(max(p.num_ranks for p in shared.values())):
        here = [(role, p) for role, p in shared.items() if index < p.num_ranks]
        share = sum(p.gpus_per_rank for _, p in here)
        if share > 1 + 1e-6:
            listed = " + ".join(f"{role} {p.gpus_per_rank:g}" for role, p in here)
            raise ConfigError(
                f"shared GPU {index} is given {listed} = {share:g} of itself; lower gpus_per_rank of these roles to a sum of "
                "1, or give one of them gpus_per_rank 1"
            )
        bundles.append({"CPU": sum(p.cpus_per_rank for _, p in here), "GPU": 1.0})
    return bundles


def misfit(plan: PlacementPlan, nodes: Sequence[Mapping[str, float]], resources: Sequence[str]) -> str | None:
    """Why `nodes` cannot hold the plan, or None where nothing speaks against it. (A bin packing that fails in the end is left
    to the cluster, which has other tenants, too.)

    Args:
        nodes: of each node, resource → amount it has in all.
        resources: those that count.
    """
    if reason := _engine_misfit(plan, nodes, resources):
        return reason
    for r in plan.reservations:
        needs = [{name: bundle.get(name, 0.0) for name in resources} for bundle in r.bundles]
        for need in needs:
            if not any(_fits(need, node) for node in nodes):
                return f"one rank of {' + '.join(r.roles)} needs {_words(need)}, which no single node has"
        if r.strategy == "STRICT_PACK":
            total = {name: r.total(name) for name in resources}
            if not any(_fits(total, node) for node in nodes):
                roles = " + ".join(r.roles)
                return f"{roles} must lie on one node (STRICT_PACK) and need {_words(total)} there, which none has"
        if r.strategy == "STRICT_SPREAD":
            able = sum(any(_fits(need, node) for need in needs) for node in nodes)
            if able < len(needs):
                what = "engines" if plan.together.keys() & set(r.roles) else "ranks"
                return (
                    f"the {what} of {' + '.join(r.roles)} must lie on {len(needs)} different nodes (STRICT_SPREAD), and {able} "
                    f"node{'' if able == 1 else 's'} can hold one"
                )
    return None


def _engine_misfit(plan: PlacementPlan, nodes: Sequence[Mapping[str, float]], resources: Sequence[str]) -> str | None:
    for role, number in plan.together.items():
        for slots in plan.engines(role):
            bundles = [plan.reservations[slot.reservation].bundles[slot.bundle] for slot in set(slots)]
            need = {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in resources}
            if not any(_fits(need, node) for node in nodes):
                return (
                    f"an engine of {role} (tensor_parallel_size {number}) needs {_words(need)} on one node, which none has; "
                    f"lower {role}.tensor_parallel_size"
                )
    return None


def _fits(need: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(amount <= node.get(name, 0.0) + 1e-6 for name, amount in need.items())


def _words(need: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" + ("" if amount == 1 else "s") for name, amount in need.items() if amount)
