"""Rollout engines over the ranks of a worker group: prompts to engines, weights to engines, engines that are started again.

An engine holds nothing that is not elsewhere, too: weights are the policy's, draws are counted. So the death of one does not
end the run. It is started again in its place, gets the weights, and generates its lost prompts again, which gives the tokens
that it would have given. That happens `rollout.max_restarts` times an engine.

A dead engine is noticed by whatever asks it next, and started again by the thread that waits for the answer: by the driver's
own, whose calls to the policy are in order, so that no update comes between two buckets of weights.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from typing_extensions import Self

from rlhf_dist.core.batches import PromptBatch, RolloutBatch, concat_rows
from rlhf_dist.core.errors import TrainingError, WorkerDied, WorkerError
from rlhf_dist.core.futures import Deferred, completed, gathered, mapped
from rlhf_dist.distributed.group import WorkerGroup
from rlhf_dist.distributed.partition import partition
from rlhf_dist.distributed.role_groups import pick_rows
from rlhf_dist.rollout.config import RolloutConfig

log = logging.getLogger(__name__)

FIRST_CAUSE_S = 10.0
"""Longest wait for the death that may be behind an error."""


class Attempt(NamedTuple):
    """A call to an engine."""

    of_ranks: list[Future[Any]]
    """The answer of each of its ranks."""
    together: Future[list[Any]]
    """Of all of them; fails with the first."""
    restarts: int
    """How often the engine had been started again when it was called: an answer lost since then is no new death."""

    def result(self) -> list[Any]:
        """What its ranks answer.

        Raises:
            WorkerDied: a rank died. (The others may fail before, in a collective with it.)
            RlhfDistError: another failure.
        """
        try:
            return self.together.result()
        except WorkerDied:
            raise
        except WorkerError as error:
            concurrent.futures.wait(self.of_ranks, FIRST_CAUSE_S)
            failures = [rank.exception() for rank in self.of_ranks if rank.done()]
            raise next((failure for failure in failures if isinstance(failure, WorkerDied)), error) from None


class Engines:
    """The ranks of the rollout group as engines, each of `tensor_parallel_size` neighboring ranks that live and die together:
    they get the same calls and give the same answer."""

    def __init__(self, group: WorkerGroup, tensor_parallel_size: int = 1, max_restarts: int = 0) -> None:
        self.group = group
        self.tensor_parallel_size = tensor_parallel_size
        self.max_restarts = max_restarts
        self.num_engines = group.num_ranks // tensor_parallel_size
        self.restarts = [0] * self.num_engines
        """Of each engine, how often it was started again."""
        self.reload: Callable[[int], None] = lambda engine: None
        """Brings weights to an engine that was started again. Without a policy it has those of its model's files, as at the
        start."""

    def ranks(self, engine: int) -> range:
        """The ranks of an engine."""
        return range(engine * self.tensor_parallel_size, (engine + 1) * self.tensor_parallel_size)

    def call(self, engine: int, method: str, *args: Any) -> Attempt:
        """The same call on every rank of an engine."""
        return self.call_each(engine, method, [args] * self.tensor_parallel_size)

    def call_each(self, engine: int, method: str, args_per_rank: Sequence[tuple[Any, ...]]) -> Attempt:
        """Each rank of an engine with its own arguments."""
        calls = zip(self.ranks(engine), args_per_rank, strict=True)
        answers = [self.group.scatter(method, [args], [rank]) for rank, args in calls]
        of_ranks = [mapped(answer, lambda one: one[0]) for answer in answers]
        return Attempt(of_ranks, gathered(of_ranks), self.restarts[engine])

    def answers(self, attempts: Sequence[Attempt], again: Callable[[int], Attempt]) -> tuple[list[Any], set[int]]:
        """What each engine answers (its first rank); one that died is started again and called by `again(engine)`. Also: the
        engines that were called again.

        Raises:
            WorkerError: an engine died once too often, or failed in a way that would repeat.
        """
        answers: dict[int, Any] = {}
        repeated: set[int] = set()
        waiting = dict(enumerate(attempts))
        while waiting:
            # Engines start again while the others work.
            calls = [attempt.together for attempt in waiting.values()]
            done = concurrent.futures.wait(calls, return_when=concurrent.futures.FIRST_EXCEPTION).done
            for engine, attempt in list(waiting.items()):
                if attempt.together not in done:
                    continue
                try:
                    answers[engine] = attempt.result()[0]
                    del waiting[engine]
                except WorkerDied as death:
                    if attempt.restarts == self.restarts[engine]:
                        self.start_again(engine, death)
                    waiting[engine] = again(engine)
                    repeated.add(engine)
        return [answers[engine] for engine in range(len(attempts))], repeated

    def start_again(self, engine: int, death: WorkerDied) -> None:
        """Start an engine that died again, with the weights it should have.

        Raises:
            WorkerError: it was started again too often.
        """
        while True:
            if self.restarts[engine] >= self.max_restarts:
                raise WorkerError(
                    f"rollout engine {engine} died after {self.restarts[engine]} restarts in this run, and "
                    f"rollout.max_restarts is {self.max_restarts}; fix the cause or raise it, and continue with --resume auto. "
                    f"{death}"
                ) from death
            self.restarts[engine] += 1
            log.warning(
                "rollout engine %d is started again (restart %d of %d), and its lost prompts are generated again: %s",
                engine,
                self.restarts[engine],
                self.max_restarts,
                death,
            )
            try:
                self.group.restart(self.ranks(engine))
                self.reload(engine)
                return
            except WorkerDied as error:
                self.engine_of(error)
                death = error

    def engine_of(self, death: WorkerDied) -> int:
        """The engine that died. Another role's death is raised again: only engines are started again."""
        if death.role != self.group.role:
            raise death
        return death.rank // self.tensor_parallel_size


