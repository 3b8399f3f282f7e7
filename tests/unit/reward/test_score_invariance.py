"""What must not change a reward model's score: the order of a pair, the side of the padding, what else is in the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import hosted, random_rows, trained
from transformers import AutoModelForSequenceClassification

from rlhf_dist.config.hosting import FrozenModel
from rlhf_dist.core.batches import PreferenceBatch, SequenceBatch, pad_rows
from rlhf_dist.distributed.partition import MicroBatching
from rlhf_dist.distributed.role_groups import RewardRole
from rlhf_dist.distributed.workers.reward import RewardWorker
from rlhf_dist.reward.losses import ranking_loss
from rlhf_dist.reward.roles import PreferenceModelRole
from rlhf_dist.reward.worker import PreferenceModelWorker

REWARD, RM = RewardWorker, PreferenceModelWorker
LENGTHS = [5, 9, 3, 12, 1, 7, 9, 4]
ROWS = random_rows(LENGTHS, seed=3)
TOLERANCE = 2e-5
"""Of scores of size 1 in fp32, where passes have other shapes: kernels then add in another order."""


def sequences(rows: list[torch.Tensor]) -> SequenceBatch:
    return SequenceBatch(pad_rows(rows), torch.tensor([len(row) for row in rows]))


@pytest.fixture(scope="module")
def score(tiny_rm: Path):
    """Rows → [rows] scores of the frozen reward model, in micro-batches of `size`."""
    with hosted(REWARD, config=FrozenModel(model_path=str(tiny_rm), precision="fp32")) as group:
        yield lambda rows, size=8, batch=None: RewardRole(group, size).score(batch or sequences(rows)).result()


def test_both_orders_of_a_pair_give_the_same_scores_bit_for_bit(tiny_rm: Path):
    """Passes of the same shapes, in which rows are in another order."""
    with hosted(RM, config=trained(tiny_rm), num_steps=1) as group:
        role = PreferenceModelRole(group, 4)
        pairs = [ROWS[i : i + 2] for i in range(0, 8, 2)]
        there = role.score_pairs(PreferenceBatch.of(pairs)).result()
        back = role.score_pairs(PreferenceBatch.of([pair[::-1] for pair in pairs])).result()
    assert torch.equal(there, back.flip(1))


def test_the_loss_of_an_exchanged_pair_is_that_of_the_negated_difference():
    scores = torch.tensor([[1.2, -0.3], [0.1, 0.4]], dtype=torch.float64)
    present = torch.ones(2, 2, dtype=torch.bool)
    there, back = (ranking_loss(s, present, centering_coef=0.1)[0] for s in (scores, scores.flip(1)))
    negated, _ = ranking_loss(-scores, present, centering_coef=0.1)
    assert back.item() == pytest.approx(negated.item())
    # log σ(d) - log σ(-d) = d
    assert (back - there).item() == pytest.approx((scores[:, 0] - scores[:, 1]).sum().item())


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(len(ROWS))))
def test_the_order_of_a_batch_changes_no_bit(score, order: list[int]):
    whole = score(ROWS)
    assert torch.equal(score([ROWS[i] for i in order]), whole[torch.tensor(order)])


@settings(max_examples=15, deadline=None)
@given(others=st.lists(st.integers(0, 7), max_size=6), size=st.integers(1, 8))
def test_what_else_is_in_the_batch_changes_a_score_by_rounding_only(score, others: list[int], size: int):
    alone = score([ROWS[1]])
    among = score([ROWS[1], *(ROWS[i] for i in others)], size)
    assert torch.allclose(among[0], alone[0], rtol=0, atol=TOLERANCE)


def test_other_rows_of_the_same_shape_change_no_bit(score):
    """Their contents cannot leak, wherever rounding would hide it."""
    replaced = [row if i == 3 else (row - 2 + 50) % 200 + 2 for i, row in enumerate(ROWS)]
    assert torch.equal(score(replaced)[3], score(ROWS)[3])


def test_what_stands_in_the_padding_changes_no_bit(score):
    batch = sequences(ROWS)
    padding = torch.arange(batch.tokens.shape[1])[None] >= batch.lengths[:, None]
    dirty = replace(batch, tokens=torch.where(padding, 77, batch.tokens))
    assert not torch.equal(dirty.tokens, batch.tokens)
    assert torch.equal(score([], batch=dirty), score([], batch=batch))


def test_more_padding_changes_a_score_by_rounding_only(score, tiny_rm: Path):
    batch = sequences(ROWS)
    wider = replace(batch, tokens=torch.nn.functional.pad(batch.tokens, (0, 20)))
    assert torch.allclose(score([], batch=wider), score([], batch=batch), rtol=0, atol=TOLERANCE)


def test_padding_on_the_left_gives_the_same_scores_in_transformers(score, tiny_rm: Path):
    """Batches here are padded on the right; whoever pads the saved model's inputs on the left, with positions from the mask,
    gets the scores that it was trained to."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_rm, dtype=torch.float32)
    width = max(LENGTHS)
    pad = model.config.pad_token_id
    left = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=pad) for row in ROWS])
    mask = torch.stack([torch.arange(width) >= width - n for n in LENGTHS]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(input_ids=left, attention_mask=mask, position_ids=positions).logits[:, 0]
    assert torch.allclose(found, score(ROWS), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", [0, 3])
def test_packing_and_token_budgets_change_a_score_by_rounding_only(tiny_rm: Path, score, stage: int):
    config = FrozenModel(model_path=str(tiny_rm), precision="fp32", packed=True, zero_stage=stage)
    with hosted(REWARD, config=config) as group:
        packed = RewardRole(group, MicroBatching(size=1, tokens=16, packed=True)).score(sequences(ROWS)).result()
    assert torch.allclose(packed, score(ROWS), rtol=0, atol=TOLERANCE)
