"""Small real records, and configurations over the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = tuple("good bad happy sad joy anger calm storm light dark warm cold sweet bitter bright dull".split())  # noqa: SIM905


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of instructions, preferences, prompts and text; lengths differ, so that batches are ragged."""
    folder = tmp_path_factory.mktemp("records")
    pick = lambda i, n: " ".join(WORDS[(i * 5 + k * 3) % len(WORDS)] for k in range(n))  # noqa: E731
    return {
        "instructions": _write(
            folder / "instructions.jsonl",
            [{"instruction": f"say {pick(i, 1)}", "input": "", "output": pick(i, 1 + i % 5)} for i in range(36)],
        ),
        "preferences": _write(
            folder / "preferences.jsonl",
            [
                {"prompt": f"say {pick(i, 1)}", "chosen": f"good {pick(i, i % 4)}", "rejected": f"bad {pick(i, i % 3)}"}
                for i in range(36)
            ],
        ),
        "prompts": _write(folder / "prompts.jsonl", [{"prompt": f"say {pick(i, 1 + i % 4)}"} for i in range(20)]),
        "text": _write(folder / "text.jsonl", [{"text": pick(i, 2 + i % 6)} for i in range(20)]),
    }


@pytest.fixture(scope="session")
def make_config(records: dict[str, str], tiny_lm: Path, tiny_rm: Path) -> Callable[..., dict[str, Any]]:
    """(command, run_dir, ranks, zero_stage) → a configuration as YAML would hold it."""

    def make(command: str, run_dir: Path, ranks: int = 1, zero_stage: int = 2, cluster: str = "ray") -> dict[str, Any]:
        trained = {
            "precision": "fp32",
            "num_ranks": ranks,
            "zero_stage": zero_stage,
            "micro_batch_size": 3,
            "optimizer": {"learning_rate": 1e-3, "warmup_fraction": 0.1},
        }
        common: dict[str, Any] = {"run_dir": str(run_dir), "cluster": cluster, "device": "cpu"}
        if command == "sft":
            source = {"path": records["instructions"], "kind": "instruction"}
            return common | {
                "model": trained | {"model_path": str(tiny_lm)},
                "data": {"train": [source], "eval_fraction": 0.2, "max_length_tokens": 64},
                "sft": {"batch_size": 5, "num_steps": 4},
            }
        if command == "reward":
            source = {"path": records["preferences"], "kind": "preference"}
            return common | {
                "model": trained | {"model_path": str(tiny_lm)},
                "data": {"train": [source], "eval_fraction": 0.2, "max_length_tokens": 64},
                "reward": {"batch_size": 5, "num_steps": 4},
            }
        prompts = {"path": records["prompts"], "kind": "prompt"}
        return common | {
            "policy": trained | {"model_path": str(tiny_lm)},
            "value": trained,
            "reference": {"precision": "fp32", "num_ranks": ranks, "zero_stage": 3 if zero_stage == 3 else 0},
            "reward": {"model_path": str(tiny_rm), "precision": "fp32"},
            "rollout": {"max_response_tokens": 6, "batch_size": 4, "num_ranks": ranks},
            "data": {
                "prompts": [prompts],
                "eval_prompts": [prompts | {"limit": 5}],
                "ptx": [{"path": records["text"], "kind": "text"}],
                "max_length_tokens": 64,
            },
            "ppo": {
                "num_iterations": 3,
                "prompts_per_iteration": 6,
                "mini_batch_size": 3,
                "ptx_coef": 0.5,
                "ptx_batch_size": 3,
                "missing_eos_penalty": 0.1,
            },
        }

    return make
