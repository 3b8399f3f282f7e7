"""One configuration from human ratings to a reward model: templates, pairs with margins, SFT, reward model, and a baseline on
the same split. With the tiny model and a few steps; the recipe's real run is in tests/bench/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from support.tiny import save_tiny_lm

from rlhf_dist.cli.main import main
from rlhf_dist.models.score_moments import read_score_moments

pytestmark = [pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]


def test_ratings_become_instructions_and_pairs_and_the_reward_model_is_held_against_a_bag_of_words(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = yaml.safe_load((ROOT / "launch" / "recipes" / "movie_preferences.yaml").read_text(encoding="utf-8"))
    recipe["data"]["sets"][0]["sources"][0]["limit"] = 1500
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(recipe))
    tiny = save_tiny_lm(tmp_path / "base", max_position_embeddings=1024)  # has about a token a letter
    overrides = [
        "--run_dir",
        tmp_path / "run",
        "--cluster",
        "inline",
        "--device",
        "cpu",
        "--sft.model.model_path",
        tiny,
    ]
    for stage in ("sft", "reward"):
        overrides += [f"--{stage}.model.precision", "fp32", f"--{stage}.data.max_length_tokens", "1024"]
        overrides += [f"--{stage}.{stage}.batch_size", "8", f"--{stage}.{stage}.num_steps", "3"]
    assert main(["pipeline", str(config), *map(str, overrides)]) == 0
    printed = capsys.readouterr().out
    assert "reward_model" in printed
    assert "bag_of_words" in printed
    [folder] = (tmp_path / "run").glob("03_reward-*")
    summary = json.loads((folder / "summary.json").read_text())
    model, baseline = summary["evaluation"], summary["baseline"]
    assert model["num_pairs"] == baseline["num_pairs"] > 60
    assert summary["after"]["eval_accuracy"] == pytest.approx(model["accuracy"])
    assert summary["after"]["eval_loss"] == pytest.approx(model["loss"], rel=1e-5)
    # Words tell sentiment: far above chance even on a few hundred pairs. Three steps of a random model need not be.
    assert baseline["accuracy"] > 0.55
    written = {path.name for path in (folder / "eval").iterdir()}
    assert written == {"reward_model.json", "reward_model.png", "bag_of_words.json", "bag_of_words.png"}
    saved = read_score_moments(str(folder / "model"))
    report = json.loads((folder / "eval" / "reward_model.json").read_text())
    assert (saved.mean, saved.std, saved.records) == (report["scores"]["mean"], report["scores"]["std"], "held-out")
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["key"]
    assert main(["pipeline", str(config), *map(str, overrides)]) == 0
    assert "skipped, done before" in capsys.readouterr().out
