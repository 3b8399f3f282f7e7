"""Hosting in this process: one rank a role, calls that have finished when they return. For a debugger and fast tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rlhf_dist.core.errors import PlacementError, WorkerError
from rlhf_dist.core.futures import completed
from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.group import WorkerGroup, WorkerSpec
from rlhf_dist.distributed.hosting import announce_accelerator, build_worker


class InlineGroup:
    """A role of one rank in this process. An exception is raised at the call, where a debugger sees it."""

    num_ranks = 1

    def __init__(self, role: str, worker: Any, device: str = "cpu") -> None:
        self.role = role
        self.worker = worker
        self.device = device

    def call(self, method: str, *args: Any, ranks: Sequence[int] | None = None) -> Future[list[Any]]:
        """See `WorkerGroup`."""
        return completed([getattr(self.worker, method)(*args) for _ in _chosen(ranks)])

    def scatter(
        self, method: str, args_per_rank: Sequence[tuple[Any, ...]], ranks: Sequence[int] | None = None
    ) -> Future[list[Any]]:
        """See `WorkerGroup`."""
        return completed(
            [getattr(self.worker, method)(*args) for _, args in zip(_chosen(ranks), args_per_rank, strict=True)]
        )

    def pipe(
        self,
        method: str,
        args: tuple[Any, ...],
        target: InlineGroup,
        target_method: str,
        target_ranks: Sequence[int] | None = None,
    ) -> Future[None]:
        """See `WorkerGroup`."""
        target.call(target_method, self.call(method, *args).result()[0], ranks=target_ranks)
        return completed(None)

    def restart(self, ranks: Sequence[int]) -> None:
        """Nothing can be started again: the rank is this process."""
        raise WorkerError(
            f"{self.role} rank 0 is hosted in this process (cluster: inline), where it cannot be started again; use "
            "cluster: ray, or start the run again with --resume auto"
        )


def _chosen(ranks: Sequence[int] | None) -> Sequence[int]:
    return [0] if ranks is None else ranks


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
            groups[spec.role] = InlineGroup(spec.role, build_worker(spec.build, context), self.device)
        yield groups

    def close(self) -> None:
        """Nothing was started."""
