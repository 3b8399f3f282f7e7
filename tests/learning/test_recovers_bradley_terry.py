"""A reward model recovers the scale of the preferences it is trained on, not only their order.

Items have true scores s. A judge prefers by s plus Gumbel noise, so that P(i over j) = σ(s_i − s_j), in pairs (Bradley and
Terry 1952) and within longer rankings (Plackett 1975). Then the mean of −log σ(r_i − r_j) is smallest where r_i − r_j =
s_i − s_j: a difference that is halved or counted twice in the loss, or pairs of a ranking that weigh by their place in it,
would move the slope away from 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import hosted, random_rows, trained

from rlhf_dist.core.batches import PreferenceBatch
from rlhf_dist.core.random import uniforms
from rlhf_dist.data.sampler import EpochSampler
from rlhf_dist.reward.roles import PreferenceModelRole
from rlhf_dist.reward.worker import PreferenceModelWorker

TRUE_SCORES = torch.linspace(-1.75, 1.75, 8, dtype=torch.float64)
ITEMS = random_rows([3, 5, 4, 2, 5, 3, 4, 2], seed=4)
BATCH_SIZE, NUM_STEPS = 150, 160


def sampled_rankings(num: int, num_responses: int) -> list[list[int]]:
    """Items drawn without replacement, the judge's favorite first."""
    draws = uniforms(0, "judge", 0, range(num), 2 * len(ITEMS))
    shown = draws[:, : len(ITEMS)].argsort(1)[:, :num_responses]
    liking = TRUE_SCORES - (-draws[:, len(ITEMS) :].log()).log()  # plus standard Gumbel noise
    return [items[liking[row, items].argsort(descending=True)].tolist() for row, items in enumerate(shown)]


@pytest.mark.slow
@pytest.mark.parametrize(("num_records", "num_responses"), [(6000, 2), (1500, 4)])
def test_scores_recover_a_known_scale(tiny_lm: Path, num_records: int, num_responses: int):
    rankings = sampled_rankings(num_records, num_responses)
    sampler = EpochSampler(num_records, 0, "order")
    optimizer = {"learning_rate": 2e-3, "weight_decay": 0.0}
    config = trained(tiny_lm, optimizer=optimizer, micro_batch_size=BATCH_SIZE)
    with hosted(PreferenceModelWorker, config=config, num_steps=NUM_STEPS) as group:
        role = PreferenceModelRole(group, BATCH_SIZE)
        for step in range(NUM_STEPS):
            rows = sampler.indices(step * BATCH_SIZE, BATCH_SIZE).tolist()
            role.update(PreferenceBatch.of([[ITEMS[i] for i in rankings[row]] for row in rows]), step).result()
        found = role.score_pairs(PreferenceBatch.of([ITEMS])).result()[0].double()
    slope, _ = np.polyfit(TRUE_SCORES.numpy(), found.numpy(), 1)
    correlation = np.corrcoef(TRUE_SCORES.numpy(), found.numpy())[0, 1]
    distance = ((found - found.mean()) - (TRUE_SCORES - TRUE_SCORES.mean())).abs().max()
    print(
        f"{num_records} rankings of {num_responses}: slope {slope:.4f} (1 is exact), correlation {correlation:.5f}, "
        f"largest distance of a score {distance:.3f} of a range of {TRUE_SCORES.max() - TRUE_SCORES.min():.1f}"
    )
    assert slope == pytest.approx(1, abs=0.1)
    assert correlation > 0.99
