"""The life of a Slurm job under signals: `slurm/run.sh` with `srun` and `scontrol` in place of Slurm's. The same on a real one:
tests/integration/test_slurm.py."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[3] / "slurm"
SRUN = """\
#!/usr/bin/env bash
while [[ "$1" != bash ]]; do shift; done
shift 2
call() { echo "$*" >>"$FOLDER/calls"; }
call "$*"
case "$*" in
    *"slurm_node head"*)
        read -r -t "$HEAD_S"
        (($? > 128)) || exit 0 # the end of the input: told to stop
        echo 10.0.0.1:6379 >"${!#}"
        cat
        ;;
    *"slurm_node worker"*) cat ;;
    *wait_for_nodes*) ;;
    *) eval "$DRIVER" ;;
esac
"""
SCONTROL = """\
#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") printf '%s\\n' n1 n2 ;;
    "show job") echo "JobId=12 JobName=x $(<"$FOLDER/state") Dependency=(null)"; echo "JobId=13 JobState=RUNNING Reason=None" ;;
    requeue*) echo "requeue $2" >>"$FOLDER/calls" ;;
esac
"""
STUBBORN = "trap '' USR1; call driver; exec sleep 60"
"""A driver whose step takes longer than what is left of the job's time."""


@dataclasses.dataclass
class Job:
    """A batch script that runs, and what it had done."""

    shell: subprocess.Popen[bytes]
    folder: Path
    driver: str
    """What its driver does."""

    @property
    def calls(self) -> list[str]:
        """Commands of its steps, and requeues."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, call: str) -> None:
        """Until a call that begins so was made."""
        deadline = time.monotonic() + 30
        while not any(found.startswith(call) for found in self.calls):
            assert time.monotonic() < deadline, (call, self.calls, self.log)
            time.sleep(0.05)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def send(self, number: signal.Signals, says: str = "") -> None:
        """A signal to the batch script alone; returns when the log says so."""
        self.shell.send_signal(number)
        deadline = time.monotonic() + 30
        while says not in self.log and time.monotonic() < deadline:
            time.sleep(0.05)

    def state(self, words: str) -> None:
        """What `scontrol show job` is to say."""
        (self.folder / "state").write_text(words)

    def end(self) -> int:
        return self.shell.wait(timeout=60)


@pytest.fixture
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Job]:
    """A job of two nodes. The parameter: variables of its environment."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "c.yaml").write_text("run_dir: r-{seed}\n" + getattr(request, "param", {}).get("FILE", ""))
    (tmp_path / "state").write_text("JobState=RUNNING Reason=None")
    if "RAN" in getattr(request, "param", {}):  # left by an earlier start
        (tmp_path / ".rlhf_dist" / "jobs").mkdir(parents=True)
        (tmp_path / ".rlhf_dist" / "jobs" / "big-12.ran").touch()
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "FOLDER": str(tmp_path),
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CLUSTER_NAME": "big",
        "RLHF_DIST_STOP_TIMEOUT": "3",
        "HEAD_S": "0.1",
        "DRIVER": STUBBORN,
    } | getattr(request, "param", {})
    with (tmp_path / "log").open("wb") as log:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", f"source {SLURM}/run.sh; run_on_slurm ppo c.yaml ${{ARGUMENTS:-}}"],
            env=variables,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    yield Job(shell, tmp_path, variables["DRIVER"])
    if shell.poll() is None:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()


@pytest.mark.parametrize(
    "why",
    ["Reason=TimeLimit PreemptTime=None", "Reason=None PreemptTime=2026-11-24T17:19:04"],
    ids=["time limit", "preemption after a time of grace"],
)
def test_the_end_before_the_checkpoint_is_a_requeue_too(job: Job, why: str):
    job.wait_for("driver")
    job.send(signal.SIGUSR1, "USR1")
    job.state(f"JobState=COMPLETING {why}")
    job.send(signal.SIGTERM)
    assert job.end() == 75, job.log
    assert [call for call in job.calls if call.startswith("requeue")] == ["requeue 12"]
    assert "before the run had written its checkpoint" in job.log
    assert "--signal" in job.log
    assert not (job.folder / ".rlhf_dist" / "jobs" / "big-12").exists()


@pytest.mark.parametrize("warned", [True, False])
def test_a_job_that_is_cancelled_stays_cancelled(job: Job, warned: bool):
    job.wait_for("driver")
    if warned:
        job.send(signal.SIGUSR1, "USR1")
    job.state("JobState=COMPLETING Reason=None PreemptTime=None")
    job.send(signal.SIGTERM)
    assert job.end() == 143, job.log
    assert not [call for call in job.calls if call.startswith("requeue")]


def test_without_a_warning_the_time_limit_ends_the_job(job: Job):
    """`--signal-before-end 0` says so."""
    job.wait_for("driver")
    job.state("JobState=COMPLETING Reason=TimeLimit")
    job.send(signal.SIGTERM)
    assert job.end() == 143, job.log
    assert not [call for call in job.calls if call.startswith("requeue")]


@pytest.mark.parametrize("job", [{"DRIVER": "trap 'exit 75' USR1; call driver; sleep 60 & wait $!"}], indirect=True)
def test_a_job_that_is_cancelled_while_it_checkpoints_stays_cancelled(job: Job):
    job.wait_for("driver")
    job.state("JobState=COMPLETING Reason=None")  # and SIGTERM comes a moment later than the driver's end
    job.send(signal.SIGUSR1)
    assert job.end() == 75, job.log
    assert not [call for call in job.calls if call.startswith("requeue")]


