"""A connection to Ray: the driver's own private cluster, or one that is already there."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_dist.cluster.actor import RankHost
from rlhf_dist.cluster.futures import gathered
from rlhf_dist.cluster.group import WorkerGroup, WorkerSpec, describe
from rlhf_dist.cluster.placement import PlacementPlan, plan_placement
from rlhf_dist.cluster.ray_group import RayGroup
from rlhf_dist.config import RayConfig
from rlhf_dist.engine.distributed import RankContext
from rlhf_dist.errors import PlacementError


class RaySession:
    """See `Session`. Connects lazily: a run that is refused before its placement never starts Ray."""

    def __init__(self, config: RayConfig, device: str) -> None:
        self.config = config
        self._wanted_device = device
        self._private = config.address is None
        self._connected = False
        if self._private:
            self.device = _device(device, torch.cuda.device_count(), "this machine")

    def check(self, specs: Sequence[WorkerSpec]) -> None:
        """Compare the demand with what this machine has, or what the cluster says it has."""
        if not self._private:
            self._connect(num_cpus=0)
        plan = plan_placement(specs, self.device)
        total = {"GPU": float(torch.cuda.device_count())} if self._private else ray.cluster_resources()
        # CPUs of a private Ray are only a count that this session sets: on a laptop, ranks take turns on the cores.
        needed = {"GPU": plan.total_gpus} | ({} if self._private else {"CPU": plan.total_cpus})
        for resource, amount in needed.items():
            if amount > total.get(resource, 0.0):
                where = "this machine" if self._private else "the cluster"
                raise PlacementError(
                    f"the roles ask for {amount:g} {resource}s ({describe(specs, self.device)}) but {where} has "
                    f"{total.get(resource, 0.0):g}; lower num_ranks, let roles share GPUs with gpus_per_rank below 1, or "
                    "add nodes"
                )

    def _connect(self, num_cpus: float) -> None:
        if self._connected:
            return
        # A dead actor is reported once, by its group, with the role's own log.
        common = {"log_to_driver": False, "logging_level": "CRITICAL", "include_dashboard": False}
        if self._private:
            # `local` never joins a cluster that happens to run here. Ray takes its own free ports and a fresh token.
            ray.init("local", num_cpus=max(os.cpu_count() or 1, math.ceil(num_cpus)), **common)
        else:
            common.pop("include_dashboard")
            ray.init(self.config.address, **common)
            gpus = int(ray.cluster_resources().get("GPU", 0))
            self.device = _device(self._wanted_device, gpus, f"the cluster at {self.config.address}")
        self._connected = True

    @contextlib.contextmanager
    def place(self, specs: Sequence[WorkerSpec], *, seed: int, logs_dir: Path) -> Iterator[dict[str, WorkerGroup]]:
        """Reserve, start all ranks of all roles at once, and load their models side by side."""
        plan = plan_placement(specs, self.device) if self._private else None
        self._connect(plan.total_cpus if plan else 0)
        plan = plan or plan_placement(specs, self.device)
        if self._private and ray.cluster_resources().get("CPU", 0) < plan.total_cpus:
            # A later stage of a pipeline asks for more than the first: a private Ray is cheap to start again.
            self.close()
            self._connect(plan.total_cpus)
        reserved = self._reserve(plan, specs)
        groups: dict[str, RayGroup] = {}
        try:
            for spec in specs:
                groups[spec.role] = self._start(spec, plan, reserved, logs_dir)
            builds = [self._build(groups[spec.role], spec, seed) for spec in specs]
            gathered(builds).result()
            yield dict(groups)
        finally:
            for group in groups.values():
                for host in group.hosts:
                    ray.kill(host)
            remove_placement_group(reserved)

    def _reserve(self, plan: PlacementPlan, specs: Sequence[WorkerSpec]):
        reserved = placement_group(plan.bundles, strategy="PACK")
        if not reserved.wait(self.config.placement_timeout_s):
            remove_placement_group(reserved)
            free = ray.available_resources()
            raise PlacementError(
                f"the cluster did not grant {describe(specs, self.device)} within {self.config.placement_timeout_s:g} s "
                f"(free now: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs); wait for other jobs to end, ask "
                "for less, or raise ray.placement_timeout_s"
            )
        return reserved

    def _start(self, spec: WorkerSpec, plan: PlacementPlan, reserved, logs_dir: Path) -> RayGroup:
        hosts, log_paths = [], []
        for rank, bundle in enumerate(plan.ranks[spec.role]):
            log_paths.append(logs_dir.absolute() / f"{spec.role}_{rank}.log")
            actor = ray.remote(RankHost).options(
                num_cpus=spec.placement.cpus_per_rank,
                num_gpus=spec.placement.gpus_per_rank if self.device == "cuda" else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=bundle),
                max_restarts=0,
            )
            hosts.append(actor.remote(str(log_paths[-1])))
        return RayGroup(spec.role, hosts, log_paths)

    def _build(self, group: RayGroup, spec: WorkerSpec, seed: int):
        address, port = ray.get(group.hosts[0].address.remote())
        contexts = [
            RankContext(rank, group.num_ranks, address, port, self.device, spec.placement.threads_per_rank, seed)
            for rank in range(group.num_ranks)
        ]
        return group.collect(
            [h.build.remote(spec.worker, c, spec.kwargs) for h, c in zip(group.hosts, contexts, strict=True)]
        )

    def close(self) -> None:
        """Stop a private Ray, or leave a cluster."""
        if self._connected:
            ray.shutdown()
            self._connected = False


def _device(wanted: str, num_gpus: int, where: str) -> str:
    if wanted == "cuda" and num_gpus == 0:
        raise PlacementError(
            f"device is cuda but {where} has no GPU that torch can use; use device: cpu or device: auto"
        )
    return "cuda" if num_gpus > 0 and wanted != "cpu" else "cpu"
