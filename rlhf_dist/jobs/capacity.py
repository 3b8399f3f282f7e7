"""Whether the nodes that a Slurm job asks for can hold its run's roles: known before the job has waited in a queue for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_dist.config.hosting import Placement
from rlhf_dist.core.errors import ConfigError, PlacementError
from rlhf_dist.distributed.ray.placement import PlacementPlan, misfit, plan_placement
from rlhf_dist.jobs.slurm_job import SlurmRequest
from rlhf_dist.pipeline.config import PipelineConfig
from rlhf_dist.planning.roles import work_of

_SBATCH = {
    "nodes": ("--nodes", "-N"),
    "GPU": ("--gpus", "-G", "--gres=", "--gres ", "--tres-per"),
    "CPU": ("--cpus-per", "-c", "--mincpus", "--tres-per", "--exclusive"),
}
"""Resource → how options of sbatch begin that ask for it. What they come to, the site knows: it is then not counted here."""
_OPTION = {"GPU": "--gpus-per-node", "CPU": "--cpus-per-node"}


def with_room(request: SlurmRequest, config: Any) -> SlurmRequest:
    """The request, completed by the GPUs and CPUs that the roles ask for where nobody says how many.

    Raises:
        ConfigError: how many cannot be known.
        PlacementError: the nodes cannot hold the roles.
    """
    elsewhere = {name for name, begins in _SBATCH.items() if any(a.startswith(begins) for a in request.sbatch_args)}
    if "nodes" in elsewhere:
        return request
    runs = _roles_of_runs(config)
    device = _device(config.device, request, "GPU" in elsewhere)
    plans = {name: plan_placement(roles, device) for name, roles in runs.items()}
    if device == "cuda" and request.gpus_per_node is None and "GPU" not in elsewhere:
        most = max(plan.total_gpus for plan in plans.values())
        request = replace(request, gpus_per_node=math.ceil(most / request.nodes))
    if request.cpus_per_node is None and "CPU" not in elsewhere:
        request = _with_cpus(request, device, list(plans.values()), "GPU" in elsewhere)
    given = {"GPU": request.gpus_per_node, "CPU": request.cpus_per_node}
    node = {name: float(n) for name, n in given.items() if n is not None and name not in elsewhere}
    for name, plan in plans.items():
        _check(f"{name}: " if name else "", runs[name], plan, node, request.nodes)
    return request


def _roles_of_runs(config: Any) -> dict[str, dict[str, Placement]]:
    """Stage of a pipeline, or "" of a single run → role → what it asks for."""
    runs = {"": config}
    if isinstance(config, PipelineConfig):
        from rlhf_dist.pipeline.stage_config import stage_config

        names = [name for name in config.stages if name != "data"]
        # Where what an earlier stage makes will lie is of no concern here.
        runs = {name: stage_config(config, name, lambda found: [Path(str(found))], config.run_dir) for name in names}
    return {name: {role.name: role.placement for role in work_of(run).roles} for name, run in runs.items()}


def _device(wanted: str, request: SlurmRequest, elsewhere: bool) -> str:
    if wanted != "auto" or elsewhere:
        return "cpu" if wanted == "cpu" else "cuda"
    if request.gpus_per_node is None:
        raise ConfigError(
            "device is auto and --gpus-per-node is not given, so the job may get no GPU and the run would be on CPUs; give "
            "--gpus-per-node G (0: on CPUs), or the site's own option, such as --sbatch-arg=--gres=gpu:8"
        )
    return "cuda" if request.gpus_per_node > 0 else "cpu"


def _with_cpus(request: SlurmRequest, device: str, plans: Sequence[PlacementPlan], unknown_gpus: bool) -> SlurmRequest:
    total = math.ceil(max((plan.total_cpus for plan in plans), default=1))
    if request.nodes == 1:
        return replace(request, cpus_per_node=total)
    if device == "cuda" and request.gpus_per_node and not unknown_gpus:
        # Each rank has a GPU, or a share of one: whichever lie on a node, there are no more of them than GPUs. (The ranks of
        # an engine have a bundle of several GPUs together.)
        each = max(bundle["CPU"] / bundle["GPU"] for plan in plans for r in plan.reservations for bundle in r.bundles)
        return replace(request, cpus_per_node=math.ceil(each * request.gpus_per_node))
    raise ConfigError(
        f"--cpus-per-node is not given, and the roles ask for {total} CPUs on {request.nodes} nodes; give at least "
        f"{math.ceil(total / request.nodes)}"
    )


def _check(
    stage: str, roles: Mapping[str, Placement], plan: PlacementPlan, node: Mapping[str, float], num_nodes: int
) -> None:
    """Reject roles that `num_nodes` nodes cannot hold. `node`: resource → amount of each, of the resources that count."""
    where, have = (f"{num_nodes} nodes with", "have") if num_nodes > 1 else ("1 node with", "has")
    for resource, each in node.items():
        needed, there = sum(r.total(resource) for r in plan.reservations), each * num_nodes
        if needed > there:
            option, share = _OPTION[resource], f"{resource.lower()}s_per_rank"
            asked = ", ".join(f"{role} {p.num_ranks} x {getattr(p, share):g}" for role, p in roles.items())
            raise PlacementError(
                f"{stage}the roles ask for {needed:g} {resource}{'' if needed == 1 else 's'} ({asked}), and {where} {option} "
                f"{each:g} {have} {there:g}; raise --nodes or {option}, lower num_ranks or {share}, or let roles share GPUs "
                "with gpus_per_rank below 1"
            )
    if reason := misfit(plan, [node] * num_nodes, list(node)):
        given = " ".join(f"{_OPTION[resource]} {each:g}" for resource, each in node.items())
        raise PlacementError(
            f"{stage}{where} {given} cannot hold the roles: {reason}. Ask for larger or more nodes, or change "
            "placement_strategy, num_ranks or cpus_per_rank of the role"
        )
