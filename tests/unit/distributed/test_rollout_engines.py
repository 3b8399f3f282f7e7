"""Rollout engines that die are started again, with the policy's weights, and generate what was lost.

Real actors on a private Ray, real kills. Tokens are compared with those of engines that were left alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import pytest
import torch
from support.mortal import ManyBucketsPolicy, MortalRolloutWorker
from support.tiny import experience_batch, prompt_batch, trained

from rlhf_dist.config.hosting import Placement, RayConfig
from rlhf_dist.core.errors import DataError, TrainingError, WorkerDied, WorkerError
from rlhf_dist.distributed.group import WorkerSpec
from rlhf_dist.distributed.ray.session import RaySession
from rlhf_dist.distributed.rollout_engines import GroupWeightSync, RolloutRole, common_version
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.roles import PolicyRole
from rlhf_dist.rollout.config import RolloutConfig

pytestmark = [pytest.mark.timeout(600)]
PROMPTS = prompt_batch([4, 2, 6, 3, 5, 1, 2, 7])
EXPERIENCE = experience_batch([3, 6, 2, 4, 5], [4, 2, 7, 1, 3], seed=1)
STEPS = [torch.tensor([4, 0, 2]), torch.tensor([1, 3])]
LIMIT = 2
TESTS = Path(__file__).parents[2]


class Hosted(NamedTuple):
    """A policy of one rank, and rollout engines."""

    policy: PolicyRole
    rollout: RolloutRole
    sync: GroupWeightSync
    orders: Path
    logs: Path

    def pids(self) -> list[int]:
        return self.rollout.engines.group.call("pid").result(timeout=60)

    def generate(self) -> Any:
        return self.rollout.generate(PROMPTS, stream="rollout", iteration=0)

    def update(self) -> Any:
        return self.policy.update(EXPERIENCE, STEPS, None)


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    with pytest.MonkeyPatch.context() as environment:  # from which a private Ray's processes import `support`
        environment.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
        yield from _session()


def _session() -> Iterator[RaySession]:
    session = RaySession(RayConfig(), "cpu")
    before = set(psutil.Process().children(recursive=True))
    try:
        yield session
    finally:
        started = set(psutil.Process().children(recursive=True)) - before
        session.close()
        assert not psutil.wait_procs(started, timeout=60)[1], "processes outlived the session"


@contextlib.contextmanager
def groups_of(session: RaySession, path: Path, folder: Path, num_ranks: int = 2) -> Iterator[dict[str, Any]]:
    """A policy of one rank and some rollout ranks; logs and orders in `folder`."""
    orders, logs = folder / "orders", folder / "logs"
    orders.mkdir(parents=True)
    config = trained(path, optimizer={"schedule": "constant", "warmup_fraction": 0.0, "learning_rate": 1e-2})
    policy = partial(
        ManyBucketsPolicy,
        config,
        num_steps=100,
        temperature=1.0,
        settings=PPOSettings(clip_range=0.2, self_checks=False),
    )
    engine = partial(
        MortalRolloutWorker,
        RolloutConfig(max_response_tokens=8),
        model_path=str(path),
        precision="fp32",
        orders=orders,
    )
    specs = [
        WorkerSpec("policy", Placement(), policy),
        WorkerSpec("rollout", Placement(num_ranks=num_ranks), engine),
    ]
    with session.place(specs, seed=3, logs_dir=lambda: logs) as groups:
        yield groups


def roles_of(
    groups: dict[str, Any],
    folder: Path,
    tensor_parallel_size: int = 1,
    transport: Literal["store", "broadcast"] = "store",
) -> Hosted:
    """Roles that know of no restart yet."""
    rollout = RolloutRole(groups["rollout"], 2, tensor_parallel_size, max_restarts=LIMIT)
    sync = GroupWeightSync(groups["policy"], rollout.engines, transport)
    return Hosted(PolicyRole(groups["policy"], 2), rollout, sync, folder / "orders", folder / "logs")


@contextlib.contextmanager
def hosted(
    session: RaySession, path: Path, folder: Path, num_ranks: int = 2, tensor_parallel_size: int = 1
) -> Iterator[Hosted]:
    with groups_of(session, path, folder, num_ranks) as groups:
        yield roles_of(groups, folder, tensor_parallel_size)


@pytest.fixture(scope="module")
def shared(
    session: RaySession, tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Any], Path]]:
    folder = tmp_path_factory.mktemp("engines")
    with groups_of(session, tiny_lm, folder) as groups:
        yield groups, folder


@pytest.fixture
def engines(shared: tuple[dict[str, Any], Path]) -> Hosted:
    """Processes that the tests share (a new one takes seconds), all alive, with the policy's weights."""
    groups, folder = shared
    for order in (folder / "orders").iterdir():
        order.unlink()
    roles_of(groups, folder).sync.push(0).result()  # starts again what the last test left dead
    return roles_of(groups, folder)


