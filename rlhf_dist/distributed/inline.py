"""Hosting in this process: one rank a role, calls that have finished when they return. For a debugger and fast tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rlhf_dist.core.errors import PlacementError
from rlhf_dist.core.futures import completed
from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.group import WorkerGroup, WorkerSpec
from rlhf_dist.distributed.hosting import announce_accelerator, build_worker


class InlineGroup:
    """A role of one rank in this process. An exception is raised at the call, where a debugger sees it."""

    num_ranks = 1

    def __init__(self, role: str, worker: Any) -> None:
        self.role = role
        self.worker = worker

    def call(self, method: str, *args: Any) -> Future[list[Any]]:
        """See `WorkerGroup`."""
        return completed([getattr(self.worker, method)(*args)])

    def scatter(self, method: str, args_per_rank: Sequence[tuple[Any, ...]]) -> Future[list[Any]]:
        """See `WorkerGroup`."""
        (args,) = args_per_rank
        return self.call(method, *args)

    def pipe(self, method: str, args: tuple[Any, ...], target: InlineGroup, target_method: str) -> Future[None]:
        """See `WorkerGroup`."""
        target.call(target_method, self.call(method, *args).result()[0])
        return completed(None)


class InlineSession:
    """See `Session`."""

    def __init__(self, device: str) -> None:
        import torch

        available = torch.cuda.is_available()
        if device == "cuda" and not available:
            raise PlacementError(
                "device is cuda but torch finds no GPU in this process; use device: cpu or device: auto"
            )
        self.device = "cuda" if available and device != "cpu" else "cpu"
        announce_accelerator(self.device)

    def check(self, specs: Sequence[WorkerSpec]) -> None:
        """Everything fits in one process."""

    @contextlib.contextmanager
    def place(
        self, specs: Sequence[WorkerSpec], *, seed: int, logs_dir: Callable[[], Path]
    ) -> Iterator[dict[str, WorkerGroup]]:
        """Host the specs one after the other."""
        logs_dir()
        groups: dict[str, WorkerGroup] = {}
        # The process group of one outlives this block: DeepSpeed keeps it for the life of the process.
        for spec in specs:
            context = RankContext(device=self.device, threads=spec.placement.threads_per_rank, seed=seed)
            groups[spec.role] = InlineGroup(spec.role, build_worker(spec.build, context))
        yield groups

    def close(self) -> None:
        """Nothing was started."""
