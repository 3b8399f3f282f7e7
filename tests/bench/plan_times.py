"""How far the times that `rlhf-dist plan` predicts are from those of a real run, after another run has calibrated them.

    python tests/bench/plan_times.py

Runs PPO on the CPU, in this process, on a small model; takes each phase's factor from that run; predicts another run (a larger
model, longer responses, more prompts), runs it, and prints predicted and measured seconds of an iteration's phases. The small
run is repeated before each of the others, for a machine that is shared is not as fast at all times.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.tiny import save_tiny_lm, save_tiny_rm

from rlhf_dist.planning.calibration import PHASES, calibrated, measured_seconds, metrics_rows, response_length
from rlhf_dist.planning.hardware import GPUS, Cluster
from rlhf_dist.planning.plan import plan_run
from rlhf_dist.planning.rates import Rates
from rlhf_dist.ppo.build import run_ppo
from rlhf_dist.ppo.config import PPOConfig

CLUSTER = Cluster(GPUS["cpu"], 1, 1, GPUS["cpu"].memory_bytes)
SMALL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "initializer_range": 0.02}
LARGE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "initializer_range": 0.02}
PROMPT = "Write about the sea and the sky. " * 2


def run(folder: Path, name: str, sizes: dict[str, Any], response: int, prompts: int) -> PPOConfig:
    """Run four iterations; returns the configuration."""
    context = {"max_position_embeddings": 512}
    save_tiny_lm(folder / name / "lm", **sizes, **context)
    save_tiny_rm(folder / name / "rm", **sizes, **context)
    records = folder / name / "prompts.jsonl"
    records.write_text(
        "".join(json.dumps({"prompt": PROMPT + str(i)}) + "\n" for i in range(prompts)), encoding="utf-8"
    )
    trained = {"precision": "fp32", "micro_batch_size": 4, "optimizer": {"learning_rate": 1e-6}}
    frozen = {"precision": "fp32", "micro_batch_size": 4}
    config = PPOConfig.model_validate(
        {
            "run_dir": folder / name / "run",
            "cluster": "inline",
            "device": "cpu",
            "policy": {"model_path": str(folder / name / "lm"), **trained},
            "value": trained,
            "reward": {"model_path": str(folder / name / "rm"), **frozen},
            "reference": frozen,
            "rollout": {"max_response_tokens": response, "batch_size": 16},
            "data": {"max_length_tokens": 96 + response, "prompts": [{"path": str(records), "kind": "prompt"}]},
            "ppo": {
                "num_iterations": 4,
                "prompts_per_iteration": prompts,
                "mini_batch_size": prompts // 2,
                "num_epochs": 1,
                "kl_coef": 0.05,
            },
        }
    )
    with contextlib.redirect_stdout(io.StringIO()):
        run_ppo(config)
    return config


def predicted(config: PPOConfig, rates: Rates) -> dict[str, float]:
    """Phase → seconds, at the responses' real mean length."""
    response = response_length(metrics_rows(config.run_dir / "metrics.jsonl"))
    return plan_run(config, CLUSTER, rates, mean_prompt=75, mean_response=response).timeline.seconds


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("| run | phase | predicted, s | measured, s | measured / predicted |")
        print("|---|---|---|---|---|")
        cases = {
            "model 8 times as large": (LARGE, 48, 16),
            "responses twice as long": (SMALL, 96, 16),
            "twice as many prompts": (SMALL, 48, 32),
        }
        for case, (sizes, response, prompts) in cases.items():
            base = run(folder, f"before_{prompts}_{response}_{len(case)}", SMALL, 48, 16)
            rates = calibrated(base.run_dir / "metrics.jsonl", base, CLUSTER, mean_prompt=75)
            config = run(folder, case.replace(" ", "_"), sizes, response, prompts)
            expected, measured = predicted(config, rates), measured_seconds(config.run_dir / "metrics.jsonl")
            expected["all"], measured["all"] = sum(expected.values()), sum(measured.values())
            for phase in (*PHASES, "all"):
                ratio = measured[phase] / expected[phase]
                print(f"| {case} | {phase} | {expected[phase]:.2f} | {measured[phase]:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
