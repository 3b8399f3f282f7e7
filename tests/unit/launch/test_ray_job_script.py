"""launch/ray_job.sh: what it rejects before it submits anything, and the line that it submits."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "launch" / "ray_job.sh"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A cluster address, a token, and a `ray` command that prints what it is called with."""
    ray = tmp_path / "bin" / "ray"
    ray.parent.mkdir()
    ray.write_text('#!/usr/bin/env bash\nprintf "%s|" "$RAY_AUTH_MODE" "$@"\n')
    ray.chmod(0o755)
    return {
        "PATH": f"{ray.parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "RAY_API_SERVER_ADDRESS": "http://head:8265",
        "RAY_AUTH_TOKEN": "secret",
    }


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


CONFIG = "launch/recipes/movie_ppo.yaml"
RUN_DIR = ("--run_dir", "/shared/run")


def test_the_line_it_submits(environment: dict[str, str]):
    done = submit(environment, "ppo", CONFIG, "--ppo.kl_coef", "0.1", "--run_dir", "/shared/my run")
    assert done.returncode == 0
    expected = (
        f"token job submit --working-dir . -- rlhf-dist ppo {CONFIG} --ray.address auto --resume auto "
        "--ppo.kl_coef 0.1 --run_dir"
    )
    assert done.stdout.rstrip("|").split("|") == [*expected.split(), "/shared/my run"]


def test_the_token_may_be_in_a_file(environment: dict[str, str], tmp_path: Path):
    del environment["RAY_AUTH_TOKEN"]
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert submit(environment, "ppo", CONFIG, *RUN_DIR).returncode == 0


@pytest.mark.parametrize(
    "said",
    [
        "/shared/a",
        " /shared/a # on the file server",
        "'/shared/my run'",
        '"/shared/{seed}"',
    ],
)
def test_a_run_dir_of_the_file_may_be_absolute(environment: dict[str, str], tmp_path: Path, said: str):
    config = tmp_path / "c.yaml"
    config.write_text(f"# a run\nrun_dir: {said}\nmodel: {{run_dir: x}}\n")
    assert submit(environment, "sft", str(config)).returncode == 0
    rejected = submit(environment, "sft", str(config), "--run_dir", "runs/b")
    assert rejected.returncode == 2
    assert "run_dir is 'runs/b'" in rejected.stderr
    assert submit(environment, "sft", str(config), "--run_dir", "runs/b", "--run_dir=/c").returncode == 0


@pytest.mark.parametrize("resume", ["no", "auto"])
def test_what_the_file_says_of_resuming_stands(environment: dict[str, str], tmp_path: Path, resume: str):
    config = tmp_path / "c.yaml"
    config.write_text(f"run_dir: /r\nresume: '{resume}'\n")
    assert "--resume" not in submit(environment, "sft", str(config)).stdout


@pytest.mark.parametrize(
    ("said", "arguments", "resumed"),
    [
        ("overwrite: true  # again", (), False),
        ("overwrite: 'True'", (), False),
        ("overwrite: false", (), True),
        ("overwrite: true", ("--overwrite", "false"), True),
        ("", ("--overwrite", "true"), False),
        ("", ("--overwrite=true",), False),
    ],
)
def test_a_run_that_removes_the_old_one_is_not_told_to_continue_it(
    environment: dict[str, str], tmp_path: Path, said: str, arguments: tuple[str, ...], resumed: bool
):
    config = tmp_path / "c.yaml"
    config.write_text(f"run_dir: /r\n{said}\n")
    done = submit(environment, "sft", str(config), *arguments)
    assert done.returncode == 0, done.stderr
    assert ("--resume" in done.stdout) == resumed


@pytest.mark.parametrize(
    ("arguments", "unset", "says"),
    [
        ((), None, "usage"),
        (("quickstart", CONFIG), None, "one of sft, reward, ppo, eval, pipeline"),
        (("ppo", "no.yaml"), None, "'no.yaml' does not exist"),
        (("ppo", CONFIG), None, "run_dir is 'runs/movie_ppo', which is not absolute"),
        (("ppo", CONFIG, "--run_dir=there"), None, "run_dir is 'there', which is not absolute"),
        (("ppo", CONFIG, *RUN_DIR), "RAY_API_SERVER_ADDRESS", "RAY_API_SERVER_ADDRESS is not set"),
        (("ppo", CONFIG, *RUN_DIR), "RAY_AUTH_TOKEN", "no token"),
    ],
)
def test_what_it_rejects(environment: dict[str, str], arguments: tuple[str, ...], unset: str | None, says: str):
    if unset:
        del environment[unset]
    done = submit(environment, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert not done.stdout


def test_the_linter_has_nothing_to_say():
    linter = shutil.which("shellcheck")
    if linter is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([linter, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
