"""What all ranks must do together, on several of them: average the weights, reject a step, end an update."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import layouts
import pytest
import reference_loop as plain
import torch
from deviations import MAX_LARGEST, MAX_RELATIVE, Deviation, Table, Weights, deviation
from layouts import BASE, NUM_STEPS, PTX, STEPS
from objectives import POLICY, Trainings, role_of, splits_of
from support.bench import Layout, read_weights, saved_weights
from torch import Tensor

from rlhf_dist.core.batches import Experience
from rlhf_dist.core.errors import SampleError
from rlhf_dist.core.steps import EARLY_STOP_KL, NON_FINITE_GRADIENT, NON_FINITE_LOSS
from rlhf_dist.ppo.roles import PolicyRole

DECAY = 0.7
BAD_ROW, BAD_STEP = 5, STEPS[2]
FP32 = [replace(BASE, ranks=ranks, zero_stage=stage) for ranks in (2, 3) for stage in range(4)]
BF16 = [replace(BASE, ranks=2, zero_stage=stage, hosting={"precision": "bf16"}) for stage in (1, 2, 3)]
Fp32Layouts = pytest.mark.parametrize("layout", FP32, ids=str)
AllLayouts = pytest.mark.parametrize("layout", FP32 + BF16, ids=str)


@contextmanager
def policy_role(trainings: Trainings, layout: Layout, **ppo: Any) -> Iterator[PolicyRole]:
    """A policy; `ppo`: settings."""
    config = layouts.ppo_config(trainings.models, layout, **ppo)
    with trainings.bench.hosted(layouts.ppo_spec(config, "policy"), layout) as group:
        yield role_of(PolicyRole, group, config.policy)


@dataclass(frozen=True)
class State:
    """Of a policy on all its ranks."""

    weights: Weights
    average: Weights
    logprobs: list[Tensor]
    """What each rank's copy of the weights says of the same responses."""

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, State)
        return all(
            torch.equal(a, b)
            for mine, others in ((self.weights, other.weights), (self.average, other.average))
            for a, b in zip(mine.values(), others.values(), strict=True)
        ) and all(torch.equal(a, b) for a, b in zip(self.logprobs, other.logprobs, strict=True))


def state_of(role: PolicyRole) -> State:
    rollout = layouts.rollout()
    said = role.group.call("logprobs", rollout, [list(range(5)), list(range(5, 10))]).result()
    assert all(torch.equal(logprobs, said[0]) for logprobs in said)
    with tempfile.TemporaryDirectory() as folder:
        role.save(Path(folder)).result()
        return State(read_weights(Path(folder) / "model"), read_weights(Path(folder) / "model_ema"), said)


def four_steps(role: PolicyRole, experience: Experience) -> list[Weights]:
    """The weights after each."""
    after = []
    for rows, texts in zip(STEPS, PTX, strict=True):
        role.update(experience, [rows], [texts]).result()
        after.append(saved_weights(role))
    return after


@pytest.fixture(scope="module")
def healthy(trainings: Trainings) -> Any:
    """Layout → (start, weights after each step, state at the end) of a policy in it."""
    known: dict[str, tuple[Weights, list[Weights], State]] = {}

    def in_layout(layout: Layout) -> tuple[Weights, list[Weights], State]:
        if str(layout) not in known:
            with policy_role(trainings, layout, self_checks=False, ema_decay=DECAY) as role:
                start = saved_weights(role)
                known[str(layout)] = (start, four_steps(role, trainings.experience), state_of(role))
        return known[str(layout)]

    return in_layout


@Fp32Layouts
def test_the_moving_average_is_that_of_the_reference_loop(
    trainings: Trainings, healthy: Any, table: Table, layout: Layout
):
    expected = trainings.reference(POLICY)
    average = plain.moving_average(expected.start, expected.steps, DECAY)
    measured = deviation(healthy(layout)[2].average, average, expected.start)
    publish(table, "moving average of the weights", layout, measured)
    current = deviation(healthy(layout)[2].average, expected.weights, expected.start)
    assert current.relative > 0.1, "the average is not the weights after the last step"


