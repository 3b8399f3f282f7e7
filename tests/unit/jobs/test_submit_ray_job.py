"""What a job on a Ray cluster is called with."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.core.errors import ConfigError, SubmissionError
from rlhf_dist.jobs.ray_client import JobClient
from rlhf_dist.jobs.ray_job import job_arguments
from rlhf_dist.pipeline.arguments import load

SFT = "run_dir: runs/a\nmodel: {model_path: m}\ndata: {train: [{path: x.jsonl, kind: text}]}\n"
HARMLESS = [
    "TOKENIZERS_PARALLELISM",
    "HF_TOKEN_PATH",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AWS_SHARED_CREDENTIALS_FILE",
    "KEYBOARD",
    "MAX_TOKENS",
]
EVAL = "run_dir: runs/a\npolicy: {model_path: m}\ndata: {instructions: [{path: x.jsonl, kind: text}]}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft.yaml").write_text(SFT)
    (tmp_path / "eval.yaml").write_text(EVAL)
    return tmp_path


def arguments_of(command: str, *given: str, working_dir: Path = Path()) -> list[str]:
    return job_arguments(load(command, "test", list(given)), given, working_dir)


def test_it_joins_the_cluster_writes_where_it_was_told_to_and_goes_on(project: Path):
    added = ["--ray.address", "auto", "--run_dir", str(project / "runs" / "a"), "--resume", "auto"]
    assert arguments_of("sft", "sft.yaml", "--seed", "3") == ["sft.yaml", "--seed", "3", *added]


@pytest.mark.parametrize("given", [["--run_dir", "out/b"], ["--run_dir=out/b"]])
def test_a_relative_run_dir_is_meant_from_here(project: Path, given: list[str]):
    arguments = arguments_of("sft", "sft.yaml", *given, "--seed", "3")
    assert [a for a in arguments if "out/b" in a] == [str(project / "out" / "b")]
    assert arguments[:3] == ["sft.yaml", "--seed", "3"]


def test_what_the_user_says_stands(project: Path):
    assert arguments_of("sft", "sft.yaml", "--resume", "no").count("--resume") == 1
    assert "--resume" not in arguments_of("sft", "sft.yaml", "--overwrite", "true")
    assert arguments_of("sft", "sft.yaml", "--ray.address=h:1").count("--ray.address") == 0


@pytest.mark.parametrize("resume", ["no", "auto"])
def test_what_the_file_says_of_resuming_stands(project: Path, resume: str):
    (project / "sft.yaml").write_text(f"{SFT}resume: '{resume}'\n")
    assert "--resume" not in arguments_of("sft", "sft.yaml")


def test_an_evaluation_is_always_run_whole(project: Path):
    assert "--resume" not in arguments_of("eval", "eval.yaml")


def test_the_configuration_must_travel_with_the_job(project: Path):
    (project / "jobs").mkdir()
    with pytest.raises(ConfigError, match=r"sft.yaml is not below --working-dir .*jobs"):
        arguments_of("sft", "sft.yaml", working_dir=Path("jobs"))
    assert arguments_of("sft", str(project / "sft.yaml"))[0] == "sft.yaml"


def test_overrides_alone_are_no_configuration(project: Path):
    given = ["--run_dir", "r", "--model.model_path", "m", "--data.train", "[{path: x.jsonl, kind: text}]"]
    with pytest.raises(ConfigError, match="needs a configuration file"):
        arguments_of("sft", *given)


def test_inline_has_nothing_to_do_on_a_cluster(project: Path):
    with pytest.raises(ConfigError, match="cluster is inline"):
        arguments_of("sft", "sft.yaml", "--cluster", "inline")


def test_dry_run_shows_the_job_and_reaches_for_nothing(project: Path, capsys: pytest.CaptureFixture[str]):
    line = [
        "submit",
        "--ray",
        "http://nowhere.invalid:1",
        "--dry-run",
        "--pip",
        "einops",
        "--env",
        "A=b",
        "sft",
        "sft.yaml",
    ]
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "entrypoint: python -m rlhf_dist.cli.main sft sft.yaml --ray.address auto" in shown
    assert f"working_dir: {project}" in shown
    assert "einops" in shown
    assert "A: b" in shown
    assert "'*.safetensors'" in shown


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "auto", ""])
@pytest.mark.parametrize("dry", [True, False])
def test_an_address_that_is_no_dashboards_is_rejected_at_once(
    project: Path, address: str, dry: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("rlhf_dist.jobs.ray_client.JobClient", lambda *_: pytest.fail("Ray was asked"))
    assert main(["submit", "--ray", address, *(["--dry-run"] if dry else []), "sft", "sft.yaml"]) == 2
    shown = capsys.readouterr()
    assert f"is {address!r}, but must be its dashboard's, with http:// or https://" in shown.err
    assert not shown.out


def test_a_variable_needs_a_value(project: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["submit", "--ray", "http://h:1", "--dry-run", "--env", "A", "sft", "sft.yaml"]) == 2
    assert "--env A: a variable is written NAME=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "OPENAI_APIKEY",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "DB_PASSWD",
        "SITE_CREDENTIALS",
        "my_token",
    ],
)
def test_a_secret_does_not_go_with_the_job(project: Path, name: str, capsys: pytest.CaptureFixture[str]):
    """Ray keeps the job's environment where others read it: its API and, on every node, its logs."""
    assert main(["submit", "--ray", "http://h:1", "--dry-run", "--env", f"{name}=s3cr3t", "sft", "sft.yaml"]) == 2
    shown = capsys.readouterr()
    assert f"--env {name}: " in shown.err
    assert "environment that Ray is started in on the nodes" in shown.err
    assert "s3cr3t" not in shown.err + shown.out


@pytest.mark.parametrize("name", HARMLESS)
def test_not_every_name_with_such_a_word_is_a_secret(project: Path, name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["submit", "--ray", "http://h:1", "--dry-run", "--env", f"{name}=b", "sft", "sft.yaml"]) == 0
    assert f"{name}: b" in capsys.readouterr().out


def test_nor_in_the_configurations_variables(project: Path, capsys: pytest.CaptureFixture[str]):
    """They would be stored in plain text in config.yaml as well."""
    (project / "sft.yaml").write_text(f"{SFT}ray: {{env_vars: {{HF_TOKEN: s3cr3t, A: b}}}}\n")
    assert main(["sft", "sft.yaml"]) == 2
    shown = capsys.readouterr()
    assert "line 4: ray: env_vars sets HF_TOKEN, by the name a secret" in shown.err
    assert "name it in pass_env" in shown.err
    assert "s3cr3t" not in shown.err + shown.out
    (project / "sft.yaml").write_text(f"{SFT}ray: {{env_vars: {{{', '.join(f'{name}: b' for name in HARMLESS)}}}}}\n")
    assert set(load("sft", "test", ["sft.yaml"]).ray.env_vars) == set(HARMLESS)


def test_a_dead_proxy_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(SubmissionError, match="http_proxy"):
        JobClient("http://head.test:8265")
