"""A role's ranks as Ray actors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, ObjectLostError, RayTaskError

from rlhf_dist.core.errors import EngineError, PlacementError, RlhfDistError, WorkerDied, WorkerError
from rlhf_dist.core.futures import gathered
from rlhf_dist.distributed.ray.network import Place, check_reached, check_rendezvous

LOG_TAIL_LINES = 15


class RayGroup:
    """See `WorkerGroup`."""

    def __init__(
        self,
        role: str,
        hosts: list[Any],
        log_paths: Sequence[Path],
        start_again: Callable[[RayGroup, Sequence[int]], None],
        device: str = "cpu",
    ) -> None:
        """`hosts`: handles in rank order, the session's own list: it ends those that are in it at the end. `start_again`: puts
        new hosts for some ranks into the list, and builds their workers."""
        self.role = role
        self.device = device
        self.num_ranks = len(hosts)
        self.hosts = hosts
        self.log_paths = list(log_paths)
        self._start_again = start_again
        self._places: dict[int, Place] = {}

    def meet(self, ranks: Sequence[int] | None = None, timeout_s: float | None = None) -> tuple[str, int]:
        """The address and port at which the ranks (some of them) are to meet: those of the first, tried from every other node
        with a rank.

        Raises:
            PlacementError: a node cannot reach it, or a rank has no process after `timeout_s`.
        """
        ranks = self._chosen(ranks)
        try:
            found = self.collect([self.hosts[rank].place.remote() for rank in ranks], ranks).result(timeout_s)
        except FutureTimeoutError:
            raise PlacementError(
                f"{self.role} ranks {list(ranks)} are to be started again, but Ray found no place for them within "
                f"{timeout_s:g} s; their node may be gone, and no other have what they ask for free: start the run again with "
                "--resume auto, add a node, or raise ray.placement_timeout_s"
            ) from None
        places: list[Place] = found
        self._places.update(zip(ranks, places, strict=True))
        first = places[0]
        check_rendezvous(self.role, [place.address for place in places])
        if self.num_ranks == 1:
            return first.address, 0
        port = self._translated(self.hosts[ranks[0]].open_rendezvous.remote(), ranks[0]).result()
        elsewhere = {place.node: rank for rank, place in zip(ranks, places, strict=True) if place.node != first.node}
        if elsewhere:
            tries = [
                self._translated(self.hosts[rank].reach.remote(first.address, port), rank)
                for rank in elsewhere.values()
            ]
            reasons = gathered(tries).result()
            addresses = [self._places[rank].address for rank in elsewhere.values()]
            check_reached(self.role, first.address, list(zip(addresses, reasons, strict=True)))
        return first.address, port

    def call(self, method: str, *args: Any, ranks: Sequence[int] | None = None) -> Future[list[Any]]:
        """See `WorkerGroup`."""
        ranks = self._chosen(ranks)
        shared = [ray.put(arg) for arg in args] if len(ranks) > 1 else args
        return self.collect([self.hosts[rank].run.remote(method, *shared) for rank in ranks], ranks)

    def scatter(
        self, method: str, args_per_rank: Sequence[tuple[Any, ...]], ranks: Sequence[int] | None = None
    ) -> Future[list[Any]]:
        """See `WorkerGroup`."""
        ranks = self._chosen(ranks)
        calls = zip(ranks, args_per_rank, strict=True)
        return self.collect([self.hosts[rank].run.remote(method, *args) for rank, args in calls], ranks)

    def pipe(
        self,
        method: str,
        args: tuple[Any, ...],
        target: RayGroup,
        target_method: str,
        target_ranks: Sequence[int] | None = None,
    ) -> Future[None]:
        """See `WorkerGroup`. The result is an object in Ray's store that the targets read directly."""
        target_ranks = target._chosen(target_ranks)
        sent = [host.run.remote(method, *args) for host in self.hosts]
        received = [target.hosts[rank].run.remote(target_method, sent[0]) for rank in target_ranks]
        others = gathered([self.collect(sent[1:], range(1, self.num_ranks)), target.collect(received, target_ranks)])
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

    def restart(self, ranks: Sequence[int]) -> None:
        """See `WorkerGroup`."""
        self._start_again(self, ranks)

    def _chosen(self, ranks: Sequence[int] | None) -> Sequence[int]:
        return range(self.num_ranks) if ranks is None else ranks

    def collect(self, refs: Sequence[Any], ranks: Sequence[int]) -> Future[list[Any]]:
        """The objects behind `refs`, answers of `ranks`, with errors in this project's terms."""
        return gathered([self._translated(ref, rank) for ref, rank in zip(refs, ranks, strict=True)])

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
        log = f"Last lines of {self.log_paths[rank]}:\n{tail(self.log_paths[rank])}"
        node = f" on {self._places[rank].address}" if rank in self._places else ""
        if isinstance(cause, EngineError):
            return EngineError(f"{where}{node}: {cause} {log}", self.role, rank)
        if isinstance(cause, RlhfDistError):
            return type(cause)(f"{where}: {cause}")
        if isinstance(error, ActorDiedError | ActorUnavailableError | ObjectLostError):
            reason = "out of memory, a signal, or a crash in native code"
            if isinstance(error, ObjectLostError) or "node has died" in str(error):
                reason = "its node died, or cannot be reached"
            return WorkerDied(f"{where} died{node} ({reason}). {log}", self.role, rank)
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
