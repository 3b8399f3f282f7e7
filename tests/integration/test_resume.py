"""Killed with SIGKILL and resumed, a run ends with exactly the weights and metrics of an undisturbed one."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.runs import cli, metrics, wait_for_step, weights, write_config

pytestmark = [pytest.mark.timeout(1200)]
Make = Callable[..., dict[str, Any]]

LENGTHS = {"sft": 60, "reward": 60, "ppo": 8}
"""Steps or iterations: enough for a kill to land in the middle of the run."""
STATEFUL = {
    "adaptive_kl_target": 0.01,
    "kl_horizon": 30,
    "normalize_scores": "mean_std",
    "value_warmup_iterations": 1,
    "early_stop_kl": 0.003,
    "ema_decay": 0.9,
}
"""What PPO carries from one iteration to the next beside its models, all of it in use."""
OFF_POLICY = {"off_policy_iterations": 1, "importance_range": 1.2}
"""PPO with responses in flight at every checkpoint."""


def _config(
    make_config: Make, command: str, run_dir: Path, cluster: str, ppo: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`ppo`: further settings of that section."""
    config = make_config(command, run_dir, ranks=2, zero_stage=2, cluster=cluster)
    config["checkpoint"] = {"every_steps": 1 if command == "ppo" else 7}
    if command == "ppo":
        config["ppo"] |= STATEFUL | (ppo or {})
        config["rollout"]["num_chunks"] = 2
    config[command]["num_iterations" if command == "ppo" else "num_steps"] = LENGTHS[command]
    return config


def _gone(processes: list[psutil.Process], timeout_s: float = 20) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=timeout_s)[1]


@pytest.mark.parametrize(
    ("command", "cluster", "ppo"),
    [
        pytest.param("sft", "inline", {}, id="sft-inline"),
        pytest.param("ppo", "ray", {}, id="ppo-ray"),
        pytest.param("ppo", "inline", OFF_POLICY, id="ppo-inline-off-policy"),
    ],
)
def test_asked_to_stop_and_resumed_ends_where_the_undisturbed_run_ends(
    command: str, cluster: str, ppo: dict[str, Any], make_config: Make, tmp_path: Path
) -> None:
    """SIGUSR1, without periodic checkpoints: the run writes one, and ends with the code on which job scripts requeue."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    configs = {}
    for run in (stopped, whole):
        config = _config(make_config, command, run, cluster, ppo) | {"checkpoint": {"every_steps": 0}}
        configs[run] = str(write_config(tmp_path / f"{run.name}.yaml", config))
    process = cli(command, configs[stopped])
    wait_for_step(process, stopped, 2)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 75, output
    assert "--resume auto continues from there" in output
    assert not (stopped / "summary.json").exists()

    for arguments in ((configs[stopped], "--resume", "auto"), (configs[whole],)):
        process = cli(command, *arguments)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    expected, found = weights(whole), weights(stopped)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert metrics(stopped) == metrics(whole)
    if ppo:
        stale = [line["rollout/staleness"] for _, line in metrics(whole) if "rollout/staleness" in line]
        masked = [line["rollout/importance_masked_fraction"] for _, line in metrics(whole)[1:]]
        assert stale == [0, 0, *[1] * (LENGTHS["ppo"] - 2)], "one iteration warms the value function up"
        assert 0 < sum(masked) < len(masked)


@pytest.mark.parametrize(
    ("command", "cluster", "ppo"),
    [
        pytest.param("sft", "inline", {}, id="sft-inline"),
        pytest.param("reward", "inline", {}, id="reward-inline"),
        pytest.param("ppo", "ray", {}, id="ppo-ray"),
        pytest.param("ppo", "ray", OFF_POLICY, id="ppo-ray-off-policy"),
    ],
)
def test_killed_and_resumed_ends_where_the_undisturbed_run_ends(
    command: str, cluster: str, ppo: dict[str, Any], make_config: Make, tmp_path: Path
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    config = write_config(tmp_path / "killed.yaml", _config(make_config, command, killed, cluster, ppo))
    process = cli(command, str(config))
    wait_for_step(process, killed, LENGTHS[command] // 2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "summary.json").exists(), "the kill came after the end; lengthen the run"
    late = _gone(children)
    # Ray's own two agents find out only after minutes that their raylet is gone; they hold no model.
    agents = [p for p in late if p.name() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]
    assert set(late) <= set(agents), "processes outlived their driver"
    for agent in agents:
        agent.kill()

    resumed = cli(command, str(config), "--resume", "auto")
    output, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, output
    undisturbed = cli(
        command, str(write_config(tmp_path / "whole.yaml", _config(make_config, command, whole, cluster, ppo)))
    )
    output, _ = undisturbed.communicate(timeout=600)
    assert undisturbed.returncode == 0, output

    for model in ("model", "model_ema") if command == "ppo" else ("model",):
        expected, found = weights(whole, model), weights(killed, model)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert metrics(killed) == metrics(whole)
    if command == "ppo":
        steps = [line["policy/num_updates"] for _, line in metrics(whole) if "policy/num_updates" in line]
        coefs = {line["kl/coef"] for _, line in metrics(whole) if "kl/coef" in line}
        assert min(steps) < max(steps), "no update was stopped by its KL; lower early_stop_kl"
        assert len(coefs) > 4
    summaries = [json.loads((run / "summary.json").read_text()) for run in (killed, whole)]
    for summary in summaries:
        summary.pop("wall_time_s")
    assert summaries[0] == summaries[1]
