"""What a reward model is worth: by hand on a set of a few pairs, and a baseline that learns what words tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.cli.reward_report import report_trained
from rlhf_dist.config import RewardData
from rlhf_dist.data.datasets import PreferenceDataset, load_preferences
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.errors import ModelError
from rlhf_dist.models.score_moments import FILE, ScoreMoments, read_score_moments
from rlhf_dist.tracking.plots import plot_reward_model
from rlhf_dist.trainers.reward_evaluation import evaluate, score_dataset


def dataset(tiny_lm: Path, folder: Path, sets: dict[str, list[dict[str, Any]]], limit: int = 64) -> PreferenceDataset:
    sources: list[Any] = []
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append({"path": str(folder / f"{name}.jsonl"), "kind": "preference"})
    data = RewardData(train=sources, max_length_tokens=limit)
    return load_preferences(data, load_tokenizer(str(tiny_lm)), 0).train


SETS = {
    "a": [
        {"prompt": "p", "chosen": "long and good", "rejected": "bad"},
        {"prompt": "q", "chosen": "good", "rejected": "long and bad"},
    ],
    "b": [{"prompt": "r", "responses": ["best of", "middle", "worst one"]}],
}


def test_numbers_by_hand(tiny_lm: Path, tmp_path: Path) -> None:
    found = dataset(tiny_lm, tmp_path, SETS)
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [3.0, 1.0, 2.0]])
    report = evaluate(score_dataset(lambda rows: scores[rows][:, : 3 if 2 in rows else 2], found, chunk=2))
    # Δ: 1 | −1 | 2, 1, −1 at a third each.
    assert report["num_pairs"] == 5
    assert report["accuracy"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert report["by_source"] == {
        "a": {"accuracy": 0.5, "num_pairs": 2},
        "b": {"accuracy": pytest.approx(2 / 3), "num_pairs": 3},
    }
    assert report["margin"] == pytest.approx((1 - 1 + 2 / 3) / 3)
    assert report["truncated"] == {"accuracy": None, "num_pairs": 0}
    every = [2.0, 1.0, 0.0, 1.0, 3.0, 1.0, 2.0]
    mean = sum(every) / 7
    assert report["scores"]["mean"] == pytest.approx(mean)
    assert report["scores"]["std"] == pytest.approx((sum((s - mean) ** 2 for s in every) / 7) ** 0.5)
    assert report["scores"]["better_mean"] == pytest.approx((2 + 0 + 3 + 1) / 4)
    assert report["scores"]["worse_mean"] == pytest.approx((1 + 1 + 1 + 2) / 4)
    assert sum(report["histogram"]["better"]) == sum(report["histogram"]["worse"]) == 4
    assert report["length"]["accuracy_where_better_is_longer"] is not None
    json.dumps(report, allow_nan=False)


def test_lengths_are_of_the_response_and_cut_ones_are_told_apart(tiny_lm: Path, tmp_path: Path) -> None:
    found = dataset(tiny_lm, tmp_path, SETS)
    lengths, batch = found.response_tokens([0, 1, 2]), found.batch([0, 1, 2])
    prompts = (batch.lengths - lengths)[batch.present].tolist()
    assert [prompts[0], prompts[2], prompts[4]] == [prompts[1], prompts[3], prompts[5]]
    assert lengths[0, 0] > lengths[0, 1]
    assert lengths[1, 0] < lengths[1, 1]
    assert not found.was_cut([0, 1, 2]).any()
    limit = int(batch.lengths[0, 0]) - 1
    shorter = dataset(tiny_lm, tmp_path, {"a": SETS["a"][:1]}, limit)
    assert shorter.was_cut([0]).tolist() == [[True, False]]
    assert shorter.response_tokens([0])[0, 0] == lengths[0, 0] - 1
    report = evaluate(score_dataset(lambda rows: torch.tensor([[1.0, 0.0]]), shorter, 8))
    assert report["truncated"] == {"accuracy": 1.0, "num_pairs": 1}


def test_a_baseline_of_words_learns_what_words_tell(tiny_lm: Path, tmp_path: Path) -> None:
    words = {True: ("lovely", "moving", "fresh", "warm"), False: ("dull", "stale", "cold", "flat")}
    rows = [
        {"prompt": f"p{n}", "chosen": f"a {words[True][n % 4]} film", "rejected": f"a {words[False][n // 4 % 4]} film"}
        for n in range(80)
    ]
    tokenizer: Any = load_tokenizer(str(tiny_lm))
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source: Any = {"path": str(tmp_path / "all.jsonl"), "kind": "preference"}
    data = load_preferences(RewardData(train=(source,), eval_fraction=0.25), tokenizer, 0)
    summary, moments = report_trained(
        tmp_path / "run",
        data,
        lambda found, rows: torch.zeros(found.batch(rows).lengths.shape),
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    )
    assert summary["evaluation"]["accuracy"] == 0.5
    assert summary["baseline"]["accuracy"] == 1.0
    assert (moments.mean, moments.std, moments.records) == (0.0, 0.0, "held-out")
    written = {path.name for path in (tmp_path / "run" / "eval").iterdir()}
    assert written == {f"{name}.{end}" for name in ("reward_model", "bag_of_words") for end in ("json", "png")}


def test_without_held_out_records_the_moments_are_of_the_training_set(tiny_lm: Path, tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(str(tiny_lm))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SETS["a"]))
    source: Any = {"path": str(tmp_path / "a.jsonl"), "kind": "preference"}
    data = load_preferences(RewardData(train=(source,)), tokenizer, 0)
    summary, moments = report_trained(tmp_path, data, lambda found, rows: torch.tensor([[3.0, 1.0], [2.0, 2.0]]), None)
    assert (summary, moments) == ({}, ScoreMoments(2.0, 0.5**0.5, 4, "training"))
    (tmp_path / FILE).write_text(moments.to_json())
    assert read_score_moments(str(tmp_path)) == moments


@pytest.mark.parametrize("content", [None, "{", "{}", '{"mean": 0, "std": 0, "num_responses": 1, "records": "x"}'])
def test_moments_that_cannot_be_used_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(ModelError, match="normalise_scores"):
        read_score_moments(str(tmp_path))


def test_the_picture_is_drawn(tmp_path: Path, tiny_lm: Path) -> None:
    found = dataset(tiny_lm, tmp_path, SETS)
    report = evaluate(score_dataset(lambda rows: torch.arange(9.0).reshape(3, 3)[rows][:, :3], found, chunk=8))
    plot_reward_model(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