def assert_same(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.tokens, expected.tokens)
    assert torch.equal(actual.response_lengths, expected.response_lengths)
    assert torch.equal(actual.rollout_logprobs, expected.rollout_logprobs)
    assert actual.policy_version == expected.policy_version


def assert_only_rank_1_is_new(before: list[int], after: list[int]) -> None:
    assert after[0] == before[0], "the other engine was left alone"
    assert after[1] != before[1]
    assert not psutil.pid_exists(before[1])


@pytest.mark.parametrize("how", ["kill", "engine"])
def test_lost_prompts_are_generated_again_with_the_same_tokens(
    engines: Hosted, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    engines.update().result()
    engines.sync.push(1).result()
    expected, before = engines.generate().result(), engines.pids()
    (engines.orders / "generate_1").write_text(f"{how} 1")
    assert_same(engines.generate().result(), expected)
    assert expected.policy_version == 1
    assert_only_rank_1_is_new(before, engines.pids())
    (said,) = [record.getMessage() for record in caplog.records if "started again" in record.getMessage()]
    assert "rollout engine 1 is started again (restart 1 of 2)" in said
    assert "rollout rank 1" in said
    assert f"process {before[1]} on" in said, "the last lines of the rank's log"
    log = (engines.logs / "rollout_1.log").read_text()
    assert log.index(f"process {before[1]} on") < log.index(f"process {engines.pids()[1]} on")


def test_chunks_that_were_lost_together_take_one_restart(engines: Hosted) -> None:
    expected, before = engines.generate().result(), engines.pids()
    (engines.orders / "generate_1").write_text("kill 1")
    chunks = [engines.generate() for _ in range(3)]
    for chunk in chunks:
        assert_same(chunk.result(), expected)
    assert engines.rollout.engines.restarts == [0, 1]
    assert_only_rank_1_is_new(before, engines.pids())


def test_an_engine_killed_from_outside_while_it_generates(engines: Hosted) -> None:
    expected, before = engines.generate().result(), engines.pids()
    generation = engines.generate()
    os.kill(before[1], signal.SIGKILL)
    assert_same(generation.result(), expected)
    assert_only_rank_1_is_new(before, engines.pids())


@pytest.mark.parametrize("when", ["before", "load_bucket", "finish_sync"])
def test_an_engine_that_is_dead_at_a_sync_is_started_again(engines: Hosted, when: str) -> None:
    engines.update().result()
    before = engines.pids()
    if when == "before":
        os.kill(before[1], signal.SIGKILL)
        psutil.wait_procs([psutil.Process(before[1])] if psutil.pid_exists(before[1]) else [], timeout=30)
    else:
        (engines.orders / f"{when}_1").write_text("kill 1")
    engines.sync.push(1).result()
    assert_only_rank_1_is_new(before, engines.pids())
    rollout = engines.generate().result()
    assert rollout.policy_version == 1
    assert torch.allclose(engines.policy.logprobs(rollout).result(), rollout.rollout_logprobs, atol=1e-4)


def test_broadcast_weights_are_those_of_the_store(shared: tuple[dict[str, Any], Path], engines: Hosted) -> None:
    """In many buckets, so that several are under way; again after an update, in the same process group."""
    broadcast = roles_of(*shared, transport="broadcast")
    for version in (1, 2):
        engines.update().result()
        engines.sync.push(version).result()
        expected = engines.generate().result()
        engines.update().result()
        assert len(broadcast.policy.group.call("weight_specs").result()[0]) > 5
        broadcast.sync.push(version + 10).result()
        moved = broadcast.generate().result()
        assert moved.policy_version == version + 10
        assert not torch.equal(moved.rollout_logprobs, expected.rollout_logprobs)
        engines.sync.push(version + 10).result()
        assert_same(engines.generate().result(), moved)


@pytest.mark.parametrize("when", ["receive_weights", "finish_sync"])
def test_an_engine_that_dies_in_a_broadcast_is_started_again(
    shared: tuple[dict[str, Any], Path], engines: Hosted, when: str
) -> None:
    broadcast = roles_of(*shared, transport="broadcast")
    broadcast.sync.push(0).result()
    broadcast.update().result()
    before = broadcast.pids()
    (broadcast.orders / f"{when}_1").write_text("kill 1")
    broadcast.sync.push(1).result()
    assert broadcast.pids()[1] != before[1]
    rollout = broadcast.generate().result()
    assert rollout.policy_version == 1
    assert torch.allclose(broadcast.policy.logprobs(rollout).result(), rollout.rollout_logprobs, atol=1e-4)
    # The engines that are left, old and new, meet in a group of their own.
    broadcast.update().result()
    broadcast.sync.push(2).result()
    rollout = broadcast.generate().result()
    assert rollout.policy_version == 2
    assert torch.allclose(broadcast.policy.logprobs(rollout).result(), rollout.rollout_logprobs, atol=1e-4)


def test_an_engine_that_always_dies_ends_the_run(engines: Hosted) -> None:
    (engines.orders / "generate_0").write_text("kill 99")
    with pytest.raises(WorkerError) as raised:
        engines.generate().result()
    said = str(raised.value)
    assert "rollout engine 0 died after 2 restarts in this run, and rollout.max_restarts is 2" in said
    assert "rollout rank 0 died on " in said
    assert "out of memory, a signal" in said
    assert f"Last lines of {engines.logs / 'rollout_0.log'}:\n  process " in said
    assert engines.rollout.engines.restarts == [2, 0]


def test_deaths_of_the_new_process_count_too(engines: Hosted) -> None:
    expected = engines.generate().result()
    (engines.orders / "generate_1").write_text("kill 1")
    (engines.orders / "build_1").write_text("kill 1")
    assert_same(engines.generate().result(), expected)
    assert engines.rollout.engines.restarts == [0, 2]
    (engines.orders / "load_bucket_0").write_text("kill 2")
    engines.sync.push(1).result()
    assert engines.rollout.engines.restarts == [2, 2]
    assert engines.generate().result().policy_version == 1


def test_an_error_that_would_repeat_starts_nothing_again(engines: Hosted) -> None:
    before = engines.pids()
    (engines.orders / "generate_1").write_text("data 1")
    with pytest.raises(DataError, match="rollout rank 1: a row that no engine can read"):
        engines.generate().result()
    assert engines.pids() == before


def test_the_policys_death_is_no_engines_and_ends_the_run(session: RaySession, tiny_lm: Path, tmp_path: Path) -> None:
    with hosted(session, tiny_lm, tmp_path, num_ranks=1) as engines:
        engines.sync.push(0).result()
        os.kill(int((engines.logs / "policy_0.log").read_text().split()[1]), signal.SIGKILL)
        with pytest.raises(WorkerDied, match="policy rank 0 died") as raised:
            engines.sync.push(1).result()
        assert (raised.value.role, raised.value.rank) == ("policy", 0)
        assert engines.rollout.engines.restarts == [0]


def test_ranks_of_one_engine_are_started_again_together(session: RaySession, tiny_lm: Path, tmp_path: Path) -> None:
    with hosted(session, tiny_lm, tmp_path, num_ranks=4, tensor_parallel_size=2) as engines:
        engines.sync.push(0).result()
        expected, before = engines.generate().result(), engines.pids()
        (engines.orders / "generate_3").write_text("kill 1")
        assert_same(engines.generate().result(), expected)
        after = engines.pids()
        assert after[:2] == before[:2]
        assert not set(after[2:]) & set(before[2:])
        assert not any(psutil.pid_exists(pid) for pid in before[2:])


def test_weights_that_moved_on_are_labeled_as_what_they_are(engines: Hosted) -> None:
    """One step off-policy: the policy is updated while its older version generates."""
    engines.sync.push(4).result()
    expected = engines.generate().result()
    (engines.orders / "generate_1").write_text("kill 1")
    generation, update = engines.generate(), engines.update()
    rollout = generation.result()
    update.result()
    assert rollout.policy_version == 4, "the oldest weights in the batch"
    same = (rollout.tokens == expected.tokens).all(1) if rollout.tokens.shape == expected.tokens.shape else None
    of_new = engines.policy.logprobs(rollout).result()
    close = (of_new - rollout.rollout_logprobs).abs().amax(1) < 1e-4
    assert 0 < close.sum() < len(rollout), "the lost rows are those of the updated policy, the others are not"
    if same is not None:
        assert same[~close].all()
    with pytest.raises(TrainingError, match=r"versions \[4, 5\]"):
        engines.generate().result()
    engines.sync.push(5).result()
    assert engines.generate().result().policy_version == 5


def test_without_a_policy_an_engine_has_the_weights_of_its_files(
    session: RaySession, tiny_lm: Path, tmp_path: Path
) -> None:
    with hosted(session, tiny_lm, tmp_path, num_ranks=1) as made:
        engines = made._replace(
            rollout=RolloutRole(made.rollout.engines.group, 2, max_restarts=1)
        )  # as in an evaluation
        expected = engines.generate().result()
        (engines.orders / "generate_0").write_text("kill 1")
        rollout = engines.generate().result()
        assert_same(rollout, expected)
        assert rollout.policy_version == 0


def test_all_processes_are_gone_with_the_run_or_kept_for_the_next(
    session: RaySession, tiny_lm: Path, tmp_path: Path
) -> None:
    with hosted(session, tiny_lm, tmp_path / "a", num_ranks=3) as engines:
        first = engines.pids()
        (engines.orders / "generate_1").write_text("kill 1")
        engines.generate().result()
        pids = engines.pids()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in [*first, *pids]):
        assert time.monotonic() < deadline, "a group with a new process in it is not kept"
        time.sleep(0.1)
    with hosted(session, tiny_lm, tmp_path / "b", num_ranks=1) as engines:
        (kept,) = engines.pids()
        os.kill(int((engines.logs / "policy_0.log").read_text().split()[1]), signal.SIGKILL)
    # A process that died after its last call is no error.
    assert psutil.pid_exists(kept)


@pytest.mark.parametrize(
    ("versions", "repeated", "version"),
    [
        ({0: 3, 1: 3}, set(), 3),
        ({0: 3, 1: 4}, {1}, 3),
        ({0: 4, 1: 4}, {0, 1}, 4),
        ({0: 3, 1: 4}, set(), None),
        ({0: 3, 1: 4}, {0}, None),
        ({0: 3, 1: 4, 2: 4}, {1}, None),
    ],
)
def test_versions_may_differ_only_where_an_engine_was_started_again(
    versions: dict[int, int], repeated: set[int], version: int | None
) -> None:
    if version is None:
        with pytest.raises(TrainingError, match=r"versions \[3, 4\]"):
            common_version(versions, repeated)
    else:
        assert common_version(versions, repeated) == version
