"""What a run says before it starts about near-ties and about what is trained, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf_dist.config.hosting import TrainedModel
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.reward.build import prepare as prepare_reward
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.reward.trainer import pair_metrics
from rlhf_dist.sft.build import prepare as prepare_sft
from rlhf_dist.sft.config import SFTConfig

MARGINS = [0.1, 0.2, 0.1, 0.4, 0.3, 0.2, 2.0, 1.0, None]
"""Six near-ties below 0.5, two clear pairs, and one that states nothing."""


@pytest.fixture
def make(tiny_lm: Path, tmp_path: Path):
    def make(
        margins: list[float | None] = MARGINS, rankings: bool = False, model: Any = (), **reward: Any
    ) -> RewardConfig:
        rows: list[dict[str, Any]] = [
            {"prompt": f"say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} | ({} if m is None else {"margin": m})
            for i, m in enumerate(margins)
        ]
        if rankings:
            # Pairs: two near (0.4), one clear (0.8); and a tie that is no pair.
            rows.append({"prompt": "rank", "responses": ["a", "b", "c"], "ratings": [1.0, 0.6, 0.2]})
            rows.append({"prompt": "tied", "responses": ["a", "b", "c"], "ratings": [1.0, 0.8, 0.8]})
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        source = {"path": str(path), "kind": "preference"}
        return RewardConfig.model_validate(
            {
                "run_dir": str(tmp_path / "run"),
                "cluster": "inline",
                "model": {"model_path": str(tiny_lm), "precision": "fp32"} | dict(model),
                "data": {"train": [source], "eval": [source], "max_length_tokens": 64},
                "reward": {"batch_size": 2, "num_steps": 1} | reward,
            }
        )

    return make


def rule_of(prepared: Any) -> Any:
    return prepared.near_ties


def test_classes_are_counted_and_weights_shown(make):
    prepared = prepare_reward(make(near_ties={"below": 0.5}))
    rule, facts = rule_of(prepared), prepared.run_summary
    said = "6 of 9 near-ties (margin below 0.5; 66.7%), 3 clear, of which 1 state no margin"
    assert facts["training pairs"] == said
    assert facts["held-out pairs"] == said
    # 3 clear pairs and 6 near-ties: f = 1/2, and 9 / (3 + 6/2) = 1.5 for all.
    assert (rule.near_weight, rule.clear_weight) == (0.75, 1.5)
    assert facts["near-ties"] == "weigh 0.75 each and clear pairs 1.5: in total 4.5 against 4.5"
    assert len(prepared.data.train) == 9


def test_pairs_of_rankings_count_by_their_prompts_weight(make):
    prepared = prepare_reward(make([2.0], rankings=True, near_ties={"below": 0.5}))
    rule = rule_of(prepared)
    assert prepared.run_summary["training pairs"].startswith("4 of 6 near-ties")
    near, clear = 2 / 3 + 1, 1 + 1 / 3
    assert rule.near_weight * near == pytest.approx(rule.clear_weight * clear)
    assert rule.near_weight * near + rule.clear_weight * clear == pytest.approx(3)


def test_dropping_leaves_prompts_out_that_have_no_other_pair(make):
    prepared = prepare_reward(make(rankings=True, near_ties={"below": 0.5, "treat": "drop"}))
    assert prepared.run_summary["near-ties"] == "left out, and with them 7 training records that have no other pair"
    train = prepared.data.train
    assert len(train) == len(train.lengths) == 4
    batch = train.batch(torch.arange(4))
    assert batch.ratings[:, 0].tolist() == [2.0, 1.0, 0.0, 1.0]
    assert batch.rated.tolist() == [True, True, False, True]
    assert len(prepared.data.eval) == 11, "evaluation keeps them"


@pytest.mark.parametrize(
    ("margins", "settings", "message"),
    [
        ([None, None], {"below": 0.5}, "no record of data.train states a margin"),
        ([0.1, 0.2], {"below": 0.5}, "all 2 pairs of data.train have a margin below reward.near_ties.below 0.5"),
        ([0.1, 0.2], {"below": 0.5, "treat": "drop"}, "none is left to train on"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(make, margins, settings, message: str):
    with pytest.raises(ConfigError, match=message):
        prepare_reward(make(margins, near_ties=settings))


def test_soft_labels_and_margins_contradict(make):
    with pytest.raises(ValidationError, match=r"margin_coef is 1\.0 and near_ties.treat is soft_labels"):
        make(margin_coef=1.0, near_ties={"below": 0.5, "treat": "soft_labels"})


def test_accuracy_is_reported_for_both_classes(make):
    """Near-ties: right, wrong, equal, right, right, wrong; clear: right, wrong, right."""
    data = prepare_reward(make(near_ties={"below": 0.5, "treat": "keep"})).data.eval
    differences = torch.tensor([1.0, -1, 0, 2, 1, -1, 1, -1, 1])
    scores = lambda batch: torch.stack([differences, torch.zeros(9)], dim=1)  # noqa: E731
    found = pair_metrics(scores, data, near_ties_below=0.5)
    assert found["reward_model/eval_near_tie_accuracy"] == pytest.approx(3.5 / 6)
    assert found["reward_model/eval_clear_accuracy"] == pytest.approx(2 / 3)
    assert found["reward_model/eval_accuracy"] == pytest.approx(5.5 / 9)
    assert "reward_model/eval_clear_accuracy" not in pair_metrics(scores, data)


def test_what_is_trained_is_said_in_counts(make):
    facts = prepare_reward(make(model={"lora": {"rank": 2}})).run_summary
    assert facts["model: trained parameters"] == "3,776 of 84,736 (4.46%): adapters 3,712 in 28, head 64 in 1 tensors"
    assert facts["model: frozen parameters"].endswith(
        ": embeddings 19,200 in 1, layers 61,696 in 18, rest 64 in 1 tensors"
    )
    assert "model: trained parameters" not in prepare_reward(make()).run_summary


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"freeze": {"num_layers": 9}}, "freeze.num_layers is 9 but the model has 2 layers"),
        ({"lora": {"target_modules": ["nothing"]}}, "names 'nothing', which no layer"),
    ],
)
def test_what_the_model_does_not_have_is_refused_before_a_process_starts(tiny_lm: Path, tmp_path: Path, model, message):
    (tmp_path / "a.jsonl").write_text('{"text": "good and bad"}\n' * 4, encoding="utf-8")
    config = SFTConfig.model_validate(
        {
            "run_dir": "r",
            "model": {"model_path": str(tiny_lm)} | model,
            "data": {"train": [{"path": str(tmp_path / "a.jsonl"), "kind": "text"}], "max_length_tokens": 64},
            "sft": {"batch_size": 2},
        }
    )
    with pytest.raises(ConfigError, match=message):
        prepare_sft(config)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"freeze": {"all_but_head": True, "embeddings": True}}, "all_but_head is true and embeddings is true"),
        ({"freeze": {"all_but_head": True, "num_layers": 2}}, "all_but_head is true and num_layers is 2"),
        ({"freeze": {"num_layers": 1}, "lora": {}}, "lora is set, which freezes all .* remove one of the two"),
        ({"lora": {"rank": 0}}, "greater than or equal to 1"),
        ({"lora": {"dropout": 1.0}}, "less than 1"),
        ({"lora": {"target_modules": []}}, "must name at least one layer"),
        ({"lora": {"target_modules": [" "]}}, "must name at least one layer"),
        ({"lora": {"target_modules": "all_linear"}}, "all-linear"),
    ],
)
def test_contradictions_of_what_is_trained(model, message: str):
    with pytest.raises(ValidationError, match=message):
        TrainedModel.model_validate({"model_path": "m"} | model)


def test_an_average_of_adapters_is_refused():
    config = {
        "run_dir": "r",
        "policy": {"model_path": "p", "lora": {}},
        "reward": {"model_path": "r"},
        "data": {"prompts": [{"path": "a", "kind": "prompt"}]},
        "ppo": {"ema_decay": 0.9},
    }
    with pytest.raises(ValidationError, match=r"ema_decay is 0\.9 and policy.lora is set"):
        PPOConfig.model_validate(config)
