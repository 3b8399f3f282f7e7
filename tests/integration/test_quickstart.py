"""The quickstart end to end, in this process and with a few steps: whether its account is whole, true to its files, and
repeatable; not what it achieves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.quickstart import run as quickstart
from rlhf_dist.quickstart.gold import gold_score
from rlhf_dist.quickstart.recipes import RECIPES, TINY
from rlhf_dist.quickstart.records import StarterSizes, write_records
from rlhf_dist.reward.config import RewardSettings
from rlhf_dist.sft.config import SFTSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_PROMPTS = 10
SIZES = StarterSizes(
    pretrain=500,
    pretrain_eval=12,
    sft_train=300,
    sft_eval=12,
    pairs_train=100,
    pairs_eval=12,
    prompts_train=40,
    prompts_eval=16,
    ptx=60,
)
SMALL = replace(
    TINY,
    max_response_tokens=10,
    pretrain=SFTSettings(batch_size=16, num_steps=12),
    sft=SFTSettings(batch_size=16, num_steps=8),
    reward=RewardSettings(batch_size=8, num_steps=4),
    ppo=PPOSettings(
        num_iterations=2,
        prompts_per_iteration=8,
        mini_batch_size=4,
        num_epochs=1,
        kl_coef=0.1,
        ptx_coef=0.1,
        ptx_batch_size=4,
    ),
    eval_prompts=NUM_PROMPTS,
    eval_records=12,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, Any]]]:
    """Two runs of one seed: their folders and what `run` returned."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "tiny", SMALL)
        patch.setattr(quickstart, "write_records", lambda path, seed: write_records(path, seed, SIZES))
        return [(folder / name, quickstart.run(folder / name, seed=3, cluster="inline")) for name in ("a", "b")]


def test_the_summary_holds_every_number(runs: list[tuple[Path, dict[str, Any]]]) -> None:
    run_dir, returned = runs[0]
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert summary == json.loads(json.dumps(returned))
    for stage in ("pretrain", "sft"):
        assert 0 < summary[stage]["after"]["eval_loss"] < summary[stage]["before"]["eval_loss"]
    for when in ("before", "after"):
        reward, ppo = summary["reward"][when], summary["ppo"][when]
        assert reward["eval_accuracy"] * 12 == pytest.approx(round(reward["eval_accuracy"] * 12))
        assert {"eval_loss", "eval_margin"} <= set(reward)
        assert ppo["num_prompts"] == NUM_PROMPTS
        assert {"score_mean", "score_sem", "kl_ref_mean", "kl_ref_sem", "response_length_mean"} <= set(ppo)
        gold = summary["ppo"]["gold"][when]
        assert gold["num_responses"] == NUM_PROMPTS
        assert -4 <= gold["gold_mean"] <= 4
        assert gold["gold_stderr"] >= 0
        assert 0 <= gold["real_word_share"] <= 1
    assert summary["reward"]["chance_accuracy"] == 0.5
    assert summary["ppo"]["before"]["kl_ref_mean"] == pytest.approx(0, abs=1e-4), "the policy starts as the SFT model"
    assert summary["ppo"]["after"]["kl_ref_mean"] != pytest.approx(0, abs=1e-4), "and has moved"
    assert {"gain_mean", "gain_stderr", "real_word_share_kept"} <= set(summary["ppo"]["gold"])
    assert len(summary["ppo"]["samples"]) == quickstart.NUM_SAMPLES
    assert {"prepare", "data", "init", "pretrain", "sft", "reward", "ppo", "total"} == set(summary["seconds"])


def test_the_numbers_are_those_of_the_answers(runs: list[tuple[Path, dict[str, Any]]]) -> None:
    run_dir, summary = runs[0]
    lines = (run_dir / "samples" / "before_after.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    held_out = (run_dir / "00_data" / "prompts_eval.jsonl").read_text(encoding="utf-8").splitlines()
    assert [row["prompt"] for row in rows] == [json.loads(line)["prompt"] for line in held_out[:NUM_PROMPTS]]
    for when in ("before", "after"):
        answers = [row[when] for row in rows]
        golds = torch.tensor([gold_score(answer["response"]).valence for answer in answers], dtype=torch.float64)
        gold = summary["ppo"]["gold"][when]
        assert gold["gold_mean"] == pytest.approx(float(golds.mean()))
        assert gold["gold_stderr"] == pytest.approx(float(golds.std()) / NUM_PROMPTS**0.5)
        for name, key in (("score", "score_mean"), ("kl", "kl_ref_mean")):
            mean = sum(answer[name] for answer in answers) / NUM_PROMPTS
            assert summary["ppo"][when][key] == pytest.approx(mean, abs=1e-5)


def test_the_models_load_with_plain_transformers(runs: list[tuple[Path, dict[str, Any]]]) -> None:
    run_dir, _ = runs[0]
    for stage in ("01_pretrain", "02_sft", "04_ppo"):
        model = AutoModelForCausalLM.from_pretrained(run_dir / stage / "model")
        tokenizer = AutoTokenizer.from_pretrained(run_dir / stage / "model")
        assert model.config.vocab_size >= len(tokenizer)
    _, info = AutoModelForSequenceClassification.from_pretrained(
        run_dir / "03_reward" / "model", output_loading_info=True
    )
    assert not info["missing_keys"]


def test_the_same_seed_gives_the_same_numbers(runs: list[tuple[Path, dict[str, Any]]]) -> None:
    first, second = (_without_clock(summary) for _, summary in runs)
    assert first == second


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_clock(v) for k, v in value.items() if k not in ("seconds", "wall_time_s")}
    return [_without_clock(v) for v in value] if isinstance(value, list) else value
