"""`rlhf-dist plan` as a user calls it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from rlhf_dist.cli.main import main
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.planning.command import recognized

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
    # More of them would each have to hold that copy, too.
    assert "planned fits; use larger GPUs (or engine vllm, which divides a copy by tensor_parallel_size)." in err


def test_a_placement_that_is_there_already_is_called_so(capsys: pytest.CaptureFixture[str]):
    line = ["plan", RECIPE, "--gpus", "8", "--gpu-memory", "80GB", "--suggest", "--format"]
    assert main([*line, "json"]) == 0
    best = json.loads(capsys.readouterr().out)["placements"][0]["overrides"]
    assert main([*line, "markdown", *best]) == 0
    table = capsys.readouterr().out.partition("**Placements that fit on 1 × 8 GPUs**")[2]
    assert table.splitlines()[4].startswith("| as it is |")


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


def test_host_memory_is_checked_against_what_such_nodes_usually_have(capsys: pytest.CaptureFixture[str]):
    """Sixteen ranks on a node that each read 141 GB, before anything is sharded."""
    line = ["plan", "launch/recipes/llama_70b_ppo.yaml", "--gpus", "8", "--nodes", "8", "--gpu-type", "b200"]
    shared = []
    for role in ("reference", "reward"):
        shared += [f"--{role}.num_ranks", "8", f"--{role}.gpus_per_rank", "0.5"]
    assert main([*line, *shared, "--format", "markdown"]) == 6
    out, err = capsys.readouterr()
    assert "Host memory of the fullest node: 2264.9 of 2000.0 GB (assumed: 250 GB a GPU, see --cpu-memory)" in out
    assert "the ranks of a node need 2264.9 GB of its 2000.0 GB of host memory (assumed: 250 GB a GPU" in err
    assert re.search(r"It would with: --(reference|reward)\.num_ranks 4\b", err)  # fewer ranks read it fewer times
    assert main([*line, *shared, "--cpu-memory", "3TB", "--format", "markdown"]) == 0
    assert "Host memory of the fullest node: 2264.9 of 3000.0 GB.\n" in capsys.readouterr().out
    supervised = ["plan", "launch/recipes/llama_8b_sft.yaml", "--gpus", "8", "--cpu-memory", "10GB"]
    assert main([*supervised, "--gpu-memory", "80GB"]) == 6
    assert "planned fits; use nodes with more host memory." in capsys.readouterr().err
    assert main([*supervised, "--gpu-memory", "8GB"]) == 6
    assert "planned fits; use more or larger GPUs and nodes with more host memory." in capsys.readouterr().err


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
def test_the_command_is_recognized(recipe: str, command: str):
    assert recognized(Path(f"launch/recipes/{recipe}.yaml")) == command


def test_an_unknown_file_asks_for_the_command(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("seed: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="name it: rlhf-dist plan"):
        recognized(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a configuration file"),
        (["--gpus", "8"], "comes before the options"),
        ([RECIPE, "--gpus", "0"], "is not positive"),
        ([RECIPE, "--gpus", "8", "--policy.zero_stag", "3"], "zero_stag"),
        ([RECIPE, "--gpus", "8", "--gpu-memory", "much"], "--gpu-memory is 'much'"),
        ([RECIPE, "--gpus", "8", "--rates", "nowhere.json"], "nowhere.json"),
        ([RECIPE, "--gpus", "x"], "argument --gpus: 'x' is no whole number"),
        ([RECIPE, "--mean-prompt-tokens", "nan"], "argument --mean-prompt-tokens: nan is not a positive number"),
        ([RECIPE, "--mean-prompt-tokens", "-5"], "argument --mean-prompt-tokens: -5 is not a positive number"),
        ([RECIPE, "--mean-response-tokens", "0"], "argument --mean-response-tokens: 0 is not a positive number"),
        ([RECIPE, "--mean-response-tokens", "inf"], "argument --mean-response-tokens: inf is not a positive number"),
        ([RECIPE, "--mean-response-tokens", "many"], "argument --mean-response-tokens: 'many' is no number"),
        (
            [RECIPE, "--measured-on", "h100"],
            "--measured-on says where the run of --rates RUN_DIR was, and no run is given",
        ),
    ],
)
def test_mistakes_are_rejected_in_words(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
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


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"factors": 3}, "sets factors to 3; it must be an object of numbers by phase"),
        ({"factors": {"train": 2}}, "has a factor of 'train'; phases are generate, score, update, sync"),
        ({"factors": {"sync": 0}}, "sets factors.sync to 0; it must be a positive number"),
        ({"train_efficiency": True}, "sets train_efficiency to True; it must be a positive number"),
    ],
)
def test_rates_that_are_none(
    rates: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "rates.json"
    file.write_text(json.dumps(rates), encoding="utf-8")
    assert main(["plan", RECIPE, "--gpus", "8", "--rates", str(file)]) == 2
    assert message in capsys.readouterr().err


TIMES = {"generate": 30.0, "score": 7.0, "update": 60.0, "sync": 11.0}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What a run of the recipe leaves that took the same in every iteration."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_bytes((ROOT / RECIPE).read_bytes())
    metrics = {f"time/{phase}_s": seconds for phase, seconds in TIMES.items()} | {"rollout/response_length_mean": 512.0}
    lines = [json.dumps({"step": step, "metrics": metrics}) + "\n" for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def seconds_of(output: str) -> dict[str, float]:
    return {phase: sum(parts.values()) for phase, parts in json.loads(output)["timeline_s"].items()}


def test_a_run_calibrates_by_the_gpus_it_was_on(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    """The plan of the run itself, on what it was on, gives its times back; on other GPUs the same factors hold."""
    rates = ["--rates", str(run_dir), "--measured-on", "a100-80gb", "--gpus", "8", "--format", "json"]
    prompts = ["--mean-prompt-tokens", "100"]
    seconds = {}
    for gpu in ("a100-80gb", "h100"):
        assert main(["plan", RECIPE, *rates, *prompts, "--gpu-type", gpu]) == 0
        seconds[gpu] = seconds_of(capsys.readouterr().out)
    assert seconds["a100-80gb"] == pytest.approx(TIMES)
    # The datasheets' ratio of operations, but for what does not go into them.
    assert seconds["h100"]["score"] < 0.5 * seconds["a100-80gb"]["score"]


def test_a_run_calibrates_by_the_nodes_it_was_on(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    line = ["plan", RECIPE, "--rates", str(run_dir), "--gpu-type", "h100", "--format", "json"]
    assert main([*line, "--measured-on", "h100:2x4", "--gpus", "4", "--nodes", "2"]) == 0
    assert seconds_of(capsys.readouterr().out) == pytest.approx(TIMES)
    assert main([*line, "--measured-on", "h100:8x1", "--gpus", "4", "--nodes", "2"]) == 0
    assert seconds_of(capsys.readouterr().out)["update"] < TIMES["update"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "was on GPUs; say which with --measured-on TYPE"),
        (["--measured-on", "h1000"], "--measured-on is 'h1000'; choose one of"),
        (["--measured-on", "h100:8"], "--measured-on is 'h100:8'; write TYPE or TYPE:NODESxGPUS such as h100:2x8"),
        (["--measured-on", "h100:1x4"], "the roles ask for 8 GPUs and there are 4"),
        (["--measured-on", "cpu"], "says cpu and the run's device is cuda"),
    ],
)
def test_where_a_run_was_must_be_said(
    arguments: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", RECIPE, "--gpus", "8", "--rates", str(run_dir), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_pipelines_folder_is_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.yaml").write_bytes((ROOT / "launch/recipes/movie_pipeline.yaml").read_bytes())
    assert main(["plan", RECIPE, "--gpus", "8", "--rates", str(tmp_path)]) == 2
    assert "give the folder of one of its stages" in capsys.readouterr().err


def test_times_of_a_cpu_say_nothing_of_gpus(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    config = (run_dir / "config.yaml").read_text(encoding="utf-8").replace("device: cuda", "device: cpu")
    (run_dir / "config.yaml").write_text(config, encoding="utf-8")
    assert main(["plan", RECIPE, "--gpus", "8", "--rates", str(run_dir)]) == 2
    assert "was on CPUs, whose rates say nothing of GPUs" in capsys.readouterr().err
    line = ["plan", str(run_dir / "config.yaml"), "--rates", str(run_dir), "--cpu-memory", "1TB", "--format", "json"]
    assert main(line) == 0
    assert seconds_of(capsys.readouterr().out) == pytest.approx(TIMES)
