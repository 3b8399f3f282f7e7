"""A connection to Ray: the driver's own private cluster, or one that is already there."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_dist.cluster.actor import RankHost
from rlhf_dist.cluster.futures import gathered
from rlhf_dist.cluster.group import WorkerGroup, WorkerSpec, describe
from rlhf_dist.cluster.hosting import announce_accelerator
from rlhf_dist.cluster.placement import PlacementPlan, plan_placement
from rlhf_dist.cluster.ray_group import RayGroup
from rlhf_dist.config import RayConfig
from rlhf_dist.engine.distributed import RankContext
from rlhf_dist.errors import PlacementError

Hosts = list[Any]
"""Handles of `RankHost` actors, in rank order."""


class RaySession:
    """See `Session`. Connects lazily: a run that is refused before its placement never starts Ray.

    On GPUs, and on a cluster that others use too, ranks are placed in reserved bundles and their processes end with the
    run. On a machine's own CPUs nothing can be reserved that matters (ranks take turns on the cores), so no bundles are
    asked for, and processes are kept for the next stage: most of the seconds until a rank works go into imports.
    """

    def __init__(self, config: RayConfig, device: str) -> None:
        self.config = config
        self._wanted_device = device
        self._private = config.address is None
        self._connected = False
        self._idle: dict[int, list[Hosts]] = defaultdict(list)
        """Number of ranks → process groups of that size that host nothing now."""
        if self._private:
            self.device = _device(device, torch.cuda.device_count(), "this machine")
            announce_accelerator(self.device)

    @property
    def _keeps_processes(self) -> bool:
        return self._private and self.device == "cpu"

    def check(self, specs: Sequence[WorkerSpec]) -> None:
        """Compare the demand with what this machine has, or what the cluster says it has."""
        if not self._private:
            self._connect()
        plan = plan_placement(specs, self.device)
        here = {"GPU": float(torch.cuda.device_count()), "CPU": float(os.cpu_count() or 1)}
        total = here if self._private else ray.cluster_resources()
        needed = {"GPU": plan.total_gpus} | ({} if self._keeps_processes else {"CPU": plan.total_cpus})
        for resource, amount in needed.items():
            if amount > total.get(resource, 0.0):
                where = "this machine" if self._private else "the cluster"
                raise PlacementError(
                    f"the roles ask for {amount:g} {resource}s ({describe(specs, self.device)}) but {where} has "
                    f"{total.get(resource, 0.0):g}; lower num_ranks or cpus_per_rank, let roles share GPUs with "
                    "gpus_per_rank below 1, or add nodes"
                )

    def _connect(self) -> None:
        if self._connected:
            return
        # A dead actor is reported once, by its group, with the role's own log.
        common = {"log_to_driver": False, "logging_level": "CRITICAL"}
        if self._private:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run reports to nobody unasked
            # `local` never joins a cluster that happens to run here. Ray takes its own free ports and a fresh token.
            ray.init("local", include_dashboard=False, **common)
        else:
            try:
                ray.init(self.config.address, **common)
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise PlacementError(
                    f"no Ray cluster answers at ray.address {self.config.address!r} ({reason}); check the address, that the "
                    "head is up, and the token (RAY_AUTH_MODE=token), or use ray.address: null for a private Ray"
                ) from error
            gpus = int(ray.cluster_resources().get("GPU", 0))
            self.device = _device(self._wanted_device, gpus, f"the cluster at {self.config.address}")
        self._connected = True

    @contextlib.contextmanager
    def place(
        self, specs: Sequence[WorkerSpec], *, seed: int, logs_dir: Callable[[], Path]
    ) -> Iterator[dict[str, WorkerGroup]]:
        """Start all ranks of all roles at once, and load their models side by side. `logs_dir` is called when the
        placement is granted: until then nothing needs a folder."""
        self._connect()
        with self._hosts(specs) as hosts:
            logs = logs_dir().absolute()
            groups = {spec.role: RayGroup(spec.role, hosts[spec.role], _log_paths(spec, logs)) for spec in specs}
            gathered([self._build(groups[spec.role], spec, seed) for spec in specs]).result()
            yield dict(groups)

    @contextlib.contextmanager
    def _hosts(self, specs: Sequence[WorkerSpec]) -> Iterator[dict[str, Hosts]]:
        """Role → its processes; after an error they are ended, whatever they were doing."""
        reserved = None if self._keeps_processes else self._reserve(specs)
        hosts: dict[str, Hosts] = {}
        try:
            for spec in specs:
                kept = self._idle[spec.placement.num_ranks] if self._keeps_processes else []
                hosts[spec.role] = kept.pop() if kept else self._start(spec, reserved)
            yield hosts
            if self._keeps_processes:
                ray.get([host.release.remote() for group in hosts.values() for host in group])
                while hosts:
                    group = hosts.popitem()[1]
                    self._idle[len(group)].append(group)
        finally:
            for group in hosts.values():
                for host in group:
                    ray.kill(host)
            if reserved is not None:
                remove_placement_group(reserved[0])

    def _reserve(self, specs: Sequence[WorkerSpec]) -> tuple[Any, PlacementPlan]:
        plan = plan_placement(specs, self.device)
        reserved = placement_group(plan.bundles, strategy="PACK")
        if not reserved.wait(self.config.placement_timeout_s):
            remove_placement_group(reserved)
            free = ray.available_resources()
            raise PlacementError(
                f"the cluster did not grant {describe(specs, self.device)} within {self.config.placement_timeout_s:g} s "
                f"(free now: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs); wait for other jobs to end, ask "
                "for less, or raise ray.placement_timeout_s"
            )
        return reserved, plan

    def _start(self, spec: WorkerSpec, reserved: tuple[Any, PlacementPlan] | None) -> Hosts:
        if reserved is None:
            return [ray.remote(RankHost).options(num_cpus=0).remote() for _ in range(spec.placement.num_ranks)]
        group, plan = reserved
        return [
            ray.remote(RankHost)
            .options(
                num_cpus=spec.placement.cpus_per_rank,
                num_gpus=spec.placement.gpus_per_rank if self.device == "cuda" else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            )
            .remote()
            for bundle in plan.ranks[spec.role]
        ]

    def _build(self, group: RayGroup, spec: WorkerSpec, seed: int) -> Future[Any]:
        address, port = group.first_address()
        builds = []
        for rank, host in enumerate(group.hosts):
            context = RankContext(
                rank, group.num_ranks, address, port, self.device, spec.placement.threads_per_rank, seed
            )
            builds.append(host.build.remote(spec.worker, context, spec.kwargs, str(group.log_paths[rank])))
        return group.collect(builds)

    def close(self) -> None:
        """Stop a private Ray, or leave a cluster."""
        if self._connected:
            self._idle.clear()
            ray.shutdown()
            self._connected = False


def _log_paths(spec: WorkerSpec, logs_dir: Path) -> list[Path]:
    return [logs_dir / f"{spec.role}_{rank}.log" for rank in range(spec.placement.num_ranks)]


def _device(wanted: str, num_gpus: int, where: str) -> str:
    if wanted == "cuda" and num_gpus == 0:
        raise PlacementError(
            f"device is cuda but {where} has no GPU that torch can use; use device: cpu or device: auto"
        )
    return "cuda" if num_gpus > 0 and wanted != "cpu" else "cpu"
