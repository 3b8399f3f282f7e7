"""`rlhf-dist submit --ray` and launch/ray_job.sh against a real cluster that asks for a token."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pty
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file
from support.ray_cluster import Cluster, authenticated_cluster
from support.runs import write_config

pytestmark = [pytest.mark.timeout(600)]
Make = Callable[..., dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head of its own."""
    with tempfile.TemporaryDirectory(prefix="rj", dir="/tmp") as folder, authenticated_cluster(Path(folder)) as head:
        yield head


@pytest.fixture
def project(make_config: Make, tmp_path: Path) -> Path:
    """A folder as a user has it: a configuration, a file that no job needs, and an earlier run's weights."""
    folder = tmp_path / "project"
    (folder / "runs" / "old").mkdir(parents=True)
    (folder / "runs" / "old" / "model.safetensors").write_bytes(b"0" * 10_000_000)
    (folder / "notes.txt").write_text("n")
    config = make_config("sft", Path("runs/sft"), ranks=2)
    write_config(folder / "sft.yaml", config)
    return folder


def submit(cluster: Cluster, project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`rlhf-dist submit --ray ...` in the project."""
    return subprocess.run(
        [sys.executable, "-m", "rlhf_dist.cli.main", "submit", "--ray", cluster.dashboard, *arguments],
        cwd=project,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_job_runs_where_the_cluster_is_and_its_results_stay_here(cluster: Cluster, project: Path) -> None:
    done = submit(cluster, project, "sft", "sft.yaml", "--sft.num_steps", "3", "--checkpoint.every_steps", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"step 3/3 ", done.stdout)
    assert re.search(r"follow: ray job logs -f raysubmit_\w+\n  stop:   ray job stop raysubmit_", done.stdout)
    # The relative run_dir is meant from here, not from the copy that the job starts in.
    weights = load_file(project / "runs" / "sft" / "model" / "model.safetensors")
    assert weights
    logs = (project / "runs" / "sft" / "logs").glob("model_*.log")
    assert {path.name for path in logs} == {"model_0.log", "model_1.log"}

    # Submitted again, it finds itself done: --resume auto is the default, and nothing is trained twice.
    again = submit(cluster, project, "sft", "sft.yaml", "--sft.num_steps", "3", "--checkpoint.every_steps", "1")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "step 3/3 " not in again.stdout


def test_a_rejected_run_passes_its_exit_code_and_reason_on(cluster: Cluster, project: Path) -> None:
    done = submit(cluster, project, "sft", "sft.yaml", "--data.train", "[{path: nosuch.jsonl, kind: text}]")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "nosuch.jsonl" in done.stdout
    assert re.search(r"Job raysubmit_\w+ FAILED", done.stderr)
    assert "Traceback" not in done.stdout + done.stderr


def test_a_wrong_configuration_never_reaches_the_cluster(cluster: Cluster, project: Path) -> None:
    done = submit(cluster, project, "sft", "sft.yaml", "--sft.num_step", "3")
    assert done.returncode == 2
    assert "did you mean --sft.num_steps" in done.stderr
    assert "Job" not in done.stdout


def test_without_the_token_the_remedy_is_named(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in cluster.environment.items() if name != "RAY_AUTH_TOKEN_PATH"}
    stranger = Cluster(cluster.dashboard, environment | {"HOME": str(tmp_path)}, cluster.pid)
    done = submit(stranger, project, "sft", "sft.yaml")
    assert done.returncode == 9
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://nosuch.invalid:8265"])
def test_where_nothing_answers_the_address_is_in_question(cluster: Cluster, project: Path, address: str) -> None:
    done = submit(dataclasses.replace(cluster, dashboard=address), project, "sft", "sft.yaml")
    assert done.returncode == 9
    assert "the dashboard's, such as http://HEAD:8265" in done.stderr
    assert "token" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_name_that_is_taken_and_a_folder_that_is_too_large(cluster: Cluster, project: Path) -> None:
    """Each has a remedy of its own; address and token are right."""
    line = ["--job-id", "mine", "--no-wait", "sft", "sft.yaml", "--data.train", "[{path: nosuch.jsonl, kind: text}]"]
    assert submit(cluster, project, *line).returncode == 0
    again = submit(cluster, project, *line)
    assert again.returncode == 9
    assert "has a job 'mine' already" in again.stderr
    assert "--job-id" in again.stderr
    (project / "data.raw").write_bytes(os.urandom(110_000_000))
    large = submit(cluster, project, "--no-wait", "sft", "sft.yaml")
    assert large.returncode == 9
    assert "--exclude" in large.stderr
    for done in (again, large):
        assert "Traceback" not in done.stderr
        assert "RAY_AUTH_TOKEN" not in done.stderr
    fits = submit(cluster, project, "--exclude", "*.raw", "--no-wait", "sft", "sft.yaml", "--sft.num_steps", "1")
    assert fits.returncode == 0, fits.stderr


@pytest.mark.parametrize("answer", ["s", "l"])
def test_ctrl_c_asks_what_becomes_of_the_job(cluster: Cluster, project: Path, answer: str) -> None:
    """On a terminal: stop the job, or leave it running."""
    command = [sys.executable, "-m", "rlhf_dist.cli.main", "submit", "--ray", cluster.dashboard]
    command += ["sft", "sft.yaml", "--sft.num_steps", "100000"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(project)
        os.execvpe(command[0], command, cluster.environment)
    shown = _read_until(terminal, rb"optimizer steps  ")
    os.write(terminal, b"\x03")
    shown += _read_until(terminal, rb"\[s\]top it")
    os.write(terminal, answer.encode() + b"\n")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130, shown

    job = re.search(rb"Job (raysubmit_\w+) at", shown)
    assert job is not None
    drivers = cluster.drivers()
    if answer == "s":
        assert not psutil.wait_procs(drivers, timeout=60)[1], "the job continues"
    else:
        assert drivers, "the job was stopped"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", "--address", cluster.dashboard]
        stop = subprocess.run(
            [*ray, job[1].decode()],
            env=cluster.environment | {"RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert stop.returncode == 0, stop.stdout + stop.stderr


def _read_until(terminal: int, pattern: bytes, timeout_s: float = 240) -> bytes:
    """What a terminal shows, up to the pattern."""
    shown, deadline = b"", time.monotonic() + timeout_s
    while not re.search(pattern, shown):
        assert time.monotonic() < deadline, shown.decode(errors="replace")
        part = b""
        with contextlib.suppress(OSError):  # the other end is closed
            part = os.read(terminal, 4096)
        assert part, f"the command ended:\n{shown.decode(errors='replace')}"
        shown += part
    return shown


def test_the_plain_line_does_the_same(cluster: Cluster, project: Path) -> None:
    """launch/ray_job.sh, which calls `ray job submit`."""
    environment = cluster.environment | {"RAY_API_SERVER_ADDRESS": cluster.dashboard}
    run_dir = project / "runs" / "plain"
    done = subprocess.run(
        [ROOT / "launch" / "ray_job.sh", "sft", "sft.yaml", "--run_dir", str(run_dir), "--sft.num_steps", "2"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run_dir / "model" / "model.safetensors").is_file()
