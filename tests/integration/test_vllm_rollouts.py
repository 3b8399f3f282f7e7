"""PPO with vLLM rollouts follows the run with `hf` rollouts: every token of every response, whatever the engines' layout."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import metrics, weights
from support.tiny import save_tiny_lm

from rlhf_dist.config.hosting import RayConfig
from rlhf_dist.distributed.ray.session import RaySession
from rlhf_dist.ppo.build import run_ppo
from rlhf_dist.ppo.config import PPOConfig

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
LORA = {"rank": 4, "alpha": 8}
CASES = {
    # policy, rollout
    "two engines, ZeRO-3": ({"num_ranks": 2, "zero_stage": 3}, {"num_ranks": 2}),
    "tensor parallelism 2, tied": ({"zero_stage": 2}, {"num_ranks": 2, "tensor_parallel_size": 2}),
    "LoRA, ZeRO-3": ({"num_ranks": 2, "zero_stage": 3, "lora": LORA}, {}),
}


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    ray_session = RaySession(RayConfig(), "cpu")
    yield ray_session
    ray_session.close()


@pytest.mark.parametrize("case", CASES)
def test_the_run_of_hf_token_for_token(
    case: str, make_config: Callable[..., dict[str, Any]], session: RaySession, tmp_path: Path
) -> None:
    policy, rollout = CASES[case]
    # Heads as wide as vLLM's attention wants them on CPUs.
    lm = save_tiny_lm(tmp_path / "lm", num_attention_heads=2, tie_word_embeddings="tied" in case)
    folders = {}
    for engine, placement in (("hf", {}), ("vllm", rollout)):
        config = make_config("ppo", tmp_path / engine)
        config["policy"] |= {"model_path": str(lm), "num_ranks": 1, "zero_stage": 2} | policy
        config["rollout"] = {"max_response_tokens": 12, "engine": engine, "temperature": 0.9, **placement}
        config["data"]["max_length_tokens"] = 96
        config["ppo"] |= {"num_iterations": 3, "eval_every_iterations": 1}
        config["tracking"] = {"num_samples": 6}
        run_ppo(PPOConfig(**config), session)
        folders[engine] = tmp_path / engine
    samples = {engine: sorted((folder / "samples").rglob("*.jsonl")) for engine, folder in folders.items()}
    assert [file.name for file in samples["hf"]] == [file.name for file in samples["vllm"]]
    for mine, theirs in zip(samples["vllm"], samples["hf"], strict=True):
        rows, expected = ([json.loads(line) for line in file.read_text().splitlines()] for file in (mine, theirs))
        assert [row["response"] for row in rows] == [row["response"] for row in expected], mine.name
    # The weights moved, by far more than they differ.
    found, reference = weights(folders["vllm"]), weights(folders["hf"])
    for name in reference:
        torch.testing.assert_close(found[name], reference[name], atol=2e-4, rtol=1e-3)
    for (_, line), (_, other) in zip(metrics(folders["vllm"]), metrics(folders["hf"]), strict=True):
        for name in ("rollout/response_length_mean", "reward/score_mean", "kl/ref_mean"):
            if name in other:
                assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name


def test_the_run_of_hf_with_inline_hosting(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """In this process, beside DeepSpeed."""
    lm = save_tiny_lm(tmp_path / "lm", num_attention_heads=2)
    lengths = {}
    for engine in ("hf", "vllm"):
        config = make_config("ppo", tmp_path / engine, cluster="inline")
        config["policy"] |= {"model_path": str(lm)}
        config["rollout"] |= {"engine": engine}
        run_ppo(PPOConfig(**config))
        lengths[engine] = [line.get("rollout/response_length_mean") for _, line in metrics(tmp_path / engine)]
    assert lengths["vllm"] == lengths["hf"]
