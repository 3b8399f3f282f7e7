"""A role's ranks as Ray actors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

from rlhf_dist.core.errors import RlhfDistError, WorkerError
from rlhf_dist.core.futures import gathered
from rlhf_dist.distributed.ray.network import Place, check_reached, check_rendezvous

LOG_TAIL_LINES = 15


class RayGroup:
    """See `WorkerGroup`."""

    def __init__(self, role: str, hosts: Sequence[Any], log_paths: Sequence[Path]) -> None:
        self.role = role
        self.num_ranks = len(hosts)
        self.hosts = list(hosts)
        self.log_paths = list(log_paths)

    def meet(self) -> tuple[str, int]:
        """The address and port at which the ranks are to meet: those of rank 0, tried from every other node with a rank.

        Raises:
            PlacementError: a node cannot reach it.
        """
        places: list[Place] = self.collect([host.place.remote() for host in self.hosts]).result()
        first = places[0]
        check_rendezvous(self.role, [place.address for place in places])
        if self.num_ranks == 1:
            return first.address, 0
        port = self._translated(self.hosts[0].open_rendezvous.remote(), 0).result()
        elsewhere = {place.node: rank for rank, place in enumerate(places) if place.node != first.node}
        if elsewhere:
            tries = [
                self._translated(self.hosts[rank].reach.remote(first.address, port), rank)
                for rank in elsewhere.values()
            ]
            reasons = gathered(tries).result()
            addresses = [places[rank].address for rank in elsewhere.values()]
            check_reached(self.role, first.address, list(zip(addresses, reasons, strict=True)))
        return first.address, port

    def call(self, method: str, *args: Any) -> Future[list[Any]]:
        """See `WorkerGroup`."""
        shared = [ray.put(arg) for arg in args] if self.num_ranks > 1 else args
        return self.collect([host.run.remote(method, *shared) for host in self.hosts])

    def scatter(self, method: str, args_per_rank: Sequence[tuple[Any, ...]]) -> Future[list[Any]]:
        """See `WorkerGroup`."""
        return self.collect(
            [host.run.remote(method, *args) for host, args in zip(self.hosts, args_per_rank, strict=True)]
        )

    def pipe(self, method: str, args: tuple[Any, ...], target: RayGroup, target_method: str) -> Future[None]:
        """See `WorkerGroup`. The result is an object in Ray's store that the targets read directly."""
        sent = [host.run.remote(method, *args) for host in self.hosts]
        received = [host.run.remote(target_method, sent[0]) for host in target.hosts]
        others = gathered([self.collect(sent[1:], first_rank=1), target.collect(received)])
        result: Future[None] = Future()

        def on_done(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                result.set_result(None)
            else:
                # Where rank 0 failed, the targets report its error as theirs: ask rank 0 itself first.
                result.set_exception(self._error_of(sent[0], 0) or error)

        others.add_done_callback(on_done)
        return result

    def collect(self, refs: Sequence[Any], first_rank: int = 0) -> Future[list[Any]]:
        """The objects behind `refs` (rank order), with errors in this project's terms."""
        return gathered([self._translated(ref, first_rank + i) for i, ref in enumerate(refs)])

    def _translated(self, ref: Any, rank: int) -> Future[Any]:
        result: Future[Any] = Future()

        def on_done(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                result.set_result(done.result())
            else:
                result.set_exception(self._in_our_terms(error, rank))

        ref.future().add_done_callback(on_done)
        return result

    def _error_of(self, ref: Any, rank: int) -> BaseException | None:
        """What a finished call failed with; None if it succeeded or is still running."""
        try:
            if ray.wait([ref], timeout=1, fetch_local=False)[0]:
                ray.get(ref, timeout=10)
        except GetTimeoutError:
            return None
        except Exception as error:
            return self._in_our_terms(error, rank)
        return None

    def _in_our_terms(self, error: BaseException, rank: int) -> BaseException:
        where = f"{self.role} rank {rank}"
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, RlhfDistError):
            return type(cause)(f"{where}: {cause}")
        log = f"Last lines of {self.log_paths[rank]}:\n{tail(self.log_paths[rank])}"
        if isinstance(error, ActorDiedError | ActorUnavailableError):
            return WorkerError(f"{where} died (out of memory, a signal, or a crash in native code). {log}")
        return WorkerError(
            f"{where} failed: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}. {log}"
        )


def tail(path: Path, num_lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log, indented."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]
    except OSError as error:
        return f"  (the log cannot be read here: {error.strerror})"
    return "\n".join(f"  {line}" for line in lines) or "  (empty)"