@pytest.mark.parametrize("layout", BF16, ids=str)
def test_the_moving_average_in_bf16_is_kept_in_fp32(healthy: Any, layout: Layout):
    """Of the weights that the model computes with. What is saved is rounded once, at the end."""
    start, steps, state = healthy(layout)
    average = plain.moving_average(start, steps, DECAY)
    for name, saved in state.average.items():
        assert saved.dtype == torch.bfloat16
        assert torch.allclose(saved.double(), average[name], rtol=2**-8, atol=0), name
    same = [state.average[name] == expected.bfloat16() for name, expected in average.items()]
    assert float(torch.cat([s.flatten() for s in same]).double().mean()) > 0.99


def broken_loss(experience: Experience) -> Experience:
    """A NaN in the only place that a loss can see of one row."""
    old = experience.old_logprobs.clone()
    old[BAD_ROW, 1] = torch.nan
    return replace(experience, old_logprobs=old)


def broken_gradient(experience: Experience) -> Experience:
    """A loss of about e⁸⁸, which fp32 still holds, whose gradient it does not."""
    old, advantages = experience.old_logprobs.clone(), experience.advantages.clone()
    old[BAD_ROW, 1] -= 88
    advantages[BAD_ROW, 1] = -1
    return replace(experience, old_logprobs=old, advantages=advantages)


@AllLayouts
def test_one_row_that_is_not_finite_stops_all_ranks_and_leaves_no_trace(
    trainings: Trainings, healthy: Any, layout: Layout
):
    experience = trainings.experience
    assert BAD_ROW in BAD_STEP.tolist()
    with policy_role(trainings, layout, self_checks=False, ema_decay=DECAY) as role:
        for number, (rows, texts) in enumerate(zip(STEPS, PTX, strict=True)):
            if number in (1, 3):
                broken, reason = [(broken_loss, NON_FINITE_LOSS), (broken_gradient, NON_FINITE_GRADIENT)][number == 3]
                before = state_of(role)
                with pytest.raises(SampleError, match=reason) as caught:
                    role.update(broken(experience), [BAD_STEP], [PTX[2]]).result()
                assert (caught.value.rows, caught.value.step) == ({"ppo": [BAD_ROW]}, 0)
                assert state_of(role) == before
            role.update(experience, [rows], [texts]).result()
        assert state_of(role) == healthy(layout)[2]


@Fp32Layouts
def test_a_policy_that_moves_too_far_stops_on_every_rank(trainings: Trainings, table: Table, layout: Layout):
    """On the KL of all ranks' tokens, not of a rank's own."""
    expected = trainings.reference(POLICY)
    reached = expected.trace.seen["approx_kl"]
    stop = 2
    limit = 0.95 * reached[stop]
    assert max(reached[:stop]) < limit < reached[stop]
    with policy_role(trainings, layout, early_stop_kl=limit) as role:
        replies = watched_replies(role)
        shares = splits_of(role)
        report = role.update(trainings.experience, STEPS, PTX).result()
        weights = saved_weights(role)
    ranks = replies[0].result()
    assert [[step.aborted for step in rank] for rank in ranks] == [["", "", EARLY_STOP_KL]] * layout.ranks
    alone = [kl_alone(trainings.experience, rank[stop], shares[stop][r]) for r, rank in enumerate(ranks)]
    assert min(alone) < limit < max(alone), "ranks that decide alone disagree here"
    assert report.num_steps == stop
    assert report.metrics["policy/early_stop_kl"] == pytest.approx(reached[stop], rel=1e-3)
    measured = deviation(weights, expected.steps[stop - 1], expected.start)
    publish(table, "update ended by early_stop_kl", layout, measured, stop)


def watched_replies(role: PolicyRole) -> list[Any]:
    """Fills up with the futures of what the ranks answer."""
    replies, scatter = [], role.group.scatter

    def watched(method: str, args_per_rank: Any) -> Any:
        replies.append(scatter(method, args_per_rank))
        return replies[-1]

    role.group.scatter = watched
    return replies


def kl_alone(experience: Experience, step: Any, share: list[list[int]]) -> float:
    """The mean over a rank's own tokens of a step."""
    rows = STEPS[2][torch.tensor([row for micro in share for row in micro])]
    return step.sums["ppo"]["approx_kl"] / int(experience.response_lengths[rows].sum())


def publish(table: Table, varied: str, layout: Layout, measured: Deviation, steps: int = NUM_STEPS) -> None:
    print(f"{varied}, {layout}: {measured}")
    table.add(varied, POLICY, (layout.ranks, layout.zero_stage), steps, measured, f"{MAX_RELATIVE:.0e}")
    assert measured.relative <= MAX_RELATIVE, layout
    assert measured.largest <= MAX_LARGEST, layout
