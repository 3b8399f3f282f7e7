"""The parameters after several optimizer steps are those of a plain PyTorch loop, whatever the layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from deviations import MAX_LARGEST, MAX_RELATIVE, Table, deviation
from layouts import BASE, MAX_GRAD_NORM, MAX_LENGTH, NUM_STEPS, RM_MAX_LENGTH
from objectives import EXTENDED_POLICY, OBJECTIVES, POLICY, RM, SFT, VALUE, Outcome, Trainings
from support.bench import Layout

Ranks = pytest.mark.parametrize("ranks", [1, 2, 3])
Objectives = pytest.mark.parametrize("objective", OBJECTIVES)


def compare(trainings: Trainings, table: Table, objective: str, layout: Layout, varied: str) -> Outcome:
    """Train in `layout` and hold the weights, and what the update reports, against the reference loop's."""
    outcome, expected = trainings.train(objective, layout), trainings.reference(objective)
    measured = deviation(outcome.weights, expected.weights, expected.start)
    print(f"{objective}, {layout}: {measured}")
    table.add(varied, objective, (layout.ranks, layout.zero_stage), NUM_STEPS, measured, f"{MAX_RELATIVE:.0e}")
    assert measured.relative <= MAX_RELATIVE, layout
    assert measured.largest <= MAX_LARGEST, layout
    for name, value in outcome.metrics.items():
        assert value == pytest.approx(expected.metrics[name], rel=1e-4, abs=1e-5), (name, layout)
    return outcome


@Objectives
def test_the_reference_loop_meets_every_case(trainings: Trainings, objective: str):
    """Clipping of gradients, ratios and values takes part, and not everywhere: else a layout could get it wrong unseen."""
    reference = trainings.reference(objective)
    seen, norms = reference.trace.seen, torch.tensor(reference.trace.seen["grad_norm"])
    clipped = norms > MAX_GRAD_NORM[objective]
    assert clipped.any()
    assert not clipped.all()
    moved = [(reference.weights[name] - start).norm() / start.norm() for name, start in reference.start.items()]
    assert min(moved) > 1e-4
    if objective in (POLICY, EXTENDED_POLICY):
        assert 0.05 < reference.metrics["clip_fraction"] < 0.5
    if objective == EXTENDED_POLICY:
        assert sum(seen["num_bounded"]) > 0
    if objective == VALUE:
        assert 0.05 < reference.metrics["outside_range"] < 0.9


@Objectives
@Ranks
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stages_and_ranks(trainings: Trainings, table: Table, objective: str, stage: int, ranks: int):
    """Three ranks share steps of 5, 2, 7 and 4 rows: uneven shares, and a rank with nothing to do."""
    layout = replace(BASE, ranks=ranks, zero_stage=stage)
    compare(trainings, table, objective, layout, f"ZeRO {stage}, number of ranks")


@Objectives
@pytest.mark.parametrize("size", [1, 8])
def test_micro_batch_sizes(trainings: Trainings, table: Table, objective: str, size: int):
    """Up to seven accumulated backward passes a step, or one; the base case has two."""
    compare(trainings, table, objective, replace(BASE, micro_batch_size=size), "micro-batches of 1 and 8 rows")


@Objectives
@pytest.mark.parametrize(("ranks", "stage"), [(2, 3), (3, 2)])
def test_token_budgets(trainings: Trainings, table: Table, objective: str, ranks: int, stage: int):
    """Micro-batches of as many rows as the tokens allow: not the same number on every rank."""
    layout = replace(BASE, ranks=ranks, zero_stage=stage, hosting=budget(objective))
    outcome = compare(trainings, table, objective, layout, "token budget")
    if ranks == 2:
        check_splits(outcome)


@Objectives
@pytest.mark.parametrize(("ranks", "stage", "budgeted"), [(1, 0, False), (2, 2, True), (3, 3, False)])
def test_packed_forward_passes(
    trainings: Trainings, table: Table, objective: str, ranks: int, stage: int, budgeted: bool
):
    """Sequences end to end in one row, without padding; micro-batches by rows and by tokens."""
    hosting = {"packed": True} | (budget(objective) if budgeted else {})
    layout = replace(BASE, ranks=ranks, zero_stage=stage, micro_batch_size=3, hosting=hosting)
    outcome = compare(trainings, table, objective, layout, "packed, not padded")
    if budgeted:
        check_splits(outcome)


@Objectives
@pytest.mark.parametrize("stage", [2, 3])
def test_inline_and_ray_agree_in_every_bit(trainings: Trainings, table: Table, objective: str, stage: int):
    """One rank in this process and one in an actor run the same instructions."""
    layout = replace(BASE, ranks=1, zero_stage=stage)
    inline = compare(trainings, table, objective, replace(layout, cluster="inline"), "inline")
    hosted = trainings.train(objective, layout)
    assert inline.metrics == hosted.metrics
    for name, weights in inline.weights.items():
        assert torch.equal(weights, hosted.weights[name]), name
    measured = deviation(hosted.weights, inline.weights, trainings.reference(objective).start)
    table.add("Ray against inline", objective, (1, stage), NUM_STEPS, measured, "0")


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 2), (3, 1), (3, 3)])
def test_a_reward_model_gets_the_same_new_head(trainings: Trainings, stage: int, ranks: int):
    """A reward model that starts from a language model draws its head from the seed, before any layout matters."""
    models = replace(trainings.models, reward=trainings.models.policy)
    from_language_model = Trainings(trainings.bench, models)
    expected = from_language_model.train(RM, replace(BASE, ranks=1, cluster="inline")).weights
    actual = from_language_model.train(RM, replace(BASE, ranks=ranks, zero_stage=stage)).weights
    assert actual.keys() == expected.keys()
    assert all(torch.allclose(actual[name], expected[name], rtol=0, atol=MAX_LARGEST) for name in expected)


TIED_OBJECTIVES = (SFT, POLICY)


@pytest.mark.parametrize("objective", TIED_OBJECTIVES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_tied_embeddings_and_gradient_checkpointing(
    tied_trainings: Trainings, table: Table, objective: str, stage: int
):
    """A matrix that is used twice, in passes that run twice."""
    layout = replace(BASE, zero_stage=stage, training={"gradient_checkpointing": True})
    compare(tied_trainings, table, objective, layout, "tied embeddings, gradient checkpointing")


def check_splits(outcome: Outcome) -> None:
    """Of each loss term, some step has several micro-batches, and some fill up differently on different ranks."""
    assert len(outcome.shares) in (NUM_STEPS, 2 * NUM_STEPS)
    for first in range(0, len(outcome.shares), NUM_STEPS):
        sizes = [[[len(rows) for rows in rank] for rank in step] for step in outcome.shares[first : first + NUM_STEPS]]
        assert any(len(ranks[0]) > 1 for ranks in sizes)
        assert any(ranks[0] != ranks[1] and len(ranks[0]) > 1 for ranks in sizes)


def budget(objective: str) -> dict[str, int]:
    """No more than the longest row of a forward pass may need: a pair of responses in reward modeling."""
    return {"micro_batch_tokens": 2 * RM_MAX_LENGTH if objective == RM else MAX_LENGTH}
