"""SFT, reward model and PPO on real Ray actors and real ZeRO ranks; the result is the same wherever the models live."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import metrics, weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.config.hosting import RayConfig
from rlhf_dist.distributed.ray.session import RaySession
from rlhf_dist.ppo.build import run_ppo
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.reward.build import run_reward
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.sft.build import run_sft
from rlhf_dist.sft.config import SFTConfig

pytestmark = [pytest.mark.timeout(600)]
COMMANDS = {
    "sft": (SFTConfig, run_sft),
    "reward": (RewardConfig, run_reward),
    "ppo": (PPOConfig, run_ppo),
}
Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    """One private Ray for the runs of this module."""
    ray_session = RaySession(RayConfig(), "cpu")
    yield ray_session
    ray_session.close()


def run(command: str, config: dict[str, Any], session: Any = None) -> dict[str, Any]:
    schema, runner = COMMANDS[command]
    return runner(schema(**config), session)


@pytest.fixture(scope="module")
def inline_runs(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each trainer once in this process with one rank: what every other layout is compared with."""
    folder = tmp_path_factory.mktemp("inline")
    for command in COMMANDS:
        run(command, make_config(command, folder / command, zero_stage=2, cluster="inline"))
    return {command: folder / command for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_ray_with_one_rank_repeats_inline_bit_for_bit(
    command: str, make_config: Make, inline_runs: dict[str, Path], session: RaySession, tmp_path: Path
) -> None:
    run(command, make_config(command, tmp_path / "run", zero_stage=2), session)
    expected, found = weights(inline_runs[command]), weights(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert metrics(tmp_path / "run") == metrics(inline_runs[command])


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("command", COMMANDS)
def test_two_zero_ranks_on_ray_follow_the_same_trajectory(
    command: str, zero_stage: int, make_config: Make, inline_runs: dict[str, Path], session: RaySession, tmp_path: Path
) -> None:
    run(command, make_config(command, tmp_path / "run", ranks=2, zero_stage=zero_stage), session)
    expected, found = weights(inline_runs[command]), weights(tmp_path / "run")
    assert expected.keys() == found.keys()
    # The learning rate is 1e-3 and there are 4 to 12 steps: a wrong gradient moves parameters by up to 1e-2.
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for (step, line), (expected_step, expected_line) in zip(
        metrics(tmp_path / "run"), metrics(inline_runs[command]), strict=True
    ):
        assert (step, line.keys()) == (expected_step, expected_line.keys())
        assert line == pytest.approx(expected_line, abs=2e-3, rel=2e-3, nan_ok=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_saved_models_load_with_plain_transformers(command: str, inline_runs: dict[str, Path]) -> None:
    auto = AutoModelForSequenceClassification if command == "reward" else AutoModelForCausalLM
    model, info = auto.from_pretrained(inline_runs[command] / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_training_moves_the_numbers_it_is_meant_to_move(inline_runs: dict[str, Path]) -> None:
    summaries = {c: json.loads((path / "summary.json").read_text()) for c, path in inline_runs.items()}
    assert summaries["sft"]["after"]["eval_loss"] < summaries["sft"]["before"]["eval_loss"]
    assert summaries["reward"]["after"]["eval_margin"] > summaries["reward"]["before"]["eval_margin"]
    ppo_lines = metrics(inline_runs["ppo"])
    assert [step for step, _ in ppo_lines] == [0, 1, 2, 3]
    # Before the first update the policy is the reference, and its rollouts came from the same weights.
    assert ppo_lines[1][1]["kl/ref_mean"] == pytest.approx(0, abs=1e-4)
    assert ppo_lines[1][1]["rollout/logprob_mismatch"] < 1e-4
    assert len((inline_runs["ppo"] / "eval" / "step_000003.jsonl").read_text().splitlines()) == 5
