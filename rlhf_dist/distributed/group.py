"""What a role asks for, and what it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf_dist.config.hosting import Placement


@dataclass(frozen=True)
class WorkerSpec:
    """A role to be hosted."""

    role: str
    """Name in messages and log files: policy, reference, reward, value, rollout, model."""
    placement: Placement
    build: Callable[..., Any]
    """Makes the worker of one rank where it is hosted, as `build(context=RankContext)`: a worker's class with its other
    arguments bound by `functools.partial`, so that pyright checks them."""
    own_process: bool = False
    """Hosted by a process that hosts nothing else, before or after: what its library sets up cannot be undone."""
    takes_turns: bool = False
    """Gives its memory to other such roles and takes it back (`phases.py`): built after another, not at the same time."""


class WorkerGroup(Protocol):
    """The hosted ranks of a role. `ranks` restricts a call to some of them."""

    role: str
    num_ranks: int
    device: str
    """`cpu` or `cuda`."""

    def call(self, method: str, *args: Any, ranks: Sequence[int] | None = None) -> Future[list[Any]]:
        """The same call on every rank; their results in rank order."""
        ...

    def scatter(
        self, method: str, args_per_rank: Sequence[tuple[Any, ...]], ranks: Sequence[int] | None = None
    ) -> Future[list[Any]]:
        """Each rank with its own arguments."""
        ...

    def pipe(
        self,
        method: str,
        args: tuple[Any, ...],
        target: Any,
        target_method: str,
        target_ranks: Sequence[int] | None = None,
    ) -> Future[None]:
        """`method` on every rank here; rank 0's result goes to `target_method` on every rank of `target` (a group of the
        same hosting), or on some of them, without passing through the driver."""
        ...

    def restart(self, ranks: Sequence[int]) -> None:
        """End these ranks, whatever is left of them, and start them again in their places, with workers built as at first;
        returns when they can be called. What they held is lost, and so are calls that they had not answered.

        Raises:
            WorkerError: a worker could not be built, or died again (WorkerDied).
            PlacementError: their place was not granted again in time.
        """
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
        engines = f" in engines of {p.ranks_together}" if p.ranks_together > 1 else ""
        parts.append(f"{spec.role} {p.num_ranks} x {each}{engines}")
    return ", ".join(parts)
