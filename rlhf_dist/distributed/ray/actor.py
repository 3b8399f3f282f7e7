"""The process that hosts one rank of a role.

Nothing here imports torch or transformers while this module is imported: they read the environment when they are, and a rank
takes that over by a call.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from rlhf_dist.core.errors import RlhfDistError
from rlhf_dist.distributed.ray.network import Place, check_interface, interface_with, why_unreachable

if TYPE_CHECKING:
    from rlhf_dist.distributed.deepspeed.process_group import RankContext


class RankHost:
    """A Ray actor: made first, empty, so that placement is known before any model loads."""

    def __init__(self) -> None:
        self._worker: Any = None

    def take_over(self, environment: Mapping[str, str]) -> None:
        """Set variables in this process; the first call."""
        os.environ.update(environment)

    def place(self) -> Place:
        """The node."""
        return Place(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())

    def open_rendezvous(self) -> int:
        """See `process_group.open_rendezvous`."""
        from rlhf_dist.distributed.deepspeed.process_group import open_rendezvous

        return open_rendezvous()

    def reach(self, address: str, port: int) -> str | None:
        """See `why_unreachable`."""
        return why_unreachable(address, port)

    def build(self, build: Callable[..., Any], context: RankContext, log_path: str) -> None:
        """Construct the worker; collective over the role's ranks."""
        _redirect_output(Path(log_path))
        with _traceback_in_log():
            from rlhf_dist.distributed.hosting import build_worker

            check_interface(context.interface)
            context = replace(context, own_interface=interface_with(ray.util.get_node_ip_address()))
            self._worker = build_worker(build, context)

    def run(self, method: str, *args: Any) -> Any:
        """Call a method of the worker."""
        with _traceback_in_log():
            return getattr(self._worker, method)(*args)

    def release(self) -> None:
        """Drop the worker; the process, with what it has imported, can host another."""
        self._worker = None
        gc.collect()  # an engine and its hooks refer to each other


@contextlib.contextmanager
def _traceback_in_log() -> Iterator[None]:
    """An unexpected error leaves its traceback in the rank's log; what reaches the driver is its message."""
    try:
        yield
    except RlhfDistError:
        raise
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        raise


def _redirect_output(path: Path) -> None:
    """The run's own log file, so that a dead rank's last words can be shown and outlive Ray's session folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    node = os.environ.get("SLURMD_NODENAME")
    where = f"{ray.util.get_node_ip_address()}" + (f" (Slurm node {node})" if node else "")
    os.write(1, f"process {os.getpid()} on {where}\n".encode())
