"""Low-margin pairs: which they are, what they weigh, and the loss, by hand; and what a run says and rejects."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.core.batches import PreferenceBatch
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.core.rankings import ranked_pairs
from rlhf_dist.reward.build import prepare
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.reward.losses import ranking_loss
from rlhf_dist.reward.low_margin import LowMargin
from rlhf_dist.reward.trainer import pair_metrics

BATCH = PreferenceBatch.of(
    [[[1], [2]], [[1], [2], [3]], [[1], [2]]],
    ranks=[[0, 1], [0, 1, 2], [0, 1]],
    ratings=[[2.0, 0.0], [4.1, 3.6, 3.5], [0.0, 0.0]],
    rated=[True, True, False],
)
SCORES = torch.tensor([[1.0, 0.5, 9.0], [0.2, 0.7, -0.4], [0.3, 0.1, 9.0]])


def loss(rule: LowMargin, scores: torch.Tensor = SCORES) -> torch.Tensor:
    better, worse, _ = ranked_pairs(BATCH.present, BATCH.ranks)
    weights = rule(BATCH, better, worse)
    return ranking_loss(scores, BATCH.present, ranks=BATCH.ranks, pair_weights=weights)[0]


def nll(difference: float) -> float:
    return math.log1p(math.exp(-difference))


def test_a_margin_at_the_threshold_is_not_low_and_none_is_not():
    """4.1 − 3.6 is 0.49999976 in fp32; the third record states nothing, though its ratings are equal."""
    better, worse, weights = ranked_pairs(BATCH.present, BATCH.ranks)
    low = LowMargin(0.5, 0.0).classes(BATCH, better, worse)["low_margin"]
    assert (low & (weights > 0)).tolist() == [[False, False, False], [False, False, True], [False, False, False]]


def test_weight_1_changes_nothing():
    plain, _ = ranking_loss(SCORES, BATCH.present, ranks=BATCH.ranks)
    assert torch.equal(loss(LowMargin(0.5, 1.0)), plain)


def test_dropped_pairs_hand_their_weight_to_the_prompts_others():
    found = loss(LowMargin(0.5, 0.0)).item()
    assert found == pytest.approx(nll(0.5) + (nll(-0.5) + nll(0.6)) / 2 + nll(0.2))


def test_a_prompt_of_low_margin_pairs_only_has_no_loss_and_no_gradient():
    scores = SCORES.clone().requires_grad_()
    value = loss(LowMargin(9.0, 0.0), scores)
    value.backward()
    assert value.item() == pytest.approx(nll(0.2))
    assert scores.grad is not None
    assert not scores.grad[:2].any()


def test_down_weighted_by_hand():
    second = (nll(-0.5) + nll(0.6) + 0.25 * nll(1.1)) / 3
    assert loss(LowMargin(0.5, 0.25)).item() == pytest.approx(nll(0.5) + second + nll(0.2))


MARGINS = [0.1, 0.2, 0.1, 0.4, 0.3, 0.2, 2.0, 1.0, None]
"""Six below 0.5, two above, and one that states nothing."""


@pytest.fixture
def make(tiny_lm: Path, tmp_path: Path):
    def make(margins: list[float | None] = MARGINS, rankings: bool = False, **reward: Any) -> RewardConfig:
        rows: list[dict[str, Any]] = [
            {"prompt": f"say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} | ({} if m is None else {"margin": m})
            for i, m in enumerate(margins)
        ]
        if rankings:
            # Pairs: two low (0.4), one of 0.8; and a tie that is no pair.
            rows.append({"prompt": "rank", "responses": ["a", "b", "c"], "ratings": [1.0, 0.6, 0.2]})
            rows.append({"prompt": "tied", "responses": ["a", "b", "c"], "ratings": [1.0, 0.8, 0.8]})
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        source = {"path": str(path), "kind": "preference"}
        return RewardConfig.model_validate(
            {
                "run_dir": str(tmp_path / "run"),
                "cluster": "inline",
                "model": {"model_path": str(tiny_lm), "precision": "fp32"},
                "data": {"train": [source], "eval": [source], "max_length_tokens": 64},
                "reward": {"batch_size": 2, "num_steps": 1} | reward,
            }
        )

    return make


def test_classes_are_counted_in_the_run_summary(make):
    prepared = prepare(make(low_margin={"below": 0.5}))
    counted = "6 of 9 low-margin pairs (margin below 0.5; 66.7%), 3 others, of which 1 state no margin"
    assert prepared.run_summary["training pairs"] == counted
    assert prepared.run_summary["held-out pairs"] == counted
    assert "0.25" in prepared.run_summary["low-margin pairs"]
    assert len(prepared.data.train) == 9


def test_dropping_removes_prompts_that_have_no_other_pair(make):
    prepared = prepare(make(rankings=True, low_margin={"below": 0.5, "weight": 0}))
    assert "7 training records" in prepared.run_summary["low-margin pairs"]
    train = prepared.data.train
    assert len(train) == len(train.lengths) == 4
    batch = train.batch(torch.arange(4))
    assert batch.ratings[:, 0].tolist() == [2.0, 1.0, 0.0, 1.0]
    assert batch.rated.tolist() == [True, True, False, True]
    assert len(prepared.data.eval) == 11, "evaluation keeps them"


@pytest.mark.parametrize(
    ("margins", "settings", "key"),
    [
        ([None, None], {"below": 0.5}, "reward.low_margin is set"),
        ([0.1, 0.2], {"below": 0.5, "weight": 0}, r"all 2 pairs .* reward.low_margin.below 0\.5"),
    ],
)
def test_nothing_to_tell_apart_or_to_train_on_is_invalid(make, margins, settings, key: str):
    with pytest.raises(ConfigError, match=key):
        prepare(make(margins, low_margin=settings))


def test_accuracy_is_reported_for_both_classes(make):
    """Low-margin pairs: right, wrong, equal, right, right, wrong; others: right, wrong, right."""
    prepared = prepare(make(low_margin={"below": 0.5, "weight": 1}))
    differences = torch.tensor([1.0, -1, 0, 2, 1, -1, 1, -1, 1])
    scores = lambda batch: torch.stack([differences, torch.zeros(9)], dim=1)  # noqa: E731
    assert prepared.low_margin is not None
    found = pair_metrics(scores, prepared.data.eval, prepared.low_margin.classes)
    assert found["reward_model/eval_low_margin_accuracy"] == pytest.approx(3.5 / 6)
    assert found["reward_model/eval_other_accuracy"] == pytest.approx(2 / 3)
    assert found["reward_model/eval_accuracy"] == pytest.approx(5.5 / 9)
    assert "reward_model/eval_other_accuracy" not in pair_metrics(scores, prepared.data.eval)
