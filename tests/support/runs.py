"""What the end-to-end tests share besides fixtures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf_dist.run.metrics import is_clock
from rlhf_dist.run.trackers import read_metrics


def cli(*arguments: str, **kwargs: Any) -> subprocess.Popen[str]:
    """The command line in its own process, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_dist.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        **kwargs,
    )


def weights(run_dir: Path, model: str = "model") -> dict[str, torch.Tensor]:
    """The parameters a run saved."""
    return load_file(run_dir / model / "model.safetensors")


def metrics(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """What a run measured, without what a clock says."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [(step, {name: value for name, value in line.items() if not is_clock(name)}) for step, line in lines]


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """Write a configuration as a user would keep it."""
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def wait_for_step(process: Any, run_dir: Path, step: int, timeout_s: float = 240) -> None:
    """Until metrics.jsonl holds `step`; a run that ends before is an error of the test."""
    deadline = time.monotonic() + timeout_s
    path = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline:
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        if process.poll() is not None:
            pytest.fail(f"the run ended before step {step}:\n{process.stdout.read()}")
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached within {timeout_s} s")
