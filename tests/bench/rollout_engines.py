"""Seconds of the phases of a PPO iteration with `hf` and with `vllm` rollouts, side by side.

    python tests/bench/rollout_engines.py [--smollm2] [--repeats 3]

Needs vLLM beside this project (README, "Rollouts with vLLM"). On CPUs, on Ray, one rank a role and one thread a rank, so that
the ranks of other roles only take turns; fp32, but for SmolLM2, which is bf16. The runs of a case follow each other, engine by
engine, `--repeats` times; given are medians over all their iterations but the first. Response lengths are `fixed` (no response
ends before the limit) or `spread` (stop tokens end them at any length up to it). The last column is generation by itself, in
response tokens a second.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.tiny import VOCAB_SIZE, save_tiny_lm, save_tiny_rm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_dist.planning.calibration import PHASES
from rlhf_dist.ppo.build import run_ppo
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.quickstart.smollm2 import ensure_smollm2
from rlhf_dist.run.trackers import read_metrics

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
}
"""With the tiny tokenizer: 2.5 million parameters."""
ENGINES: dict[str, dict[str, Any]] = {
    "hf": {"engine": "hf"},
    "vllm, counter draws": {"engine": "vllm"},
    "vllm, its own draws": {"engine": "vllm", "draws": "engine"},
}
ITERATIONS = 4


def models(folder: Path, smollm2: bool) -> tuple[Path, Path]:
    """(policy, reward model)."""
    lm, rm = folder / "lm", folder / "rm"
    if not smollm2:
        return save_tiny_lm(lm, **SIZES), save_tiny_rm(rm, **SIZES)
    source = ensure_smollm2()
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    model.config.pad_token_id = AutoTokenizer.from_pretrained(source).pad_token_id
    model.save_pretrained(rm)
    AutoTokenizer.from_pretrained(source).save_pretrained(rm)
    return source, rm


def config_of(folder: Path, lm: Path, rm: Path, engine: str, spread: bool, smollm2: bool) -> PPOConfig:
    """One run: 64 prompts of about 60 tokens, 64 response tokens at most; SmolLM2: 16 prompts."""
    num = 16 if smollm2 else 64
    records = folder / "prompts.jsonl"
    text = "Write about the sea and the sky and the wind of the night. "
    records.write_text("".join(json.dumps({"prompt": text + str(i)}) + "\n" for i in range(num)), encoding="utf-8")
    hosted = {"precision": "bf16" if smollm2 else "fp32", "micro_batch_size": 8}
    trained = hosted | {"optimizer": {"learning_rate": 1e-7}}
    # About one in thirty draws of a model that knows nothing is one of these; one that writes stops where a sentence does.
    stops = {"stop": ["."]} if smollm2 else {"stop_token_ids": list(range(10, 10 + VOCAB_SIZE // 30))}
    return PPOConfig.model_validate(
        {
            "run_dir": folder / "run",
            "device": "cpu",
            "policy": {"model_path": str(lm), **trained},
            "value": trained,
            "reward": {"model_path": str(rm), **hosted},
            "reference": hosted,
            "rollout": {"max_response_tokens": 64, "batch_size": num, **ENGINES[engine], **(stops if spread else {})},
            "data": {"max_length_tokens": 192, "prompts": [{"path": str(records), "kind": "prompt"}]},
            "ppo": {
                "num_iterations": ITERATIONS,
                "prompts_per_iteration": num,
                "mini_batch_size": num // 2,
                "num_epochs": 1,
            },
            "checkpoint": {"every_minutes": 0, "at_end": False},
        }
    )


def measure(folder: Path, config: PPOConfig) -> list[dict[str, float]]:
    """Seconds of the phases, and the tokens, of every iteration but the first."""
    with contextlib.redirect_stdout(io.StringIO()):
        run_ppo(config)
    rows = [row for step, row in read_metrics(config.run_dir / "metrics.jsonl") if step > 1]
    shutil.rmtree(config.run_dir)
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    name = "SmolLM2-135M, bf16" if options.smollm2 else "2.5M, fp32"
    print(f"| model | lengths | engine | {' | '.join(f'{phase}, s' for phase in PHASES)} | all, s | tokens/s |")
    print("|---" * (len(PHASES) + 5) + "|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lm, rm = models(folder, options.smollm2)
        for spread in (False, True):
            found: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
            for _ in range(options.repeats):
                for engine in ENGINES:
                    found[engine] += measure(folder, config_of(folder, lm, rm, engine, spread, options.smollm2))
            for engine, rows in found.items():
                seconds = [statistics.median(row[f"time/{phase}_s"] for row in rows) for phase in PHASES]
                whole = statistics.median(row["time/step_s"] for row in rows)
                speed = statistics.median(
                    row["throughput/response_tokens_per_s"] * row["time/step_s"] / row["time/generate_s"]
                    for row in rows
                )
                cells = " | ".join(f"{number:.2f}" for number in (*seconds, whole))
                lengths = "spread" if spread else "fixed"
                print(f"| {name} | {lengths} | {engine} | {cells} | {speed:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