class Transport(Protocol):
    """Carries the policy's weights to engines."""

    def send(self, ranks: Mapping[int, range]) -> dict[int, WorkerDied]:
        """All weights to the engines (engine → its ranks), not yet labeled; returns the engines that died."""
        ...


class StoreTransport:
    """Through host memory and the hosting's object store (Ray's is shared memory on every node, and passes by the driver). Two
    buckets are on their way at a time."""

    def __init__(self, policy: WorkerGroup, engines: Engines) -> None:
        self.policy = policy
        self.engines = engines

    def send(self, ranks: Mapping[int, range]) -> dict[int, WorkerDied]:
        """See `Transport`."""
        dead: dict[int, WorkerDied] = {}
        under_way: list[Future[None]] = []

        def finish_first() -> None:
            try:
                under_way.pop(0).result()
            except WorkerDied as death:
                dead[self.engines.engine_of(death)] = death

        for index in range(self.policy.call("num_buckets").result()[0]):
            if len(under_way) == 2:
                finish_first()
            alive = [rank for engine, of_engine in ranks.items() if engine not in dead for rank in of_engine]
            under_way.append(self.policy.pipe("export_bucket", (index,), self.engines.group, "load_bucket", alive))
        while under_way:
            finish_first()
        return dead


class BroadcastTransport:
    """From rank 0 of the policy straight to the engines, in a process group of theirs. A group in which an engine died is made
    anew; the engines that were in the middle of a transfer then are started again, too."""

    def __init__(self, policy: WorkerGroup, engines: Engines, timeout_s: float = 180) -> None:
        self.policy = policy
        self.engines = engines
        self.timeout_s = timeout_s
        self._members: tuple[tuple[int, int], ...] = ()
        """Engines of the group, each with the number of its restarts."""

    def send(self, ranks: Mapping[int, range]) -> dict[int, WorkerDied]:
        """See `Transport`."""
        members = tuple((engine, self.engines.restarts[engine]) for engine in ranks)
        if members != self._members:
            self._members = ()
            if dead := self._meet(ranks):
                return dead
            self._members = members
        specs = self.policy.call("weight_specs").result()[0]
        sending = self.policy.call("send_weights")
        dead = self._deaths({engine: self.engines.call(engine, "receive_weights", specs) for engine in ranks}, sending)
        if dead:
            self._members = ()
        return dead

    def _meet(self, ranks: Mapping[int, range]) -> dict[int, WorkerDied]:
        # Never one of before: the store of a process outlives the run, and remembers.
        name, size = uuid.uuid4().hex, 1 + sum(map(len, ranks.values()))
        address, port = self.policy.call("open_weight_store").result()[0]
        joining = self.policy.call("join_weight_group", name, size, self.timeout_s)
        places = itertools.count(1)
        calls = {
            engine: self.engines.call_each(
                engine,
                "join_weight_group",
                [(name, next(places), size, self.timeout_s, address, port) for _ in of_engine],
            )
            for engine, of_engine in ranks.items()
        }
        return self._deaths(calls, joining)

    def _deaths(self, calls: Mapping[int, Attempt], of_policy: Future[Any]) -> dict[int, WorkerDied]:
        """The engines that died in a call to all of them and to the policy, whose own failure then follows from theirs."""
        dead: dict[int, WorkerDied] = {}
        for engine, call in calls.items():
            try:
                call.result()
            except WorkerDied as death:
                dead[engine] = death
        try:
            of_policy.result()
        except WorkerDied:
            raise
        except WorkerError:
            if not dead:
                raise
        return dead


