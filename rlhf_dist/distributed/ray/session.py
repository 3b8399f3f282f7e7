"""A connection to Ray: the driver's own private cluster, or one that is already there."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_dist.config.hosting import RayConfig
from rlhf_dist.core.cpus import usable_cpus
from rlhf_dist.core.errors import PlacementError
from rlhf_dist.core.futures import gathered
from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.group import WorkerGroup, WorkerSpec, describe
from rlhf_dist.distributed.hosting import announce_accelerator
from rlhf_dist.distributed.ray.actor import RankHost
from rlhf_dist.distributed.ray.group import RayGroup
from rlhf_dist.distributed.ray.network import check_interface, passed_environment
from rlhf_dist.distributed.ray.placement import PlacementPlan, Slot, misfit, plan_placement

log = logging.getLogger(__name__)

_LONGEST_SOCKET_PATH = 107
"""Bytes of a Unix socket's path on Linux."""
Hosts = list[Any]
"""Handles of `RankHost` actors, in rank order."""


@dataclass(frozen=True)
class Reserved:
    """A granted plan."""

    groups: list[Any]
    """Ray's placement groups, one a reservation of the plan."""
    plan: PlacementPlan


class RaySession:
    """See `Session`. Connects lazily: a run that is rejected before its placement never starts Ray.

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
        if self._private:
            check_interface(self.config.network_interface)
        else:
            self._connect()
        plan = _plan(specs, self.device)
        nodes, where = self._nodes()
        counted = [name for name in ("GPU", "CPU") if not (self._keeps_processes and name == "CPU")]
        for resource in counted:
            needed, there = sum(r.total(resource) for r in plan.reservations), sum(n.get(resource, 0.0) for n in nodes)
            if needed > there:
                raise PlacementError(
                    f"the roles ask for {needed:g} {resource}s ({describe(specs, self.device)}) but {where} has {there:g}; "
                    "lower num_ranks or cpus_per_rank, let roles share GPUs with gpus_per_rank below 1, or add nodes"
                )
        if reason := misfit(plan, nodes, counted):
            raise PlacementError(
                f"{where} cannot hold the roles: {reason}. Change placement_strategy, num_ranks, or cpus_per_rank of the role, "
                "or use larger or more nodes"
            )

    def _nodes(self) -> tuple[list[dict[str, float]], str]:
        """What each node has in all, and the place in words."""
        if self._private:
            return [{"GPU": float(torch.cuda.device_count()), "CPU": float(usable_cpus())}], "this machine"
        return [node["Resources"] for node in ray.nodes() if node["Alive"]], "the cluster"

    def _connect(self) -> None:
        if self._connected:
            return
        # A dead actor is reported once, by its group, with the role's own log.
        common = {"log_to_driver": False, "logging_level": "CRITICAL"}
        if self._private:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run reports to nobody unasked
            _private_token(os.environ)
            with _kept_from_new_processes(signal.SIGUSR1):
                _start_private(**common)
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
        """Start all ranks of all roles at once, and load their models side by side; but those of roles that take turns one
        role after the other. `logs_dir` is called when the placement is granted: until then nothing needs a folder."""
        self._connect()
        with self._hosts(specs) as (hosts, reserved):
            logs = logs_dir().absolute()
            groups = {}
            for spec in specs:
                start_again = partial(self._start_again, spec, reserved, seed)
                groups[spec.role] = RayGroup(
                    spec.role, hosts[spec.role], _log_paths(spec, logs), start_again, self.device
                )
            gathered([self._build(groups[spec.role], spec, seed) for spec in specs if not spec.takes_turns]).result()
            for spec in specs:
                if spec.takes_turns:
                    self._build(groups[spec.role], spec, seed).result()
            yield dict(groups)

    @contextlib.contextmanager
    def _hosts(self, specs: Sequence[WorkerSpec]) -> Iterator[tuple[dict[str, Hosts], Reserved | None]]:
        """Role → its processes, and where they are; after an error they are ended, whatever they were doing. A process
        that is put into one of these lists in place of another is ended, too."""
        reserved = None if self._keeps_processes else self._reserve(specs)
        hosts: dict[str, Hosts] = {}
        try:
            for spec in specs:
                keeps = self._keeps_processes and not spec.own_process
                kept = self._idle[spec.placement.num_ranks] if keeps else []
                kept_group = kept.pop() if kept else None
                num_ranks = spec.placement.num_ranks
                hosts[spec.role] = kept_group or [self._start(spec, reserved, rank) for rank in range(num_ranks)]
            first = {role: list(group) for role, group in hosts.items()}
            yield hosts, reserved
            if self._keeps_processes:
                # Not a group in which a process was replaced: the others may have met as a process group, once for all.
                own = {spec.role for spec in specs if spec.own_process}
                whole = [role for role, group in hosts.items() if group == first[role] and role not in own]
                released = {role: [host.release.remote() for host in hosts[role]] for role in whole}
                for role, answers in released.items():
                    with contextlib.suppress(RayActorError):  # one died after its last call
                        ray.get(answers)
                        group = hosts.pop(role)
                        self._idle[len(group)].append(group)
        finally:
            for group in hosts.values():
                for host in group:
                    ray.kill(host)
            if reserved is not None:
                _give_back(reserved.groups)

    def _reserve(self, specs: Sequence[WorkerSpec]) -> Reserved:
        """Ask for all reservations at once, wait for all of them, and number the ranks by the nodes that were granted."""
        plan = _plan(specs, self.device)
        groups = [placement_group(r.bundles, strategy=r.strategy) for r in plan.reservations]
        deadline = time.monotonic() + self.config.placement_timeout_s
        try:
            granted = all(group.wait(max(0.0, deadline - time.monotonic())) for group in groups)
            if not granted:
                free = ray.available_resources()
                whose, remedy = (
                    "the cluster",
                    "wait for other jobs to end, ask for less, or raise ray.placement_timeout_s",
                )
                if self._private:  # nobody else is there to wait for
                    whose = "the private Ray on this machine"
                    remedy = (
                        "lower num_ranks or cpus_per_rank, or compare the GPUs with CUDA_VISIBLE_DEVICES and nvidia-smi"
                    )
                raise PlacementError(
                    f"{whose} did not grant {describe(specs, self.device)} within {self.config.placement_timeout_s:g} s "
                    f"(free now: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs); {remedy}"
                )
            tables = [placement_group_table(group)["bundles_to_node_id"] for group in groups]
            nodes = [[table[i] for i in range(len(table))] for table in tables]
            numbered = plan.numbered_by_node(nodes)
            if reason := numbered.split_engine(
                {Slot(i, j): n for i, row in enumerate(nodes) for j, n in enumerate(row)}
            ):
                raise PlacementError(f"the nodes that were granted do not do: {reason}")
        except BaseException:
            _give_back(groups)
            raise
        return Reserved(groups, numbered)

    def _start(self, spec: WorkerSpec, reserved: Reserved | None, rank: int) -> Any:
        """A process for a rank, in its bundle where there is one; a handle of the actor, which may still be starting."""
        common = {"runtime_env": {"env_vars": self.config.env_vars}} if self.config.env_vars else {}
        host = ray.remote(RankHost)
        if reserved is None:
            return host.options(num_cpus=0, **common).remote()
        slot = reserved.plan.ranks[spec.role][rank]
        started: Any = host.options(
            num_cpus=spec.placement.cpus_per_rank,
            num_gpus=spec.placement.gpus_per_rank if self.device == "cuda" else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                reserved.groups[slot.reservation], placement_group_bundle_index=slot.bundle
            ),
            **common,
        ).remote()
        if not self._private:  # the processes of a private Ray have inherited all of it
            # By a call, from process to process: Ray writes a runtime_env into logs that everybody on the node can read, and
            # there are tokens among these. Calls of one caller run in their order, so no answer need be waited for.
            started.take_over.remote(passed_environment(self.config, os.environ))
        return started

    def _start_again(
        self, spec: WorkerSpec, reserved: Reserved | None, seed: int, group: RayGroup, ranks: Sequence[int]
    ) -> None:
        """See `WorkerGroup.restart`. After the loss of a node, Ray reserves the lost bundles on another, as soon as one has
        room."""
        for rank in ranks:
            ray.kill(group.hosts[rank])
            group.hosts[rank] = self._start(spec, reserved, rank)
        self._build(group, spec, seed, ranks, self.config.placement_timeout_s).result()

    def _build(
        self,
        group: RayGroup,
        spec: WorkerSpec,
        seed: int,
        ranks: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> Future[Any]:
        """Construct the workers of some ranks; `timeout_s`: longest wait for their processes."""
        ranks = range(group.num_ranks) if ranks is None else ranks
        address, port = group.meet(ranks, timeout_s)
        builds = []
        for rank in ranks:
            context = RankContext(
                rank,
                group.num_ranks,
                address,
                port,
                self.device,
                spec.placement.threads_per_rank,
                seed,
                self.config.network_interface,
            )
            builds.append(group.hosts[rank].build.remote(spec.build, context, str(group.log_paths[rank])))
        return group.collect(builds, ranks)

    def close(self) -> None:
        """Stop a private Ray, or leave a cluster."""
        if self._connected:
            self._idle.clear()
            ray.shutdown()
            self._connected = False


def _short_folder() -> dict[str, str]:
    """Where Ray puts its sockets, if a long TMPDIR leaves no room for them, as batch systems make them."""
    given = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    longest = len(os.fsencode(given)) + len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
    if longest <= _LONGEST_SOCKET_PATH:
        return {}
    folder = Path(f"/tmp/ray-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise PlacementError(
            f"the temporary folder {given} is {len(os.fsencode(given))} bytes long, too long for Ray's sockets (a path has at "
            f"most {_LONGEST_SOCKET_PATH} bytes), and {folder} cannot be made ({error.strerror}); set RAY_TMPDIR to a shorter "
            "folder"
        ) from error
    log.warning(
        "the temporary folder %s is too long for Ray's sockets; Ray uses %s (RAY_TMPDIR names another)", given, folder
    )
    return {"_temp_dir": str(folder)}


def _start_private(**settings: Any) -> None:
    """Start a Ray of this process's own; once more where it fails, since Ray waits only 30 s for its processes, and a busy
    machine may take longer.

    Raises:
        PlacementError: it did not start.
    """
    for is_last in (False, True):
        try:
            # `local` never joins a cluster that happens to run here, whatever RAY_ADDRESS says. Ray takes free ports.
            ray.init("local", include_dashboard=False, num_cpus=usable_cpus(), **_short_folder(), **settings)
            return
        except Exception as error:
            ray.shutdown()
            if is_last:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise PlacementError(
                    f"a private Ray did not start on this machine, tried twice ({reason}); see `rlhf-dist doctor`, free memory "
                    "and processes, or use cluster: inline"
                ) from error


@contextlib.contextmanager
def _kept_from_new_processes(number: signal.Signals) -> Iterator[None]:
    """Block a signal in the processes that are started inside, for as long as they live: what a group of processes is sent is
    meant for the driver, and would end Ray's. The driver handles one that comes meanwhile when it leaves this block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _private_token(environment: MutableMapping[str, str]) -> None:
    """A token for a private Ray, in the memory of its processes only: Ray itself would leave one in the home directory that
    others can read. What the user says of tokens stands."""
    if not any(name in environment for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _plan(specs: Sequence[WorkerSpec], device: str) -> PlacementPlan:
    return plan_placement({spec.role: spec.placement for spec in specs}, device)


def _give_back(groups: Sequence[Any]) -> None:
    for group in groups:
        remove_placement_group(group)


def _log_paths(spec: WorkerSpec, logs_dir: Path) -> list[Path]:
    return [logs_dir / f"{spec.role}_{rank}.log" for rank in range(spec.placement.num_ranks)]


def _device(wanted: str, num_gpus: int, where: str) -> str:
    if wanted == "cuda" and num_gpus == 0:
        raise PlacementError(
            f"device is cuda but {where} has no GPU that torch can use; use device: cpu or device: auto"
        )
    return "cuda" if num_gpus > 0 and wanted != "cpu" else "cpu"
