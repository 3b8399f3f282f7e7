"""`rlhf-dist plan` as a user calls it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from rlhf_dist.cli.main import main
from rlhf_dist.cli.plan.command import recognised
from rlhf_dist.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
RECIPE = "launch/recipes/llama_8b_ppo.yaml"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of the recipes are relative to the repository root."""
    monkeypatch.chdir(ROOT)


def test_a_run_that_fits(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", RECIPE, "--gpus", "8", "--gpu-memory", "80GB", "--format", "json", "--scale", "8,64"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["command"], data["fits"], data["cluster"]["gpu_memory_bytes"]) == ("ppo", True, 80 * 10**9)
    assert len(data["gpus"]) == 8
    assert [entry["gpus"] for entry in data["scale"]] == [8, 64]


def test_a_run_that_does_not_fit_prints_the_tables_and_what_would_help(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "ppo", RECIPE, "--gpus", "8", "--gpu-memory", "56GB", "--format", "markdown"]) == 6
    out, err = capsys.readouterr()
    assert "DOES NOT FIT" in out
    assert "**It would fit with**" in out
    assert "the run does not fit" in err
    assert "It would with: --" in err


def test_a_run_that_nothing_makes_fit_says_how_much_was_tried(capsys: pytest.CaptureFixture[str]):
    """The policy's copy in a rollout engine alone is larger than such a GPU."""
    assert main(["plan", RECIPE, "--gpus", "8", "--gpu-memory", "16GB", "--format", "json"]) == 6
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert data["sufficient_changes"] == data["placements"] == []
    number = int(re.search(r"None of the (\d+) other configurations that were planned fits", err)[1])  # pyright: ignore
    assert number > 100


def test_overrides_and_options_may_be_mixed(capsys: pytest.CaptureFixture[str]):
    arguments = [
        "--ppo.mini_batch_size",
        "128",
        "--gpus=8",
        "--policy.zero_stage=2",
        "--gpu-type",
        "h200",
        "--format",
        "json",
    ]
    assert main(["plan", RECIPE, *arguments]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["batches"][0]["sequences"] == "128"
    assert data["cluster"]["gpu"]["name"].startswith("H200")
    whole = data["roles"]["policy"]["phases"]["step"]["parameters"]["gpu"]
    assert whole == 2 * data["roles"]["policy"]["num_parameters"]


def test_a_cpu_run_is_held_against_this_machine(tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Neither weights nor tokenizer nor data are there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((tiny_lm / "config.json").read_bytes())
    config = {
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "model": {"model_path": str(tmp_path / "model"), "zero_stage": 0},
        "data": {"train": [{"path": "/nowhere.jsonl", "kind": "messages"}], "max_length_tokens": 64},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["plan", str(tmp_path / "sft.yaml")]) == 0
    out = capsys.readouterr().out
    assert "This machine" in out
    assert "fits" in out
    assert not (tmp_path / "run").exists()
    assert main(["plan", str(tmp_path / "sft.yaml"), "--cpu-memory", "1GB"]) == 6


@pytest.mark.parametrize(
    ("recipe", "command"),
    [
        ("gsm8k_sft", "sft"),
        ("movie_reward", "reward"),
        ("movie_ppo", "ppo"),
        ("llama_8b_ppo", "ppo"),
        ("llama_1b_sft", "sft"),
    ],
)
def test_the_command_is_recognised(recipe: str, command: str):
    assert recognised(Path(f"launch/recipes/{recipe}.yaml")) == command


def test_an_unknown_file_asks_for_the_command(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("seed: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="name it: rlhf-dist plan"):
        recognised(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a configuration file"),
        (["--gpus", "8"], "comes before the options"),
        ([RECIPE, "--gpus", "0"], "is not positive"),
        ([RECIPE, "--gpus", "8", "--policy.zero_stag", "3"], "zero_stag"),
        ([RECIPE, "--gpus", "8", "--gpu-memory", "much"], "--gpu-memory is 'much'"),
        ([RECIPE, "--gpus", "8", "--rates", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_are_refused_in_words(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_pipeline_is_planned_stage_by_stage(tiny_lm: Path, capsys: pytest.CaptureFixture[str]):
    """Models that are not trained yet are planned as those they start from; no data is read."""
    line = ["plan", "launch/recipes/movie_pipeline.yaml", "--sft.model.model_path", str(tiny_lm)]
    assert main([*line, "--gpus", "8", "--gpu-memory", "80GB", "--format", "json"]) == 0
    stages = json.loads(capsys.readouterr().out)
    assert list(stages) == ["sft", "reward", "ppo", "eval"]
    # PPO's roles by name, each with memory of its own.
    assert {"policy", "value", "reference", "reward", "rollout"} <= set(
        json.dumps(stages["ppo"]).replace('"', " ").split()
    )
    assert main([*line, "--gpus", "1", "--gpu-memory", "1GB"]) == 6
    captured = capsys.readouterr()
    assert "ppo: the run does not fit" in captured.err


def test_rates_that_are_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["plan", RECIPE, "--rates", str(tmp_path / "no")]) == 2
    assert "no does not exist; give a JSON file of rates" in capsys.readouterr().err
