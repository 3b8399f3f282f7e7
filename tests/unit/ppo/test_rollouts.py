"""Rollouts in order: which weights generate them, what is generated ahead, and what a checkpoint keeps of it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from support.roles import FakePolicy, RaggedRollout
from support.trainers import PPO, metrics, open_run, prompts, texts

from rlhf_dist.core.batches import RolloutBatch, concat_rows
from rlhf_dist.core.errors import TrainingError
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.importance import Correction
from rlhf_dist.ppo.rollouts import Generating, Rollouts

SETTINGS = PPOSettings(
    num_iterations=4,
    prompts_per_iteration=3,
    responses_per_prompt=2,
    mini_batch_size=2,
    off_policy_iterations=1,
    ptx_coef=0.5,
    ptx_batch_size=4,
    eval_every_iterations=2,
)
ON_POLICY = SETTINGS.model_copy(update={"off_policy_iterations": 0})


def named(events: list[tuple], *names: str) -> list[tuple]:
    return [event for event in events if event[0] in names]


def equal(a: RolloutBatch, b: RolloutBatch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def rollouts(settings: PPOSettings = SETTINGS, num_chunks: int = 1) -> Rollouts:
    engine: Any = RaggedRollout([], FakePolicy([], "policy"))
    return Rollouts(engine, prompts(10), settings, 3, num_chunks)


def whole(generating: Generating) -> RolloutBatch:
    return concat_rows(list(generating.arriving()))


def test_the_next_responses_are_generated_by_the_weights_before_the_update(tmp_path: Path):
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS)
        ppo.trainer.run(resume=False)
    order = [
        event[:1] + event[2:3] if event[0] == "rollout.generate" else event[:1]
        for event in named(ppo.events, "rollout.generate", "policy.update", "sync")
    ]
    generate = [("rollout.generate", k) for k in range(4)]
    learn = [("policy.update",), ("sync",)]
    assert order == [("sync",), *generate[:2], *learn, generate[2], *learn, generate[3], *learn, *learn]
    versions = [(event[2], event[-1]) for event in named(ppo.events, "rollout.generate")]
    assert versions == [(0, 0), (1, 0), (2, 1), (3, 2)]
    assert [metrics(tmp_path)[step]["rollout/staleness"] for step in range(1, 5)] == [0, 1, 1, 1]


def test_on_policy_nothing_is_generated_ahead(tmp_path: Path):
    with open_run(tmp_path) as run:
        ppo = PPO(run, ON_POLICY)
        ppo.trainer.run(resume=False)
    assert [(event[2], event[-1]) for event in named(ppo.events, "rollout.generate")] == [(k, k) for k in range(4)]
    assert {metrics(tmp_path)[step]["rollout/staleness"] for step in range(1, 5)} == {0}
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "step_000002").iterdir()) == [
        *("driver.json", "policy", "value")
    ]


def test_while_the_value_function_warms_up_nothing_is_stale(tmp_path: Path):
    with open_run(tmp_path) as run:
        PPO(run, SETTINGS.model_copy(update={"value_warmup_iterations": 2})).trainer.run(resume=False)
    assert [metrics(tmp_path)[step]["rollout/staleness"] for step in range(1, 5)] == [0, 0, 0, 1]


def test_evaluations_see_the_weights_after_the_update(tmp_path: Path):
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS, eval_prompts=prompts(5, seed=4))
        ppo.trainer.run(resume=False)
    assert [event[-1] for event in named(ppo.events, "rollout.generate") if event[1] == "eval"] == [0, 2, 4]


def test_prompts_do_not_depend_on_how_far_ahead_they_are_drawn():
    on, off = rollouts(ON_POLICY), rollouts()
    for iteration in range(4):
        for found in (on, off):
            found.engine.version = iteration  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(whole(on.take(iteration)).tokens, whole(off.take(iteration)).tokens)


def test_responses_of_unexpected_weights_stop_the_run(tmp_path: Path):
    with open_run(tmp_path) as run:
        ppo = PPO(run, SETTINGS)
        ppo.trainer.step(0)
        ppo.rollout.version = 0  # the sync of version 1 got lost
        ppo.trainer.step(1)
        said = r"responses of iteration 2 come from weights of version 0, not 1: an engine missed a sync"
        ppo.trainer.roles.weight_sync.push(2)
        with pytest.raises(TrainingError, match=said):
            ppo.trainer.step(2)
        assert len(named(ppo.events, "policy.update")) == 2


def test_iterations_are_taken_in_order():
    taken = rollouts()
    taken.take(0)
    with pytest.raises(ValueError, match="responses of iteration 1 come before those of iteration 2"):
        taken.take(2)


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_what_is_generated_ahead_is_restored_bit_for_bit(tmp_path: Path, num_chunks: int):
    written, read = rollouts(num_chunks=num_chunks), rollouts(num_chunks=num_chunks)
    written.take(0)
    assert written.ahead is not None
    written.save_checkpoint(tmp_path / "rollouts").result()
    read.load_checkpoint(tmp_path / "rollouts").result()
    assert read.ahead is not None
    assert (read.ahead.iteration, read.ahead.policy_version) == (1, 0)
    parts = [list(generating.arriving()) for generating in (written.ahead, read.ahead)]
    assert len(parts[0]) == len(parts[1]) == num_chunks
    assert all(equal(a, b) for a, b in zip(*parts, strict=True)), "the same parts, padded as they were"


def test_after_the_last_iteration_nothing_is_generated_ahead(tmp_path: Path):
    done = rollouts()
    for iteration in range(4):
        done.take(iteration)
    assert done.ahead is None
    done.save_checkpoint(tmp_path / "rollouts").result()
    extended = rollouts(SETTINGS.model_copy(update={"num_iterations": 6}))
    extended.load_checkpoint(tmp_path / "rollouts").result()
    assert extended.ahead is None
    assert (extended.take(4).policy_version, extended.take(5).policy_version) == (4, 4), "a fresh start, on policy"


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_a_resumed_run_ends_where_the_whole_run_ends(tmp_path: Path, num_chunks: int):
    options: dict[str, Any] = {"rollout": RaggedRollout, "num_chunks": num_chunks, "correction": Correction(cap=2.0)}
    options |= {"eval_prompts": prompts(5), "ptx": texts(7)}
    with open_run(tmp_path / "whole") as run:
        undisturbed = PPO(run, SETTINGS, **options)
        summary = undisturbed.trainer.run(resume=False)
    path = tmp_path / "cut"
    with open_run(path) as run:
        cut = PPO(run, SETTINGS, **options)
        healthy = cut.trainer.step

        def killed_in_the_fourth(iteration: int) -> dict[str, float]:
            if iteration == 3:
                raise KeyboardInterrupt
            return healthy(iteration)

        cut.trainer.step = killed_in_the_fourth
        with pytest.raises(KeyboardInterrupt):
            cut.trainer.run(resume=False)
    with open_run(path, resumed_step=2) as run:
        resumed = PPO(run, SETTINGS, **options)
        assert resumed.trainer.run(resume=True) == summary
    assert (resumed.policy.state, resumed.value.state) == (undisturbed.policy.state, undisturbed.value.state)
    assert metrics(path) == metrics(tmp_path / "whole")
    generated = [event[2] for event in named(resumed.events, "rollout.generate") if event[1] == "rollout"]
    assert set(generated) == {3}, "the responses of iteration 2 come from the checkpoint"
