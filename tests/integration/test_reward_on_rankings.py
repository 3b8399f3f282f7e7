"""`rlhf-dist reward` on ranked records: from the file to the saved model, and what is rejected before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import metrics, weights

from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.evaluation.build import prepare as prepare_eval
from rlhf_dist.evaluation.config import EvalConfig
from rlhf_dist.reward.build import prepare as prepare_reward
from rlhf_dist.reward.build import run_reward
from rlhf_dist.reward.config import RewardConfig

Make = Callable[..., dict[str, Any]]
WORDS = ["calm", "kind", "cool", "lime", "mild", "warm", "dear", "fond", "glad", "neat", "wise", "bold"]
ROWS = [
    {
        "prompt": f"say {word}",
        "responses": [f"good {word}", f"fair {word} {word}", f"bad {word}", "bad"][: 2 + i % 3],
        "ratings": [3, 1.5, 1.5, -2][: 2 + i % 3],
    }
    for i, word in enumerate(WORDS * 2)
] + [{"prompt": "say so", "chosen": "good so", "rejected": "bad so", "margin": 1}]


@pytest.fixture
def reward_run(make_config: Make, tmp_path: Path) -> Callable[..., Path]:
    """Runs in this process on `rows` and gives the run's folder."""

    def run(name: str, rows: list[dict[str, Any]] = ROWS, model: dict[str, Any] | None = None, **settings: Any) -> Path:
        path = tmp_path / "rankings.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        config = make_config("reward", tmp_path / name, zero_stage=0, cluster="inline")
        config["data"]["train"] = [{"path": str(path), "kind": "preference"}]
        config["reward"] |= {"num_steps": 12} | settings
        config["model"] |= model or {}
        run_reward(RewardConfig.model_validate(config))
        return tmp_path / name

    return run


def test_a_reward_model_learns_from_rankings(reward_run: Callable[..., Path]):
    run_dir = reward_run("run")
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert summary["after"]["eval_margin"] > summary["before"]["eval_margin"] + 0.5
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]
    assert summary["after"]["eval_accuracy"] > 0.9


def test_margins_and_centering_are_in_the_loss_of_a_run(reward_run: Callable[..., Path]):
    plain, margins = reward_run("plain"), reward_run("margins", margin_coef=1.0)
    centered = reward_run("centered", centering_coef=0.5)
    first = {path.name: metrics(path)[1][1] for path in (plain, margins, centered)}
    # The same model on the same pairs: what differs is the objective.
    for name in ("margins", "centered"):
        assert first[name]["reward_model/margin"] == first["plain"]["reward_model/margin"]
        assert first[name]["reward_model/loss"] > first["plain"]["reward_model/loss"]
    found = [weights(path)["score.weight"] for path in (plain, margins, centered)]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


UNRELATED = [row | {"margin": "n/a"} if "margin" in row else row for row in ROWS] + [
    {
        "prompt": f"say {word}",
        "chosen": f"good {word}",
        "rejected": "bad",
        "margin": -1,
        "responses": ["x"],
        "ratings": 7,
    }
    for word in WORDS
]
"""With columns that mean something else, beside pairs."""


def reward_config(make_config: Make, tmp_path: Path, rows: list[dict[str, Any]], **data: Any) -> RewardConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = make_config("reward", tmp_path / "run", zero_stage=0, cluster="inline")
    config["data"] |= {"train": [{"path": str(path), "kind": "preference"}]} | data
    return RewardConfig.model_validate(config)


def test_margins_that_the_loss_does_not_use_are_not_checked(make_config: Make, tmp_path: Path):
    config = reward_config(make_config, tmp_path, UNRELATED)
    assert len(prepare_reward(config).data.train) > 0
    used = config.model_copy(update={"reward": config.reward.model_copy(update={"margin_coef": 0.5})})
    with pytest.raises(DataError, match=r"rows\.jsonl:25: field 'margin' is 'n/a', which is not a finite number"):
        prepare_reward(used)


def test_an_evaluation_does_not_check_margins(make_config: Make, tmp_path: Path, tiny_rm: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, UNRELATED)), encoding="utf-8")
    config = EvalConfig.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "device": "cpu",
            "reward": {"model_path": str(tiny_rm), "precision": "fp32"},
            "data": {"preferences": [{"path": str(path), "kind": "preference"}], "max_length_tokens": 64},
        }
    )
    assert prepare_eval(config).run_summary["preferences"] == len(UNRELATED)


def test_the_facts_count_responses_that_were_skipped(make_config: Make, tmp_path: Path):
    rows = [*ROWS, {"prompt": "p", "responses": ["good", "good", "bad", "good"]}]
    prepared = prepare_reward(reward_config(make_config, tmp_path, rows, eval_fraction=0))
    found = prepared.run_summary["training records: responses dropped from rankings"]
    assert found.startswith("2 (")
    assert "rows.jsonl:26" in found
    assert "training records: skipped" not in prepared.run_summary


@pytest.mark.parametrize(
    ("rows", "changes", "error", "words"),
    [
        (
            [{key: value for key, value in row.items() if key not in ("ratings", "margin")} for row in ROWS],
            {"margin_coef": 0.5},
            ConfigError,
            r"reward\.margin_coef is 0\.5 but no record of data\.train has a margin above 0; set it to 0, or give",
        ),
        (
            ROWS,
            {"model": {"micro_batch_tokens": 200}},
            ConfigError,
            r"micro_batch_tokens is 200 but 4 sequences .* may take 256 tokens .*raise the first to at least 256",
        ),
        (
            [*ROWS, {"prompt": "p", "responses": ["a", "b"], "ratings": [1, 2]}],
            {},
            DataError,
            r"rankings\.jsonl:26: field 'ratings\[0\]' is 1, less than the 2 of the next response",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_rejected_first(
    reward_run: Callable[..., Path], rows: Any, changes: dict[str, Any], error: type, words: str, tmp_path: Path
):
    with pytest.raises(error, match=words):
        reward_run("run", rows, **changes)
    assert not (tmp_path / "run").exists()
