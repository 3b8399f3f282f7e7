"""A whole PPO iteration, from scores to updated weights, against the reference loop's own.

What the other tests take as given is made here: rewards, advantages and their whitening over all tokens of the iteration,
whoever computed them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import layouts
import pytest
import reference_loop as plain
import torch
from deviations import MAX_LARGEST, MAX_RELATIVE, Table, deviation
from layouts import BASE, MAX_LENGTH, NUM_STEPS, PTX, SHAPING, TEMPERATURE
from objectives import Reference, Trainings, language_model, role_of, scalar_model
from support.bench import Layout
from torch import Tensor

from rlhf_dist.core.batches import FINISHED, TRUNCATED, Experience
from rlhf_dist.distributed.role_groups import ReferenceRole, RewardRole
from rlhf_dist.ppo.experience import PPOState, make_experience
from rlhf_dist.ppo.roles import PolicyRole, ValueRole
from rlhf_dist.ppo.scoring import Scored

REASONS = torch.tensor(
    [FINISHED, TRUNCATED, TRUNCATED, FINISHED, FINISHED, TRUNCATED, FINISHED, TRUNCATED, FINISHED, FINISHED]
)
ROLLOUT = replace(layouts.rollout(), finish_reasons=REASONS)
STEPS = [torch.tensor(rows) for rows in ([3, 8, 1, 0, 6], [9, 2, 5, 4, 7], [7, 0, 4, 8, 2], [1, 9, 6, 3, 5])]
"""Two epochs of two mini-batches."""
VARIED = {"micro_batch_tokens": "token budget", "packed": "packed"}
"""Key of a hosted model → its words in the table."""


def experience_of(trainings: Trainings, layout: Layout) -> tuple[Experience, dict[str, float]]:
    """Score the responses with the real models, and hand the driver what they say."""
    config = layouts.ppo_config(trainings.models, layout)

    def said(role: str, role_class: Any, model: Any, method: str, batch: Any) -> Tensor:
        with trainings.bench.hosted(layouts.ppo_spec(config, role), layout) as group:
            return getattr(role_of(role_class, group, model), method)(batch).result()

    scored = Scored(
        scores=said("reward", RewardRole, config.reward, "score", ROLLOUT.sequences),
        logprobs=said("policy", PolicyRole, config.policy, "logprobs", ROLLOUT),
        ref_logprobs=said("reference", ReferenceRole, config.reference, "logprobs", ROLLOUT),
        state_values=said("value", ValueRole, config.value, "values", ROLLOUT),
    )
    state = PPOState(config.ppo.kl_coef).with_scores(scored.scores)
    return make_experience(ROLLOUT, scored, config.ppo, state, config.rollout.max_response_tokens)


@dataclass(frozen=True)
class PlainIteration:
    """The reference loop's."""

    experience: Experience
    policy: Reference
    value: Reference


@pytest.fixture(scope="module")
def expected(trainings: Trainings) -> PlainIteration:
    """Score → rewards → advantages → whitening → update, in one process."""
    models = trainings.models
    with torch.no_grad():
        scalars = plain.scalars_at(scalar_model(models.reward), ROLLOUT.tokens, ROLLOUT.lengths)
        scores = [float(scalars[b, n - 1]) for b, n in enumerate(ROLLOUT.lengths.tolist())]
        logprobs, _ = plain.response_logprobs(language_model(models.policy), ROLLOUT, TEMPERATURE)
        ref_logprobs, _ = plain.response_logprobs(language_model(models.reference), ROLLOUT, TEMPERATURE)
        values = plain.response_values(scalar_model(models.value), ROLLOUT)
    assert max(map(abs, scores)) > SHAPING.score_clip > min(map(abs, scores))
    truncated = (REASONS == TRUNCATED).tolist()
    advantages, returns = plain.advantages_and_returns(SHAPING, truncated, scores, logprobs, ref_logprobs, values)
    experience = layouts.experience(
        ROLLOUT,
        old_logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        old_values=[row[:-1] for row in values],
        advantages=advantages,
        returns=returns,
    )
    policy = trainings.plain_policy(experience, STEPS, PTX)
    return PlainIteration(experience, policy, trainings.plain_value(experience, STEPS))


@pytest.mark.parametrize(
    "layout",
    [
        replace(BASE, ranks=1),
        BASE,
        replace(BASE, ranks=3),
        replace(BASE, ranks=3, zero_stage=3),
        replace(BASE, hosting={"packed": True, "micro_batch_tokens": MAX_LENGTH}),
        replace(BASE, zero_stage=3, hosting={"micro_batch_tokens": MAX_LENGTH}),
    ],
    ids=str,
)
def test_scores_to_weights(trainings: Trainings, table: Table, expected: PlainIteration, layout: Layout):
    experience, metrics = experience_of(trainings, layout)
    for name in ("old_logprobs", "old_values", "ref_logprobs", "advantages", "returns"):
        actual, wanted = getattr(experience, name), getattr(expected.experience, name)
        assert actual.shape == wanted.shape
        assert torch.allclose(actual, wanted, atol=1e-4), name
    log_ratio = expected.experience.old_logprobs - expected.experience.ref_logprobs
    assert metrics["kl/ref_mean"] == pytest.approx(float(log_ratio.sum(1).mean()), abs=1e-3)
    policy = trainings.update_policy(layout, experience, STEPS, PTX)
    value = trainings.update_value(layout, experience, STEPS)
    for name, actual, reference in (("policy", policy, expected.policy), ("value", value, expected.value)):
        measured = deviation(actual.weights, reference.weights, reference.start)
        print(f"{name}, {layout}: {measured}")
        where = (layout.ranks, layout.zero_stage)
        varied = [words for key, words in VARIED.items() if layout.hosting.get(key)]
        table.add(
            ", ".join(["whole iteration", *varied]), f"PPO {name}", where, NUM_STEPS, measured, f"{MAX_RELATIVE:.0e}"
        )
        assert measured.relative <= MAX_RELATIVE, name
        assert measured.largest <= MAX_LARGEST, name


def test_whitening_over_all_tokens_is_not_whitening_by_rank(expected: PlainIteration):
    """What the comparison above would miss if every share of the rows had the same mean and spread."""
    experience = expected.experience
    mask = experience.response_mask
    shares = [experience.advantages[start::2][mask[start::2]] for start in (0, 1)]
    assert all(abs(float(share.mean())) > 0.05 for share in shares)
