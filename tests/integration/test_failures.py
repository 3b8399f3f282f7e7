"""What goes wrong is said in plain words, in time, and leaves nothing behind."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.runs import cli, metrics, wait_for_step, weights, write_config

from rlhf_dist.config.hosting import Placement, RayConfig
from rlhf_dist.core.errors import PlacementError
from rlhf_dist.distributed.group import WorkerSpec
from rlhf_dist.distributed.ray.session import RaySession
from rlhf_dist.distributed.workers.reward import RewardWorker

pytestmark = [pytest.mark.timeout(600)]
Make = Callable[..., dict[str, Any]]


def _pid_in(log: Path) -> int:
    return int(re.findall(r"^process (\d+) on", log.read_text(), re.MULTILINE)[-1])


def test_a_dead_rank_ends_the_run_and_leaves_no_process(make_config: Make, tmp_path: Path) -> None:
    config = make_config("ppo", tmp_path / "run", ranks=2)
    config["ppo"]["num_iterations"] = 10_000
    process = cli("ppo", str(write_config(tmp_path / "ppo.yaml", config)))
    metrics_path = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics_path.exists() and len(metrics_path.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    victim = _pid_in(tmp_path / "run" / "logs" / "value_1.log")
    assert victim in {child.pid for child in children}
    psutil.Process(victim).send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 7, output
    assert "value rank 1 died" in output
    assert "value_1.log" in output
    assert f"process {victim} on" in output, "the last lines of the rank's own log"
    assert "Traceback" not in output
    assert not psutil.wait_procs(children, timeout=60)[1], "processes outlived the run"
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_a_rollout_engine_that_is_killed_is_started_again_and_changes_nothing(
    make_config: Make, tmp_path: Path
) -> None:
    config = make_config("ppo", tmp_path / "left_alone")
    config["ppo"]["num_iterations"] = 6
    config["rollout"]["num_ranks"] = 2
    alone = cli("ppo", str(write_config(tmp_path / "left_alone.yaml", config)))
    output, _ = alone.communicate(timeout=280)
    assert alone.returncode == 0, output
    config["run_dir"] = str(tmp_path / "run")
    process = cli("ppo", str(write_config(tmp_path / "ppo.yaml", config)))
    wait_for_step(process, tmp_path / "run", 2)
    children = psutil.Process(process.pid).children(recursive=True)
    log = tmp_path / "run" / "logs" / "rollout_1.log"
    victim, other = _pid_in(log), _pid_in(log.with_name("rollout_0.log"))
    psutil.Process(victim).send_signal(signal.SIGKILL)
    wait_for_step(process, tmp_path / "run", 4)
    again = _pid_in(log)
    assert again != victim
    assert _pid_in(log.with_name("rollout_0.log")) == other, "the other engine was left alone"
    children.append(psutil.Process(again))
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    said = " ".join(output.split())
    assert "rollout engine 1 is started again (restart 1 of 2)" in said
    assert "rollout rank 1 died" in said
    assert not psutil.wait_procs(children, timeout=60)[1], "processes outlived the run"
    expected, actual = weights(tmp_path / "left_alone"), weights(tmp_path / "run")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "left_alone")


def test_an_error_in_a_rank_names_the_role_and_shows_no_traceback(
    make_config: Make, tiny_lm: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_lm.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    # Safetensors would be found out by their headers, before a rank is started.
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    config = make_config("sft", tmp_path / "run")
    config["model"]["model_path"] = str(broken)
    process = cli("sft", str(write_config(tmp_path / "sft.yaml", config)))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 4, output
    assert "model rank 0" in output
    assert str(broken) in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("command", "change", "code", "words"),
    [
        ("ppo", {"device": "cuda"}, 6, ["device is cuda", "device: cpu"]),
        ("sft", {"sft": {"batch_size": 500}}, 2, ["sft.batch_size is 500", "29 records", "lower it"]),
        ("sft", {"data": {"max_length_tokens": 5000}}, 4, ["5000", "context of", "lower data.max_length_tokens"]),
        ("ppo", {"rollout": {"max_response_tokens": 60}}, 3, ["prompts.jsonl:1", "tokens"]),
        ("reward", {"data": {"train": [{"path": "nowhere.jsonl", "kind": "preference"}]}}, 3, ["nowhere.jsonl"]),
        ("sft", {"sft": {"bach_size": 5}}, 2, ["bach_size", "batch_size"]),
        ("ppo", {"ppo": {"mini_batch_size": 4}}, 2, ["mini_batch_size 4 does not divide the 6 responses"]),
    ],
)
def test_a_bad_run_is_rejected_before_anything_starts(
    command: str, change: dict[str, Any], code: int, words: list[str], make_config: Make, tmp_path: Path
) -> None:
    config = make_config(command, tmp_path / "run")
    for key, value in change.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    process = cli(command, str(write_config(tmp_path / "run.yaml", config)))
    output, _ = process.communicate(timeout=100)
    assert process.returncode == code, output
    assert all(word in output for word in words), output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of a Ray cluster of two CPUs that this session did not start."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    options = ["--head", "--num-cpus=2", "--port=0", "--include-dashboard=false", "--block", "--disable-usage-stats"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
    log = (tmp_path / "ray.log").open("w")
    head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"--address='([\d.]+:\d+)'", (tmp_path / "ray.log").read_text())):
            assert head.poll() is None, (tmp_path / "ray.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "ray.log").read_text()
            time.sleep(0.2)
        children = psutil.Process(head.pid).children(recursive=True)
        yield found[1]
    finally:
        children += psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        for process in [psutil.Process(head.pid), *children] if head.poll() is None else children:
            if process.is_running():
                process.kill()
        head.wait()


def _ask_for_too_much(address: str, logs_dir: Path) -> None:
    def spec(role: str, num_ranks: int) -> WorkerSpec:
        return WorkerSpec(role, Placement(num_ranks=num_ranks), RewardWorker)

    session = RaySession(RayConfig(address=address, placement_timeout_s=3), "auto")
    try:
        with pytest.raises(PlacementError, match=r"ask for 3 CPUs .*the cluster has 2; lower num_ranks"):
            session.check([spec("reward", 3)])
        session.check([spec("reward", 2)])
        with session._hosts([spec("other", 1)]):  # another run that holds one of the two CPUs
            started = time.monotonic()
            rejection = pytest.raises(
                PlacementError, match=r"did not grant reward 2 x 1 CPU within 3 s \(free now: 1 CPUs"
            )
            with rejection, session.place([spec("reward", 2)], seed=0, logs_dir=lambda: logs_dir):
                pass
            assert time.monotonic() - started < 60
    finally:
        session.close()


def test_a_placement_that_cannot_be_had_is_rejected_within_the_limit(small_cluster: str, tmp_path: Path) -> None:
    # In a process of its own: Ray keeps the authentication mode of a process's first connection, and later tests connect to
    # private clusters, which have a token.
    process = multiprocessing.get_context("spawn").Process(target=_ask_for_too_much, args=(small_cluster, tmp_path))
    process.start()
    process.join(timeout=200)
    assert process.exitcode == 0


def test_a_run_that_diverges_stops_in_plain_words_and_keeps_the_samples(make_config: Make, tmp_path: Path) -> None:
    config = make_config("sft", tmp_path / "run", cluster="inline")
    config["model"]["optimizer"] = {"learning_rate": 1e30, "warmup_fraction": 0.0, "schedule": "constant"}
    process = cli("sft", str(write_config(tmp_path / "sft.yaml", config)))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 8, output
    assert "Traceback" not in output
    said = " ".join(output.split())
    assert re.search(
        r"a loss is not finite in optimizer step 1 of the update \(lm: rows [\d, ]+\)\. The step was not", said
    )
    (kept,) = (tmp_path / "run").glob("aborted_step_*.jsonl")
    records = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert {"record", "tokens", "loss_mask"} <= records[0].keys()
    assert not (tmp_path / "run" / "model").exists()
