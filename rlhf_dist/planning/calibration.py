"""Rates measured by a real run: what its phases took, over what they should have taken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.planning.hardware import Cluster
from rlhf_dist.planning.plan import plan_run
from rlhf_dist.planning.rates import PHASES, Rates
from rlhf_dist.planning.roles import AnyConfig
from rlhf_dist.run.trackers import read_metrics


def read_rates(path: Path) -> Rates:
    """Rates of a JSON file.

    Raises:
        ConfigError: no such file, or it holds something else.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--rates {path} cannot be read ({error.strerror}); give a JSON file of rates, or a run folder"
        ) from error
    except ValueError as error:
        raise ConfigError(f"--rates {path} is no JSON ({error}); fix it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--rates {path} holds a {type(values).__name__}; it must hold a JSON object of rates")
    return Rates.read(values, f"--rates {path}")


def calibrated(metrics_path: Path, config: AnyConfig, cluster: Cluster, mean_prompt: float | None = None) -> Rates:
    """Rates with a factor for each phase that the run measured. The first iteration, which pays for warming up, does not count.

    Args:
        metrics_path: `metrics.jsonl` of the run.
        config: of the run.
        cluster: that it ran on.
        mean_prompt: mean length of its prompts in tokens, which a run does not write down; the longest allowed where None.

    Raises:
        ConfigError: the file has no times, or the run does not go onto `cluster`.
    """
    rows = metrics_rows(metrics_path)
    command_step = "time/update_s" if any("time/update_s" in row for row in rows) else "time/step_s"
    timed = [row for row in rows if command_step in row]
    if not timed:
        raise ConfigError(
            f"--rates {metrics_path} has no times of phases ({command_step}); give a run that trained some steps"
        )
    timed = timed[1:] or timed
    plan = plan_run(config, cluster, mean_prompt=mean_prompt, mean_response=response_length(timed))
    if plan.layout.misfit:
        raise ConfigError(
            f"--rates {metrics_path}: that run cannot have been on {cluster.num_nodes} × {cluster.gpus_per_node} GPUs: "
            f"{plan.layout.misfit}; say where it was with --measured-on TYPE:NODESxGPUS"
        )
    expected = plan.timeline.seconds
    factors = {}
    for phase in PHASES:
        name = "time/step_s" if phase == "update" and command_step == "time/step_s" else f"time/{phase}_s"
        measured = _mean(timed, name)
        if measured and expected.get(phase):
            factors[phase] = measured / expected[phase]
    return replace(Rates(), factors=factors)


def measured_seconds(metrics_path: Path) -> dict[str, float]:
    """Phase → mean seconds of a run's iterations but the first."""
    rows = [row for row in metrics_rows(metrics_path) if "time/update_s" in row][1:]
    return {phase: mean for phase in PHASES if (mean := _mean(rows, f"time/{phase}_s"))}


def response_length(rows: Sequence[dict[str, float]]) -> float | None:
    """Mean tokens of a response; None where the run had none."""
    return _mean(rows, "rollout/response_length_mean")


def metrics_rows(path: Path) -> list[dict[str, float]]:
    """What a run measured, a mapping a step.

    Raises:
        ConfigError: there is no such file.
        RunFolderError: a line of it is not a run's.
    """
    if not path.is_file():
        raise ConfigError(f"--rates: there is no {path}; give a JSON file of rates, or the folder of a run")
    return [metrics for _, metrics in read_metrics(path)]


def _mean(rows: Sequence[dict[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None
