"""A response depends on the weights, the seed and its sample, not on where or beside which others it is generated."""

from __future__ import annotations

import functools

import layouts
import pytest
import reference_loop as plain
import torch
from layouts import BASE, TEMPERATURE
from objectives import Trainings, language_model
from support.bench import Layout
from support.tiny import prompt_batch

from rlhf_dist.core.batches import FINISHED, TRUNCATED, RolloutBatch
from rlhf_dist.distributed.rollout_engines import RolloutRole

PROMPTS = prompt_batch([4, 2, 6, 3, 1, 9, 5, 2, 7, 3, 4] * 3, seed=80)
LAYOUTS = [
    *[(Layout(ranks=ranks), size) for ranks in (1, 2, 3) for size in (1, 4, 64)],
    (Layout(ranks=1, cluster="inline"), 4),
]


@functools.cache
def generated(trainings: Trainings, ranks: int, cluster: str, batch_size: int, num: int = len(PROMPTS)) -> RolloutBatch:
    """Responses to the first `num` prompts."""
    layout = Layout(ranks=ranks, cluster=cluster)
    config = layouts.ppo_config(trainings.models, layout, rollout_batch_size=batch_size)
    with trainings.bench.hosted(layouts.ppo_spec(config, "rollout"), layout) as group:
        role = RolloutRole(group, config.rollout.batch_size)
        return role.generate(PROMPTS.rows(range(num)), stream="rollout", iteration=5).result()


@pytest.mark.parametrize(("layout", "size"), LAYOUTS, ids=lambda value: str(value))
def test_the_same_tokens_on_any_ranks_and_in_any_batch(trainings: Trainings, layout: Layout, size: int):
    expected = generated(trainings, BASE.ranks, "ray", 8)
    actual = generated(trainings, layout.ranks, layout.cluster, size)
    assert set(expected.finish_reasons.tolist()) == {FINISHED, TRUNCATED}  # some rows leave the batch early
    for name in ("tokens", "prompt_lengths", "response_lengths", "finish_reasons"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert torch.allclose(actual.rollout_logprobs, expected.rollout_logprobs, atol=1e-4)


def test_fewer_prompts_than_ranks(trainings: Trainings):
    """A rank without prompts; the tokens of the others stay."""
    expected = generated(trainings, 2, "ray", 8).rows([0, 1])
    actual = generated(trainings, 3, "ray", 4, num=2)
    assert torch.equal(actual.tokens, expected.tokens)


def test_rollout_logprobs_are_those_of_the_reference_loop(trainings: Trainings):
    """At the temperature they were sampled at: the "old" of the first update's ratio."""
    rollout = generated(trainings, 2, "ray", 8)
    with torch.no_grad():
        expected, _ = plain.response_logprobs(language_model(trainings.models.policy), rollout, TEMPERATURE)
    for row, logprobs in zip(rollout.rollout_logprobs, expected, strict=True):
        assert torch.allclose(row[: len(logprobs)], logprobs, atol=1e-4)
