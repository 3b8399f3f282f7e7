"""Roles that take turns: the order of levels and calls, over groups that record both."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from rlhf_dist.core.errors import WorkerDied, WorkerError
from rlhf_dist.core.futures import completed
from rlhf_dist.distributed.phases import PHASE_OF, PHASES, RESTARTED, taking_turns

ROLES = ("policy", "value", "reference", "reward", "rollout")
Events = list[tuple[str, ...]]


class RecordingGroup:
    """Writes down what it is asked for; a method in `pending` is answered when the test says so."""

    device = "cpu"

    def __init__(self, role: str, events: Events, num_ranks: int = 1) -> None:
        self.role = role
        self.events = events
        self.num_ranks = num_ranks
        self.pending: dict[str, Future[Any]] = {}
        self.failing: dict[str, Exception] = {}

    def call(self, method: str, *args: Any, ranks: Sequence[int] | None = None) -> Future[list[Any]]:
        """See `WorkerGroup`."""
        named = [str(arg) for arg in args] if method == "hold" else []
        if not ranks or ranks[0] == 0:
            self.events.append((self.role, method, *named))
        failure = self.failing.get(" ".join((method, *named)))
        if failure is not None:
            failed: Future[list[Any]] = Future()
            failed.set_exception(failure)
            return failed
        return self.pending.get(method, completed([None]))

    def scatter(self, method: str, args_per_rank: Any, ranks: Sequence[int] | None = None) -> Future[list[Any]]:
        """See `WorkerGroup`."""
        return self.call(method)

    def pipe(self, method: str, args: Any, target: Any, target_method: str, target_ranks: Any = None) -> Future[None]:
        """See `WorkerGroup`."""
        self.call(method)
        target.call(target_method)
        return completed(None)

    def restart(self, ranks: Sequence[int]) -> None:
        """See `WorkerGroup`."""
        self.events.append((self.role, "restart"))


class Hosted:
    """Recording groups whose roles take turns."""

    def __init__(self, roles: Sequence[str] = ROLES, num_ranks: int = 1) -> None:
        self.events: Events = []
        self.recording = {role: RecordingGroup(role, self.events, num_ranks) for role in ROLES}
        groups: Any = self.recording
        self.groups: Any = taking_turns(groups, roles)

    def taken(self) -> Events:
        """The events since the last look."""
        events, self.events[:] = list(self.events), []
        return events

    def sync(self) -> None:
        self.groups["policy"].pipe("export_bucket", (0,), self.groups["rollout"], "load_bucket")


def test_an_iteration_holds_in_each_phase_what_the_table_says():
    hosted = Hosted()
    hosted.groups["rollout"].call("generate")
    assert hosted.taken() == [("rollout", "hold", "full"), ("rollout", "generate")]

    hosted.groups["reward"].call("score")
    hosted.groups["reference"].call("logprobs")
    hosted.groups["policy"].call("logprobs")
    hosted.groups["value"].call("values")
    events = hosted.taken()
    assert events[0] == ("rollout", "hold", "asleep")  # what shrinks comes first
    assert set(events[1:5]) == {(role, "hold", "weights") for role in ROLES if role != "rollout"}
    assert [role for role, *_ in events[5:]] == ["reward", "reference", "policy", "value"]

    hosted.groups["policy"].call("update_ppo")
    events = hosted.taken()
    assert set(events[:3]) == {(role, "hold", "asleep") for role in ("value", "reference", "reward")}
    assert events[3:] == [("policy", "hold", "full"), ("policy", "update_ppo")]

    hosted.groups["value"].call("update")
    assert hosted.taken() == [("policy", "hold", "asleep"), ("value", "hold", "full"), ("value", "update")]

    hosted.groups["policy"].call("num_buckets")
    hosted.sync()
    events = hosted.taken()
    assert events[0] == ("value", "hold", "asleep")
    assert set(events[1:3]) == {("policy", "hold", "weights"), ("rollout", "hold", "weights")}
    assert events[3:] == [("policy", "num_buckets"), ("policy", "export_bucket"), ("rollout", "load_bucket")]


def test_a_rollout_engine_that_is_half_awake_goes_to_sleep_by_itself():
    """vLLM wakes its KV cache to sleep as a whole: the policy's weights are gone before, and come back after."""
    hosted = Hosted()
    hosted.sync()
    hosted.taken()
    hosted.groups["policy"].call("save_checkpoint")
    assert hosted.taken() == [
        ("policy", "hold", "asleep"),
        ("rollout", "hold", "asleep"),
        ("policy", "hold", "full"),
        ("policy", "save_checkpoint"),
    ]


