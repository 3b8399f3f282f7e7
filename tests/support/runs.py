"""What the end-to-end tests share besides fixtures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from rlhf_dist.tracking.metrics import is_clock
from rlhf_dist.tracking.trackers import read_metrics


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
