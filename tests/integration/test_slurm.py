"""The sbatch scripts on a real Slurm of two nodes (`support/slurm_cluster.py`), with tiny models.

Jobs run side by side where a test does not need the nodes for itself: most of the time goes into imports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support import slurm_cluster
from support.runs import metrics, weights, write_config
from support.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
Make = Callable[..., dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]
NUM_ITERATIONS = 20
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
IN_USE = {"RLHF_DIST_RAY_ARGUMENTS": "--object-store-memory=100000000", "RLHF_DIST_START_TIMEOUT": "240"}


@dataclasses.dataclass(frozen=True)
class Job:
    """A submitted job."""

    slurm: SlurmCluster
    id: str
    folder: Path

    @property
    def log(self) -> str:
        path = self.folder / f"{self.id}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def summary(self) -> dict[str, str]:
        """What Slurm says of it."""
        shown = self.slurm.run("scontrol", "show", "job", "-o", self.id).splitlines()
        line = next(line for line in shown if line.startswith(f"JobId={self.id} "))  # of an array, there are others
        return dict(word.partition("=")[::2] for word in line.split())

    def wait_for(self, true: Callable[[], bool], what: str, timeout_s: float = 300) -> None:
        """Until `true()`; a job that ends before is an error of the test."""
        deadline = time.monotonic() + timeout_s
        while not true():
            if self.summary()["JobState"] in ENDED:
                pytest.fail(f"job {self.id} ended ({self.summary()['JobState']}) before {what}:\n{self.log}")
            if time.monotonic() > deadline:
                pytest.fail(f"job {self.id}: waited {timeout_s:g} s for {what}:\n{self.log}")
            time.sleep(0.2)

    def end(self, timeout_s: float = 300) -> dict[str, str]:
        """Wait for the job's end; what Slurm says of it then."""
        deadline = time.monotonic() + timeout_s
        while (summary := self.summary())["JobState"] not in ENDED or summary["EndTime"] == "Unknown":
            if time.monotonic() > deadline:
                pytest.fail(f"job {self.id} did not end within {timeout_s:g} s:\n{self.log}")
            time.sleep(0.3)
        return summary

    @property
    def name(self) -> str:
        """What Slurm's commands call it. The job id of an array's last task is that of the whole array."""
        summary = self.summary()
        return f"{summary['ArrayJobId']}_{summary['ArrayTaskId']}" if "ArrayJobId" in summary else self.id

    def warn(self) -> None:
        """What Slurm does some time before the job's time is over."""
        self.slurm.run("scancel", "--signal=USR1", "--batch", self.name)

    def start_now(self) -> None:
        """Slurm lets a requeued job wait for two minutes. A start within the second of its end is rejected by the nodes."""
        time.sleep(3)
        self.slurm.run("scontrol", "update", f"jobid={self.name}", "StartTime=now")

    def freeze_driver(self) -> None:
        """As in a step that takes longer than what is left of the job's time."""
        drivers = [p for p in self.processes() if [Path(word).name for word in p.cmdline()[1:2]] == ["rlhf-dist"]]
        assert drivers, [p.cmdline() for p in self.processes()]
        for process in drivers:
            process.suspend()

    def processes(self) -> list[psutil.Process]:
        """Processes of its steps on all nodes, by their environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                ours = environment.get("SLURM_CONF") == self.slurm.environment["SLURM_CONF"]
                if ours and environment.get("SLURM_JOB_ID") == self.id and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    """A cluster, in a short folder that munged accepts (pytest's own are closed to others)."""
    if reasons := slurm_cluster.missing():
        pytest.skip(f"no Slurm can be started here: {'; '.join(reasons)}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with slurm_cluster.running(folder) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def submit(slurm: SlurmCluster, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """(config, arguments, options of sbatch, whether by `rlhf-dist submit`, variables) → job; jobs that are left are
    cancelled."""
    jobs: list[Job] = []

    def submitted(
        config: dict[str, Any],
        *arguments: str,
        sbatch: tuple[str, ...] = ("--nodes=2",),
        through_cli: bool = False,
        **variables: str,
    ) -> Job:
        command = "ppo" if "ppo" in config else "sft"
        path = write_config(tmp_path / f"{len(jobs)}.yaml", config)
        own = {
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "RLHF_DIST_ACTIVATE": f"export PATH={Path(sys.executable).parent}:$PATH",
            "RLHF_DIST_STATE_DIR": str(tmp_path / "state"),
        }
        line = ["sbatch", "--parsable", "--cpus-per-task=8", f"--output={tmp_path}/%j.log", *sbatch]
        line += [f"slurm/{command}.sbatch", str(path), *arguments]
        environment = [f"{name}={value}" for name, value in (own | IN_USE | variables).items()]
        if through_cli:
            options = ["--nodes=2", "--cpus-per-node=8", "--sbatch-arg=--output=%j.log"]
            line = [sys.executable, "-m", "rlhf_dist.cli.main", "submit", "--slurm", *options, command, str(path)]
            done = slurm.run("env", f"--chdir={tmp_path}", *environment, *line)
            job_id = re.findall(r"^Submitted job (\d+): ", done)[0]
        else:  # from the repository's root, as the scripts ask for
            done = slurm.run("env", f"--chdir={ROOT}", *environment, *line)
            job_id = done.strip().partition(";")[0]
        jobs.append(Job(slurm, job_id, tmp_path))
        return jobs[-1]

    yield submitted
    for job in jobs:
        slurm.run("scancel", job.id, check=False)
    slurm.wait_idle(*slurm_cluster.NODES)


def _ppo(make_config: Make, run_dir: Path) -> dict[str, Any]:
    """Two policy ranks, each on a node of its own."""
    config = make_config("ppo", run_dir)
    config["policy"] |= {"num_ranks": 2, "placement_strategy": "STRICT_SPREAD"}
    config["ppo"]["num_iterations"] = NUM_ITERATIONS
    return config


def _sft(make_config: Make, run_dir: Path, num_steps: int = 4) -> dict[str, Any]:
    """The same with fewer processes to wait for."""
    config = make_config("sft", run_dir)
    config["model"] |= {"num_ranks": 2, "placement_strategy": "STRICT_SPREAD"}
    config["sft"]["num_steps"] = num_steps
    return config


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves its run, for the preempted one to be compared with."""
    return tmp_path_factory.mktemp("slurm") / "undisturbed"


def _nothing_left(job: Job) -> None:
    deadline = time.monotonic() + 20
    while (left := job.processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    # An empty mark that its driver ran outlives the starts of a job.
    left_behind = [path for path in job.folder.joinpath("state").glob("*") if path.suffix != ".ran"]
    assert not left_behind, "the token's folder"
    assert not list(Path("/tmp").glob(f"rlhf-{job.id}-*")), "Ray's folders"


def _steps(run_dir: Path) -> int:
    return len(metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def test_ranks_on_both_nodes_train_together(submit: Callable[..., Job], make_config: Make, undisturbed: Path):
    job = submit(_ppo(make_config, undisturbed), sbatch=("--nodes=2", "--gpus-per-node=1"))
    job.wait_for(lambda: _steps(undisturbed) > 0, "the first iteration")
    token = job.folder / "state" / f"test-{job.id}" / "token"
    assert token.stat().st_mode & 0o077 == 0
    assert token.parent.stat().st_mode & 0o077 == 0
    secret = token.read_text()
    assert len(secret) == 64
    lines = [" ".join(process.cmdline()) for process in job.processes()]
    assert not [line for line in lines if secret in line]
    raylets = [line for line in lines if "raylet/raylet" in line]
    assert len(raylets) == 2
    assert all("CPU,8" in line and "GPU,1" in line for line in raylets), raylets
    ports = {
        socket.laddr.port
        for process in job.processes()
        for socket in process.net_connections("tcp")
        if socket.status == psutil.CONN_LISTEN
    }
    assert len(ports) > 10, ports
    assert not ports & {52365, *range(10002, 20000)}, (
        "Ray's own choices, which other jobs on the node would make as well"
    )

    summary = job.end()
    assert (summary["JobState"], summary["ExitCode"]) == ("COMPLETED", "0:0"), job.log
    first_lines = [path.read_text().splitlines()[0] for path in sorted((undisturbed / "logs").glob("policy_*.log"))]
    assert [re.findall(r"\(Slurm node (n\d)\)", line) for line in first_lines] in ([["n1"], ["n2"]], [["n2"], ["n1"]])
    assert len(metrics(undisturbed)) >= NUM_ITERATIONS
    head = re.findall(r"Ray's head is at (\S+):\d+", job.log)
    assert len(head) == 1
    assert not head[0].startswith("127.")
    _nothing_left(job)


def test_a_preempted_job_is_requeued_and_ends_as_if_nothing_had_been(
    submit: Callable[..., Job], make_config: Make, undisturbed: Path, tmp_path: Path
):
    if not (undisturbed / "summary.json").exists():
        pytest.skip("it is compared with the run of test_ranks_on_both_nodes_train_together")
    run_dir = tmp_path / "preempted"
    job = submit(_ppo(make_config, run_dir))
    job.wait_for(lambda: _steps(run_dir) >= 2, "the second iteration")
    job.warn()
    job.wait_for(lambda: job.summary()["Restarts"] == "1" and job.summary()["JobState"] == "PENDING", "the requeue")
    assert "the driver ended with exit code 75" in job.log
    assert not (run_dir / "summary.json").exists(), "the signal came after the end; lengthen the run"
    _nothing_left(job)
    job.start_now()
    summary = job.end()
    assert (summary["JobState"], summary["ExitCode"]) == ("COMPLETED", "0:0"), job.log
    assert f"job {job.id}, start 1" in job.log
    assert not list(job.folder.joinpath("state").glob("*")), "a job that is done leaves no mark"
    expected, found = weights(undisturbed), weights(run_dir)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert metrics(run_dir) == metrics(undisturbed)


def test_an_array_trains_its_seeds_side_by_side_on_the_same_nodes(
    submit: Callable[..., Job], make_config: Make, tmp_path: Path
):
    array = submit(_sft(make_config, tmp_path / "seed-{seed}"), sbatch=("--nodes=2", "--array=3-4"))

    def lines() -> list[str]:
        return array.slurm.run("scontrol", "show", "job", "-o", array.id).splitlines()

    array.wait_for(lambda: len(lines()) == 2, "both tasks")  # Slurm makes jobs of them one by one
    tasks = [Job(array.slurm, re.findall(r"^JobId=(\d+)", line)[0], tmp_path) for line in lines()]
    # One is warned while its Ray starts, and requeued: the one whose job id is also that of the whole array.
    last = next(task for task in tasks if task.id == array.id)
    last.wait_for(lambda: "start 0: sft on" in last.log, "its first words")
    last.warn()
    last.wait_for(lambda: last.summary()["Restarts"] == "1" and last.summary()["JobState"] == "PENDING", "the requeue")
    assert "have joined Ray" not in last.log
    last.start_now()
    summary = [task.end() for task in tasks]
    assert sorted(f["Restarts"] for f in summary) == ["0", "1"]
    logs = "\n".join(task.log for task in tasks)
    assert [(f["JobState"], f["ExitCode"], f["NodeList"]) for f in summary] == [("COMPLETED", "0:0", "n[1-2]")] * 2, (
        logs
    )
    assert max(f["StartTime"] for f in summary) < min(f["EndTime"] for f in summary), (
        "they did not run at the same time"
    )
    assert len(set(re.findall(r"Ray's head is at (\S+)", logs))) == 2
    three, four = (weights(tmp_path / f"seed-{seed}") for seed in (3, 4))
    assert not all(torch.equal(three[name], four[name]) for name in three)
    for task in tasks:
        _nothing_left(task)


def test_an_array_without_a_folder_a_seed_is_rejected(submit: Callable[..., Job], make_config: Make, tmp_path: Path):
    array = submit(_ppo(make_config, tmp_path / "run"), sbatch=("--nodes=1", "--array=0"))
    assert array.end()["ExitCode"] == "2:0"
    task = Job(array.slurm, array.summary()["JobId"], tmp_path)
    assert "put {seed} into it" in task.log
    assert "Ray's head" not in task.log


def test_a_node_that_never_comes_up_is_named(submit: Callable[..., Job], make_config: Make, tmp_path: Path):
    config = _ppo(make_config, tmp_path / "run")
    submit_slurm: SlurmCluster | None = None
    try:
        # n2 takes its time, which ends the wait; n3 died unseen, and is known to be lost before the limit.
        slow = submit(
            config,
            RLHF_DIST_ACTIVATE=f'export PATH={Path(sys.executable).parent}:$PATH; [[ "$SLURMD_NODENAME" != n2 ]] || sleep 999',
            RLHF_DIST_START_TIMEOUT="90",
            RLHF_DIST_STOP_TIMEOUT="5",
        )
        submit_slurm = slow.slurm
        submit_slurm.end_node(slurm_cluster.SPARE)
        dead = submit(config, sbatch=("--nodes=3", "--partition=spare"))
        assert slow.end()["ExitCode"] == "6:0", slow.log
        assert "1 of 2 nodes joined Ray; missing: n2 (after 90 s)" in slow.log
        _nothing_left(slow)
        dead.wait_for(lambda: "missing:" in dead.log, "a list of missing nodes")
    finally:
        if submit_slurm is not None:
            submit_slurm.revive_node(slurm_cluster.SPARE)
    dead.end()
    # n2 may have joined by then, or not.
    assert re.search(r"[12] of 3 nodes joined Ray; missing: .*n3 \(Ray ended on n3\)", dead.log), dead.log
    assert not (tmp_path / "run").exists()
    _nothing_left(dead)


def test_a_job_submitted_by_the_command_line_and_cancelled_leaves_nothing(
    submit: Callable[..., Job], make_config: Make, tmp_path: Path
):
    run_dir = tmp_path / "run"
    job = submit(_sft(make_config, run_dir, num_steps=100_000), through_cli=True)
    job.wait_for(lambda: _steps(run_dir) >= 1, "the first step")
    lines = [" ".join(process.cmdline()) for process in job.processes()]
    assert len([line for line in lines if "raylet/raylet" in line]) == 2
    assert [line for line in lines if line.startswith("ray::RankHost")]
    # Not even a job that was warned, and would be requeued when its time is over.
    job.freeze_driver()
    job.warn()
    job.wait_for(lambda: "USR1" in job.log, "the warning")
    job.slurm.run("scancel", job.id)
    summary = job.end()
    assert (summary["JobState"], summary["Restarts"]) == ("CANCELLED", "0"), job.log
    job.slurm.wait_idle(*slurm_cluster.NODES)
    _nothing_left(job)
    assert not (run_dir / "summary.json").exists()


def test_a_job_whose_time_is_over_before_it_could_checkpoint_is_requeued(
    submit: Callable[..., Job], make_config: Make, tmp_path: Path
):
    run_dir = tmp_path / "run"
    config = _sft(make_config, run_dir, num_steps=100_000) | {"checkpoint": {"every_steps": 1}}
    job = submit(config, sbatch=("--nodes=2", "--time=60"))
    job.wait_for(lambda: list(run_dir.glob("checkpoints/step_*")) != [], "the first checkpoint")
    job.freeze_driver()
    job.warn()
    job.wait_for(lambda: "USR1" in job.log, "the warning")
    job.slurm.run("scontrol", "update", f"jobid={job.id}", "TimeLimit=1")  # Slurm looks every 30 s
    job.wait_for(lambda: job.summary()["Restarts"] == "1" and job.summary()["JobState"] == "PENDING", "the requeue")
    assert "before the run had written its checkpoint" in job.log
    assert "DUE TO TIME LIMIT" in job.log
    _nothing_left(job)
    steps = _steps(run_dir)
    job.slurm.run("scontrol", "update", f"jobid={job.id}", "TimeLimit=60")
    job.start_now()
    job.wait_for(lambda: _steps(run_dir) > steps, "a step of the second start")
    assert "start 1: sft on" in job.log
    job.slurm.run("scancel", job.id)
    assert job.end()["JobState"] == "CANCELLED"


def test_a_heterogeneous_job_is_one_cluster_and_a_rejection_is_its_exit_code(
    submit: Callable[..., Job], make_config: Make, tmp_path: Path
):
    config = _ppo(make_config, tmp_path / "run") | {"ppo": {"kl_coeff": 0.1}}
    two_kinds = ("--nodes=1", "--nodelist=n1", ":", "--nodes=1", "--nodelist=n2", "--cpus-per-task=4")
    job = submit(config, sbatch=two_kinds)
    assert job.end()["ExitCode"] == "2:0", job.log
    assert "ppo on n1 n2" in job.log
    assert "all 2 nodes have joined Ray" in job.log
    assert "did you mean ppo.kl_coef?" in job.log
    _nothing_left(job)


def test_a_killed_script_takes_its_ray_with_it(submit: Callable[..., Job], make_config: Make, tmp_path: Path):
    """Not even SIGKILL of the batch script leaves a Ray behind: its nodes stop when their input ends."""
    job = submit(_ppo(make_config, tmp_path / "run"))
    job.wait_for(lambda: "all 2 nodes have joined Ray" in job.log, "Ray")
    (script,) = [
        p for p in job.processes() if "slurm_script" in " ".join(p.cmdline()) and p.parent().name() == "slurmstepd"
    ]
    os.kill(script.pid, signal.SIGKILL)
    job.end()
    deadline = time.monotonic() + 30
    while (left := job.processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    assert not list(Path("/tmp").glob(f"rlhf-{job.id}-*"))