class GroupWeightSync:
    """`roles.WeightSync`: the policy's weights → every rollout engine, a bucket at a time."""

    def __init__(
        self, policy: WorkerGroup, engines: Engines, transport: Literal["store", "broadcast"] = "store"
    ) -> None:
        self.policy = policy
        self.engines = engines
        self.transport: Transport = (BroadcastTransport if transport == "broadcast" else StoreTransport)(
            policy, engines
        )
        self._version = 0
        self._checksum: int | None = None
        """Of the weights of that version; None until they are sent."""
        engines.reload = self._reload

    def push(self, version: int) -> Future[None]:
        """See `roles.WeightSync`. Engines that died are started again, and get the weights once the others have them."""
        self._version, self._checksum = version, None
        for engine, death in self._send(range(self.engines.num_engines)).items():
            self.engines.start_again(engine, death)
        return completed(None)

    def _reload(self, engine: int) -> None:
        """The policy's weights, for an engine that was started again."""
        for death in self._send([engine]).values():
            raise death

    def _send(self, engines: Sequence[int]) -> dict[int, WorkerDied]:
        """The policy's weights to some engines; returns those that died.

        They are labeled with the version last pushed, or with the next where the policy has been updated since: an update that
        was under way comes first.
        """
        dead = self.transport.send({engine: self.engines.ranks(engine) for engine in engines})
        sent = self.policy.call("export_checksum").result()[0]
        if self._checksum is None:
            self._checksum = sent
        version = self._version if sent == self._checksum else self._version + 1
        calls = {engine: self.engines.call(engine, "finish_sync", version) for engine in engines if engine not in dead}
        wrong: dict[int, tuple[int, int]] = {}
        for engine, call in calls.items():
            try:
                answers = zip(self.engines.ranks(engine), call.result(), strict=True)
                wrong |= {rank: answer for rank, answer in answers if answer != (version, sent)}
            except WorkerDied as death:
                dead[engine] = death
        if wrong:
            raise TrainingError(
                f"after the sync of version {version} (checksum {sent}), rollout ranks {list(wrong)} report "
                f"{list(wrong.values())}; the run cannot continue with stale weights"
            )
        return dead


class RolloutRole:
    """`roles.RolloutEngine`: prompts are divided among engines.

    Where the policy was updated while a batch was generated (one step off-policy), an engine that died meanwhile generates its
    lost prompts with the updated weights, and `policy_version` is that of the oldest weights in the batch. Log-probs are in
    every row those of the weights that drew it.
    """

    def __init__(
        self, group: WorkerGroup, batch_size: int, tensor_parallel_size: int = 1, max_restarts: int = 0
    ) -> None:
        """`batch_size`: sequences that an engine generates at the same time; the others as in `RolloutConfig`."""
        self.engines = Engines(group, tensor_parallel_size, max_restarts)
        self.batch_size = batch_size

    @classmethod
    def of_config(cls, group: WorkerGroup, config: RolloutConfig) -> Self:
        """The role of hosted engines. (A session that hosts one rank a role hosts one engine.)"""
        size = min(config.tensor_parallel_size, group.num_ranks)
        return cls(group, config.batch_size, size, config.max_restarts)

    def generate(self, prompts: PromptBatch, *, stream: str, iteration: int) -> Future[RolloutBatch]:
        """See `roles.RolloutEngine`. Engines that died are started again when the result is asked for."""
        engines = self.engines
        picks = [pick_rows([share]) for share in partition(prompts.lengths, engines.num_engines, self.batch_size)]
        order = torch.argsort(torch.tensor([row for rows, _ in picks for row in rows]))

        def start(engine: int) -> Attempt:
            rows, local = picks[engine]
            return engines.call(engine, "generate", prompts.rows(rows), local[0], stream, iteration)

        def finish() -> RolloutBatch:
            answers, repeated = engines.answers(attempts, start)
            parts = {engine: part for engine, part in enumerate(answers) if part is not None}
            version = common_version({engine: part.policy_version for engine, part in parts.items()}, repeated)
            return replace(concat_rows(list(parts.values())), policy_version=version).rows(order)

        attempts = [start(engine) for engine in range(engines.num_engines)]
        return Deferred(finish, [attempt.together for attempt in attempts])

    def probe(self, prompts: PromptBatch) -> Future[RolloutBatch]:
        """See `roles.RolloutEngine`."""
        engines = self.engines

        def start(engine: int) -> Attempt:
            return engines.call(engine, "probe", prompts)

        attempts = [start(engine) for engine in range(engines.num_engines)]
        return Deferred(
            lambda: concat_rows(engines.answers(attempts, start)[0]), [attempt.together for attempt in attempts]
        )


def common_version(versions: Mapping[int, int], repeated: Collection[int]) -> int:
    """The version of the weights that engines answered with: the oldest, where those that had to answer again have newer ones.

    Raises:
        TrainingError: they differ otherwise.
    """
    oldest = min(versions.values())
    if any(version != oldest for engine, version in versions.items() if engine not in repeated):
        raise TrainingError(
            f"rollout engines answered with weights of versions {sorted(set(versions.values()))}; sync them first"
        )
    return oldest
