from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from rlhf_dist import __version__
from rlhf_dist.cli.main import OTHER_COMMANDS, main
from rlhf_dist.core.errors import ConfigError, DataError, PlacementError, WorkerError
from rlhf_dist.pipeline import commands
from rlhf_dist.pipeline.arguments import CONFIG_COMMANDS
from rlhf_dist.pipeline.commands import Command

SFT = "run_dir: r\nmodel: {model_path: m}\ndata: {train: [{path: a, kind: text}]}\n"
HEAVY = ["torch", "ray", "transformers", "deepspeed", "datasets", "wandb", "numpy"]


@pytest.fixture
def sft(tmp_path: Path) -> str:
    path = tmp_path / "sft.yaml"
    path.write_text(SFT, encoding="utf-8")
    return str(path)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """In place of pipeline/commands.py: records what it is called with; `fail` is raised when set."""
    recorder = types.SimpleNamespace(calls=[], fail=None)

    def recording(name: str):
        def call(config: object) -> dict[str, object]:
            recorder.calls.append((name, config))
            if recorder.fail is not None:
                raise recorder.fail
            return {"steps": 3}

        return call

    runs = {name: Command(recording(f"prepare_{name}"), recording(f"run_{name}")) for name in commands.COMMANDS}
    monkeypatch.setattr(commands, "COMMANDS", runs)
    monkeypatch.setattr(commands, "validate", lambda command, config: recording("validate")(config))
    return recorder


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["ppo", "--help"], ["quickstart", "--help"], ["chat", "-h"], ["schema", "ppo"]],
)
def test_answers_without_heavy_imports(arguments: list[str]):
    code = (
        "import sys; from rlhf_dist.cli.main import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as e: code = e.code\n"
        f"print('HEAVY', [m for m in {HEAVY} if m in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY [] 0"
    assert len(done.stdout.splitlines()) > 1


def test_rejections_answer_without_heavy_imports(sft: str):
    code = (
        "import sys; from rlhf_dist.cli.main import main\n"
        f"print(main(sys.argv[1:]), [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "sft", sft, "--sft.batch_siz=3"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 []\n"
    assert "did you mean --sft.batch_size?" in done.stderr


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in [*CONFIG_COMMANDS, *OTHER_COMMANDS])
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", ["sft"])
def test_a_command_runs_its_function_with_the_checked_configuration(
    command: str, sft: str, recorded: types.SimpleNamespace
):
    assert main([command, sft, "--sft.batch_size", "5"]) == 0
    [(name, config)] = recorded.calls
    assert name == f"run_{command}"
    assert config.sft.batch_size == 5


@pytest.mark.parametrize(
    "error", [DataError("a.jsonl, line 3"), PlacementError("no GPU"), WorkerError("policy rank 1")]
)
def test_errors_are_one_paragraph_and_the_exit_code_of_their_class(
    error: DataError, sft: str, recorded: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
):
    recorded.fail = error
    assert main(["sft", sft]) == type(error).exit_code
    captured = capsys.readouterr()
    assert captured.err == f"error: {error}\n"
    assert captured.out == ""


def test_interrupt(sft: str, recorded: types.SimpleNamespace):
    recorded.fail = KeyboardInterrupt()
    assert main(["sft", sft]) == 130


def test_other_errors_keep_their_traceback(sft: str, recorded: types.SimpleNamespace):
    recorded.fail = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        main(["sft", sft])


def test_validate_prints_what_was_found(sft: str, recorded: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]):
    assert main(["validate", "sft", sft]) == 0
    assert recorded.calls[0][0] == "validate"
    out = capsys.readouterr().out
    assert "can be run" in out
    assert "steps" in out


def test_schema_is_json(capsys: pytest.CaptureFixture[str]):
    assert main(["schema", "reward"]) == 0
    assert "model" in json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pppo"], "did you mean ppo?"),
        (["zzzzz"], "the commands are"),
        (["ppo"], "needs a configuration file"),
        (["validate", "pppo", "x"], "invalid choice: 'pppo'"),
        (["validate"], "required: COMMAND"),
        (["schema", "ppo", "x"], "'x' is one argument too many"),
        (["quickstart", "--model", "huge"], "invalid choice: 'huge'"),
        (["chat"], "required: MODEL_DIR"),
        (["ppo", "none.yaml"], "none.yaml does not exist"),
    ],
)
def test_wrong_arguments_are_configuration_errors(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == ConfigError.exit_code
    assert expected in capsys.readouterr().err


def test_quickstart_flags(monkeypatch: pytest.MonkeyPatch):
    calls: list[dict[str, object]] = []
    monkeypatch.setattr("rlhf_dist.quickstart.run.run", lambda **options: calls.append(options))
    assert main(["quickstart"]) == 0
    assert main(["quickstart", "--run-dir", "x", "--seed", "3", "--cluster", "inline", "--overwrite"]) == 0
    default = {"run_dir": Path("runs/quickstart"), "model": "tiny", "seed": 0, "cluster": "ray", "overwrite": False}
    assert calls == [
        default,
        {"run_dir": Path("x"), "model": "tiny", "seed": 3, "cluster": "inline", "overwrite": True},
    ]


def test_eval_shows_its_result(
    monkeypatch: pytest.MonkeyPatch, recorded: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
):
    summary = {"policy": {"eval_loss": 1.25, "perplexity": 3.4903}, "reward": {"accuracy": 0.875}, "seed": 0}
    monkeypatch.setitem(commands.COMMANDS, "eval", Command(lambda config: None, lambda config: summary))
    monkeypatch.setattr("rlhf_dist.cli.main.load", lambda *_: object())
    assert main(["eval", "unused.yaml"]) == 0
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    for row in (["policy", "eval_loss", "1.25"], ["policy", "perplexity", "3.49"], ["reward", "accuracy", "0.875"]):
        assert row in cells
