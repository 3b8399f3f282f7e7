"""What a role asks for, and what it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlhf_dist.config import Placement


@dataclass(frozen=True)
class WorkerSpec:
    """A role to be hosted."""

    role: str
    """Name in messages and log files: policy, reference, reward, value, rollout, model."""
    worker: str
    """`module:Class` under `rlhf_dist.workers`; imported only where it is hosted."""
    placement: Placement
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the worker besides its rank context."""


class WorkerGroup(Protocol):
    """The hosted ranks of a role."""

    role: str
    num_ranks: int

    def call(self, method: str, *args: Any) -> Future[list[Any]]:
        """The same call on every rank; their results in rank order."""
        ...

    def scatter(self, method: str, args_per_rank: Sequence[tuple[Any, ...]]) -> Future[list[Any]]:
        """Each rank with its own arguments."""
        ...

    def pipe(self, method: str, args: tuple[Any, ...], target: Any, target_method: str) -> Future[None]:
        """`method` on every rank here; rank 0's result goes to `target_method` on every rank of `target` (a group of the
        same hosting), without passing through the driver."""
        ...


class Session(Protocol):
    """A place where roles are hosted."""

    device: str
    """`cpu` or `cuda`."""

    def check(self, specs: Sequence[WorkerSpec]) -> None:
        """Raise PlacementError if the specs cannot all be hosted; starts nothing."""
        ...

    def place(self, specs: Sequence[WorkerSpec], *, seed: int, logs_dir: Callable[[], Path]) -> Any:
        """A context manager that hosts the specs and yields role → WorkerGroup; on leaving, all of it is gone.
        `logs_dir` is called once, when the placement is granted."""
        ...

    def close(self) -> None:
        """Stop whatever the session started."""
        ...


def describe(specs: Sequence[WorkerSpec], device: str) -> str:
    """The demand in words, for messages."""
    parts = []
    for spec in specs:
        p = spec.placement
        each = f"{p.gpus_per_rank:g} GPU" if device == "cuda" else f"{p.cpus_per_rank:g} CPU"
        parts.append(f"{spec.role} {p.num_ranks} x {each}")
    return ", ".join(parts)
