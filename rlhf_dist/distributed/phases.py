"""Roles that share GPUs take turns: what each holds in each phase of an iteration, and the changes between phases.

             generate    score      policy     value      sync
    rollout  full        –          –          –          weights
    policy   –           weights    full       –          weights
    value    –           weights    –          full       –
    reference, reward    weights    –          –          –

`policy` and `value` are updates and checkpoints of one model alone. A role that does not appear is asleep, in host memory. A
call belongs to a phase by its role and method, and entering a phase waits for the calls of the one before; so nobody who makes
calls has to know of phases. Roles with GPUs of their own take no part.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from rlhf_dist.core.errors import WorkerDied, WorkerError
from rlhf_dist.core.offload import LEVELS, Level
from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.group import WorkerGroup, WorkerSpec

PHASES: dict[str, dict[str, Level]] = {
    "generate": {"rollout": "full"},
    "score": {"policy": "weights", "value": "weights", "reference": "weights", "reward": "weights"},
    "policy": {"policy": "full"},
    "value": {"value": "full"},
    "sync": {"policy": "weights", "rollout": "weights"},
}
"""Phase → role → what it holds; the others are asleep."""

_SYNC = ("join_weight_group", "open_weight_store", "num_buckets", "export_bucket", "weight_specs", "send_weights")
_TRAINED = ("save_checkpoint", "load_checkpoint", "save")
PHASE_OF: dict[tuple[str, str], str] = {
    ("rollout", "generate"): "generate",
    ("rollout", "probe"): "generate",
    **{
        ("rollout", method): "sync" for method in ("join_weight_group", "load_bucket", "receive_weights", "finish_sync")
    },
    **{("policy", method): "sync" for method in (*_SYNC, "export_checksum")},
    **{("policy", method): "policy" for method in ("update_ppo", *_TRAINED)},
    **{("value", method): "value" for method in ("update", *_TRAINED)},
    ("policy", "logprobs"): "score",
    ("value", "values"): "score",
    ("reference", "logprobs"): "score",
    ("reference", "evaluate"): "score",
    ("reward", "score"): "score",
}
"""(role, method) → the phase of such calls."""

RESTARTED = "rollout"
"""The role whose ranks may die and are started again by those who call them (`rollout_engines`)."""


class TakingTurns:
    """The phase that the roles are in. All of them start asleep."""

    def __init__(self, groups: Mapping[str, WorkerGroup], roles: Collection[str]) -> None:
        """`roles`: those that take turns."""
        self.phase = ""
        self._groups = {role: group for role, group in groups.items() if role in roles}
        self._levels: dict[str, Level] = dict.fromkeys(self._groups, "asleep")
        self._calls: list[tuple[str, Future[Any]]] = []
        """Of this phase, with the role that was called, where its end has not been seen."""

    def run(self, calls: Collection[tuple[str, str]], start: Callable[[], Future[Any]]) -> Future[Any]:
        """Start a call in its phase.

        Args:
            calls: (role, method) of those that are called together.
        """
        mine = [call for call in calls if call[0] in self._groups]
        for phase in {_phase_of(*call) for call in mine}:
            self._enter(phase)
        future = start()
        if mine:
            roles = {role for role, _ in mine}
            self._calls = [
                (role, call) for role, call in self._calls if not call.done() or call.exception() is not None
            ]
            self._calls.append((RESTARTED if RESTARTED in roles else roles.pop(), future))
        return future

    def restart(self, group: WorkerGroup, ranks: Sequence[int]) -> None:
        """Start ranks of the rollout role again, while other roles are asleep: an engine takes free memory when it starts."""
        if group.role not in self._groups:
            group.restart(ranks)
            return
        changed = range(group.num_ranks)
        if self.phase == "generate":
            changed = ranks  # the other engines are at work
        else:
            self._finish_calls()
            self._change(_asleep(role for role in self._groups if role != group.role), "generate")
        group.restart(ranks)
        self._levels[group.role] = "asleep"
        awake: dict[str, Level] = {group.role: "full"}
        self._change(awake, "generate", changed)
        self.phase = "generate"

    def _enter(self, phase: str) -> None:
        if phase == self.phase:
            return
        self._finish_calls()
        wanted: dict[str, Level] = {role: PHASES[phase].get(role, "asleep") for role in self._groups}
        if self._levels.get(RESTARTED) == "weights" and wanted[RESTARTED] == "asleep":
            # vLLM sleeps only as a whole, and wakes its KV cache for that: as in `generate`, nobody else is awake then.
            self._change(_asleep(role for role in wanted if role != RESTARTED), phase)
        shrinking: dict[str, Level] = {
            role: level for role, level in wanted.items() if _rank(level) < _rank(self._levels[role])
        }
        self._change(shrinking, phase)
        self._change(wanted, phase)
        self.phase = phase

    def _finish_calls(self) -> None:
        """Wait for the calls of this phase. The first failure is raised: the ranks that wait for one that failed would never
        answer. That of an engine is left to those who asked it."""
        calls, self._calls = self._calls, []
        by_future = {future: role for role, future in calls}
        for future in concurrent.futures.as_completed(by_future):
            error = future.exception()
            if error is not None and by_future[future] != RESTARTED:
                raise error

    def _change(self, wanted: Mapping[str, Level], phase: str, ranks: Sequence[int] | None = None) -> None:
        """Bring roles, or some ranks of each, to levels at the same time."""
        changes: dict[str, Level] = {role: level for role, level in wanted.items() if level != self._levels[role]}
        answers: list[tuple[str, Future[Any]]] = []
        for role, level in changes.items():
            group = self._groups[role]
            for rank in range(group.num_ranks) if ranks is None else ranks:
                with _naming(role, level, phase):
                    answers.append((role, group.call("hold", level, ranks=[rank])))
        for role, answer in answers:
            with _naming(role, changes[role], phase):
                answer.result()
        self._levels.update(changes)


@contextlib.contextmanager
def _naming(role: str, level: Level, phase: str) -> Iterator[None]:
    """Name role, level and phase of a failure inside. The death of an engine is left to its next call."""
    try:
        yield
    except Exception as error:
        if isinstance(error, WorkerDied) and role == RESTARTED:
            return
        raise WorkerError(
            f"{role} could not change to {level!r} for the phase {phase} ({error}); `rlhf-dist plan` shows what each phase "
            "needs: lower the micro-batches or gpu_memory_utilization (rollout.vllm_options), or set colocate to false"
        ) from error


class TurnGroup:
    """A worker group whose calls belong to phases; see `WorkerGroup`."""

    def __init__(self, group: WorkerGroup, turns: TakingTurns) -> None:
        self.group = group
        self.turns = turns
        self.role, self.num_ranks, self.device = group.role, group.num_ranks, group.device

    def call(self, method: str, *args: Any, ranks: Sequence[int] | None = None) -> Future[list[Any]]:
        """See `WorkerGroup`."""
        return self.turns.run([(self.role, method)], lambda: self.group.call(method, *args, ranks=ranks))

    def scatter(
        self, method: str, args_per_rank: Sequence[tuple[Any, ...]], ranks: Sequence[int] | None = None
    ) -> Future[list[Any]]:
        """See `WorkerGroup`."""
        return self.turns.run([(self.role, method)], lambda: self.group.scatter(method, args_per_rank, ranks))

    def pipe(
        self,
        method: str,
        args: tuple[Any, ...],
        target: TurnGroup,
        target_method: str,
        target_ranks: Sequence[int] | None = None,
    ) -> Future[None]:
        """See `WorkerGroup`."""
        return self.turns.run(
            [(self.role, method), (target.role, target_method)],
            lambda: self.group.pipe(method, args, target.group, target_method, target_ranks),
        )

    def restart(self, ranks: Sequence[int]) -> None:
        """See `WorkerGroup`."""
        self.turns.restart(self.group, ranks)


def taking_turns(groups: Mapping[str, WorkerGroup], roles: Collection[str]) -> dict[str, WorkerGroup]:
    """The groups of a run in which `roles` take turns; their workers are asleep (`asleep`)."""
    turns = TakingTurns(groups, roles)
    return {role: TurnGroup(group, turns) for role, group in groups.items()}


def asleep(spec: WorkerSpec) -> WorkerSpec:
    """The same role, asleep once it is built, and built while the others sleep."""
    return replace(spec, build=_AsleepAfter(spec.build), takes_turns=True)


class _AsleepAfter:
    """Builds a worker and puts it to sleep."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self.build = build

    def __call__(self, *, context: RankContext) -> Any:
        worker = self.build(context=context)
        worker.hold("asleep")
        return worker


def _asleep(roles: Iterable[str]) -> dict[str, Level]:
    return dict.fromkeys(roles, "asleep")


def _phase_of(role: str, method: str) -> str:
    if (role, method) not in PHASE_OF:
        raise KeyError(f"calls of {method!r} of {role} belong to no phase; enter them in phases.PHASE_OF")
    return PHASE_OF[role, method]


def _rank(level: Level) -> int:
    return LEVELS.index(level)