@pytest.mark.parametrize("job", [{"DRIVER": "trap 'exit 143' USR1; call driver; sleep 60 & wait $!"}], indirect=True)
def test_a_driver_that_meets_the_time_limit_before_the_script_does(job: Job):
    job.wait_for("driver")
    job.state("JobState=COMPLETING Reason=TimeLimit")
    job.send(signal.SIGUSR1)
    assert job.end() == 75, job.log
    assert "requeue 12" in job.calls


@pytest.mark.parametrize("job", [{"HEAD_S": "4"}], indirect=True)
def test_a_warning_while_ray_starts_is_acted_on_at_once(job: Job):
    job.wait_for("python -m rlhf_dist.distributed.ray.slurm_node head")
    job.send(signal.SIGUSR1)
    assert job.end() == 75, job.log
    started = [call.partition(str(job.folder))[0].strip() for call in job.calls]
    assert started == ["python -m rlhf_dist.distributed.ray.slurm_node head", "requeue 12"]


@pytest.mark.parametrize(
    "job",
    [
        {
            "SLURM_ARRAY_JOB_ID": "12",
            "SLURM_ARRAY_TASK_ID": "3",
            "DRIVER": "trap 'exit 75' USR1; call driver; sleep 60 & wait $!",
        }
    ],
    indirect=True,
)
def test_the_last_task_of_an_array_requeues_itself_alone(job: Job):
    """Its job id is the array's as well: `scontrol requeue 12` would start all tasks anew, those that run included."""
    job.wait_for("driver")
    job.send(signal.SIGUSR1)
    assert job.end() == 75, job.log
    assert job.calls[-1] == "requeue 12_3"


def test_the_folder_of_a_job_is_told_apart_from_another_clusters(job: Job):
    job.wait_for("driver")
    assert (job.folder / ".rlhf_dist" / "jobs" / "big-12" / "token").exists()


def _driver(job: Job) -> list[str]:
    job.wait_for("driver")
    return next(call for call in job.calls if call.startswith("rlhf-dist")).split()[1:]


def test_the_driver_goes_on_where_an_earlier_job_ended(job: Job):
    assert _driver(job) == ["ppo", "c.yaml", "--ray.address", "10.0.0.1:6379", "--resume", "auto"]


@pytest.mark.parametrize("job", [{"FILE": "resume: 'no' # never\n"}], indirect=True)
def test_what_the_file_says_of_resuming_stands(job: Job):
    assert _driver(job) == ["ppo", "c.yaml", "--ray.address", "10.0.0.1:6379"]


@pytest.mark.parametrize(
    ("job", "resumed"),
    [
        ({"FILE": "overwrite: true # again\n"}, False),
        ({"FILE": 'overwrite: "True"\n'}, False),
        ({"FILE": "overwrite: false\n"}, True),
        ({"FILE": "overwrite: true\n", "ARGUMENTS": "--overwrite false"}, True),
        ({"ARGUMENTS": "--overwrite true"}, False),
        ({"ARGUMENTS": "--overwrite=true"}, False),
    ],
    indirect=["job"],
)
def test_a_run_that_removes_the_old_one_is_not_told_to_continue_it(job: Job, resumed: bool):
    assert ("--resume" in _driver(job)) == resumed


@pytest.mark.parametrize(
    "job", [{"FILE": "resume: 'no'\noverwrite: true\n", "SLURM_RESTART_COUNT": "1", "RAN": "yes"}], indirect=True
)
def test_a_job_that_was_requeued_continues_its_own_run_in_any_case(job: Job):
    """Another run it would not continue, or would have removed; this one it began itself."""
    assert _driver(job)[-4:] == ["--resume", "auto", "--overwrite", "false"]


@pytest.mark.parametrize(
    "job",
    [
        {"FILE": "resume: 'no'\n", "SLURM_RESTART_COUNT": "1"},
        {"FILE": "resume: 'no'\n", "RAN": "yes"},
    ],
    ids=["requeued before its driver ran", "another job of the same number"],
    indirect=True,
)
def test_a_job_whose_driver_never_ran_continues_nothing_that_it_did_not_begin(job: Job):
    assert _driver(job) == ["ppo", "c.yaml", "--ray.address", "10.0.0.1:6379"]


@pytest.mark.parametrize(
    ("job", "kept"),
    [
        ({"DRIVER": "exit 0"}, False),
        ({"DRIVER": "exit 5"}, False),  # rejected: what is in run_dir is another run's
        ({"DRIVER": "exit 7"}, True),  # a node was lost: Slurm starts the job again
        ({"DRIVER": "trap 'exit 75' USR1; call driver; sleep 60 & wait $!"}, True),
        ({"DRIVER": "call driver; exec sleep 60"}, False),  # it did not listen yet
        ({"DRIVER": "call driver; exec sleep 60", "SLURM_RESTART_COUNT": "1", "RAN": "yes"}, True),
    ],
    ids=["done", "rejected", "lost", "checkpointed", "warned too early", "warned too early, when it had run before"],
    indirect=["job"],
)
def test_that_a_driver_ran_is_known_until_the_job_is_over(job: Job, kept: bool):
    if "sleep" in job.driver:
        job.wait_for("driver")
        job.send(signal.SIGUSR1)
    job.end()
    assert (job.folder / ".rlhf_dist" / "jobs" / "big-12.ran").exists() == kept, job.log


@pytest.mark.parametrize("job", [{"HEAD_S": "4"}], indirect=True)
def test_a_job_that_is_warned_before_its_driver_runs_says_of_none(job: Job):
    job.wait_for("python -m rlhf_dist.distributed.ray.slurm_node head")
    job.send(signal.SIGUSR1)
    assert job.end() == 75, job.log
    assert not (job.folder / ".rlhf_dist" / "jobs" / "big-12.ran").exists()
