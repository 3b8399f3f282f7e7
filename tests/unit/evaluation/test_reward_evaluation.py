"""What a reward model is worth: by hand on a set of a few pairs, and a baseline that learns what words tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.config.data import RewardData
from rlhf_dist.core.errors import ConfigError, ModelError
from rlhf_dist.data.datasets import PreferenceDataset, Split
from rlhf_dist.data.loading import load_preferences
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.evaluation.bag_of_words import BagOfWords
from rlhf_dist.evaluation.plots import plot_reward_model
from rlhf_dist.evaluation.reward_model import evaluate, score_dataset
from rlhf_dist.evaluation.reward_report import report_trained, score_moments_of
from rlhf_dist.models.score_moments import FILE, read_score_moments
from rlhf_dist.reward.low_margin import LowMargin


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


def split(tiny_lm: Path, folder: Path, rows: list[dict[str, Any]], **keys: Any) -> Split[PreferenceDataset]:
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source: Any = {"path": str(folder / "all.jsonl"), "kind": "preference"}
    return load_preferences(RewardData(train=(source,), **keys), load_tokenizer(str(tiny_lm)), 0)


def decode(tiny_lm: Path) -> Any:
    tokenizer: Any = load_tokenizer(str(tiny_lm))
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def zeros(found: PreferenceDataset, rows: torch.Tensor) -> torch.Tensor:
    return torch.zeros(found.batch(rows).lengths.shape)


WORDS = {True: ("lovely", "moving", "fresh", "warm"), False: ("dull", "stale", "cold", "flat")}
TOLD_BY_WORDS = [
    {"prompt": f"p{n}", "chosen": f"a {WORDS[True][n % 4]} film", "rejected": f"a {WORDS[False][n // 4 % 4]} film"}
    for n in range(80)
]


def test_a_baseline_of_words_learns_what_words_tell(tiny_lm: Path, tmp_path: Path) -> None:
    data = split(tiny_lm, tmp_path, TOLD_BY_WORDS, eval_fraction=0.25)
    assert data.eval is not None
    baseline = BagOfWords(data.train, decode(tiny_lm))
    summary = report_trained(tmp_path / "run", data.eval, zeros, baseline)
    assert summary["evaluation"]["accuracy"] == 0.5
    assert summary["baseline"]["accuracy"] == 1.0
    written = {path.name for path in (tmp_path / "run" / "eval").iterdir()}
    assert written == {f"{name}.{end}" for name in ("reward_model", "bag_of_words") for end in ("json", "png")}


def test_the_baseline_weighs_pairs_as_the_reward_model_does(tiny_lm: Path, tmp_path: Path) -> None:
    """Three quarters of the pairs have a low margin and say the contrary: what they weigh decides what is learnt."""
    told = [row | {"margin": 3.0} for row in TOLD_BY_WORDS[:20]]
    contrary = [
        {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"], "margin": 0.1}
        for row in TOLD_BY_WORDS[20:]
    ]
    train = split(tiny_lm, tmp_path, told + contrary).train
    truth = split(tiny_lm, tmp_path, TOLD_BY_WORDS).train
    accuracy = {}
    for name, rule in (
        ("equal", LowMargin(1.0, 1.0)),
        ("less", LowMargin(1.0, 0.01)),
        ("dropped", LowMargin(1.0, 0.0)),
    ):
        baseline = BagOfWords(train, decode(tiny_lm), rule)
        accuracy[name] = evaluate(score_dataset(lambda rows, b=baseline: b.score(truth, rows), truth, 64))["accuracy"]
    assert accuracy["equal"] < 0.1
    assert accuracy["less"] > 0.9
    assert accuracy["dropped"] > 0.9


def test_a_baseline_without_a_shared_word_is_rejected_before_training(tiny_lm: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "calm", "rejected": "kind"}]
    with pytest.raises(ConfigError, match="no word that two training responses share"):
        BagOfWords(split(tiny_lm, tmp_path, rows).train, decode(tiny_lm))


def test_moments_are_of_the_held_out_set_or_else_of_training_records(tiny_lm: Path, tmp_path: Path) -> None:
    def lengths(found: PreferenceDataset, rows: torch.Tensor) -> torch.Tensor:
        return found.batch(rows).lengths.float()

    held = split(tiny_lm, tmp_path, TOLD_BY_WORDS, eval_fraction=0.25)
    assert held.eval is not None
    whole = held.eval.batch(range(len(held.eval))).lengths.double()
    found = score_moments_of(held, lengths, 0)
    assert (found.num_responses, found.records) == (40, "held-out")
    assert found.mean == pytest.approx(float(whole.mean()))
    assert found.std == pytest.approx(float(whole.std(correction=0)))
    none = split(tiny_lm, tmp_path, TOLD_BY_WORDS)
    moments = score_moments_of(none, lengths, 0)
    assert (moments.num_responses, moments.records) == (160, "training")
    (tmp_path / FILE).write_text(moments.to_json())
    assert read_score_moments(str(tmp_path)) == moments


@pytest.mark.parametrize("content", [None, "{", "{}", '{"mean": 0, "std": 0, "num_responses": 1, "records": "x"}'])
def test_moments_that_cannot_be_used_are_rejected(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(ModelError, match="normalize_scores"):
        read_score_moments(str(tmp_path))


def test_the_picture_is_drawn(tmp_path: Path, tiny_lm: Path) -> None:
    found = dataset(tiny_lm, tmp_path, SETS)
    report = evaluate(score_dataset(lambda rows: torch.arange(9.0).reshape(3, 3)[rows][:, :3], found, chunk=8))
    plot_reward_model(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