def test_a_phase_waits_for_the_calls_of_the_one_before():
    hosted = Hosted()
    update: Future[Any] = Future()
    hosted.recording["policy"].pending["update_ppo"] = update
    assert hosted.groups["policy"].call("update_ppo") is update
    hosted.taken()
    other = threading.Thread(target=lambda: hosted.groups["value"].call("update"))
    other.start()
    other.join(0.2)
    assert other.is_alive()
    assert hosted.taken() == []
    update.set_result([None])
    other.join(10)
    assert hosted.taken() == [("policy", "hold", "asleep"), ("value", "hold", "full"), ("value", "update")]


def test_a_failed_call_is_raised_before_anyone_is_asked_to_change():
    hosted = Hosted()
    hosted.recording["policy"].failing["update_ppo"] = WorkerDied("policy rank 1 died", "policy", 1)
    hosted.groups["policy"].call("update_ppo")
    hosted.taken()
    with pytest.raises(WorkerDied, match="policy rank 1 died"):
        hosted.groups["value"].call("update")
    assert hosted.taken() == []


def test_a_failed_change_names_role_level_and_phase_with_a_remedy():
    hosted = Hosted()
    hosted.recording["value"].failing["hold full"] = RuntimeError("CUDA out of memory")
    with pytest.raises(
        WorkerError,
        match=r"value could not change to 'full' for the phase value \(CUDA out of memory\); .*colocate to false",
    ):
        hosted.groups["value"].call("update")


def test_roles_with_gpus_of_their_own_take_no_part():
    hosted = Hosted(roles=("reference", "reward", "rollout"))
    hosted.groups["reward"].call("score")
    hosted.taken()
    hosted.groups["policy"].call("update_ppo")
    assert hosted.taken() == [("policy", "update_ppo")]
    hosted.sync()
    events = hosted.taken()
    assert set(events[:2]) == {("reference", "hold", "asleep"), ("reward", "hold", "asleep")}
    assert events[2:] == [("rollout", "hold", "weights"), ("policy", "export_bucket"), ("rollout", "load_bucket")]


def test_a_dead_engine_is_left_to_its_next_call_and_started_again_while_others_sleep():
    hosted = Hosted(num_ranks=2)
    hosted.recording["rollout"].failing["hold weights"] = WorkerDied("rollout rank 0 died", "rollout", 0)
    hosted.sync()
    hosted.taken()
    hosted.groups["rollout"].restart([0])
    assert hosted.taken() == [("policy", "hold", "asleep"), ("rollout", "restart"), ("rollout", "hold", "full")]
    hosted.groups["rollout"].restart([0])
    assert hosted.taken() == [("rollout", "restart"), ("rollout", "hold", "full")]


def test_calls_without_a_phase_are_not_guessed():
    with pytest.raises(KeyError, match="'fly' of policy belong to no phase"):
        Hosted().groups["policy"].call("fly")


def test_the_tables_speak_of_the_same_roles():
    assert set(PHASE_OF.values()) == set(PHASES)
    assert {role for role, _ in PHASE_OF} == set(ROLES)
    assert RESTARTED in ROLES
    for (role, _), phase in PHASE_OF.items():
        assert PHASES[phase][role] != "asleep"
