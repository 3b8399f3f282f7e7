"""A tokenizer with tokens that have no embedding is told by every command before anything starts, with the way past."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny import save_tiny_lm, save_tiny_rm, tiny_tokenizer

from rlhf_dist.cli.main import main

Make = Callable[..., list[str]]
TOO_FEW = len(tiny_tokenizer()) - 3


@pytest.fixture
def small(tmp_path: Path) -> dict[str, str]:
    """A language model and a reward model with fewer embeddings than tokens."""
    return {
        "lm": str(save_tiny_lm(tmp_path / "lm", vocab_size=TOO_FEW)),
        "rm": str(save_tiny_rm(tmp_path / "rm", vocab_size=TOO_FEW)),
    }


@pytest.fixture
def arguments(tmp_path: Path) -> Make:
    """`validate COMMAND FILE` of a configuration over two small sets."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "calm"}\n{"text": "good"}\n', encoding="utf-8")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "p", "chosen": "good", "rejected": "bad"}\n' * 2, encoding="utf-8")
    data = {
        "sft": {"train": [{"path": str(text), "kind": "text"}]},
        "reward": {"train": [{"path": str(pairs), "kind": "preference"}]},
        "ppo": {"prompts": [{"path": str(pairs), "kind": "preference"}], "max_length_tokens": 64},
    }

    def make(command: str, **sections: Any) -> list[str]:
        config = {"run_dir": str(tmp_path / "run"), "device": "cpu", "data": {"max_length_tokens": 64} | data[command]}
        sizes = {"ppo": {"prompts_per_iteration": 1, "responses_per_prompt": 1, "mini_batch_size": 1}}
        config[command] = sizes.get(command, {"batch_size": 1})
        file = tmp_path / "run.yaml"
        file.write_text(json.dumps(config | sections), encoding="utf-8")
        return ["validate", command, str(file)]

    return make


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_trained_models(command: str, small: dict[str, str], arguments: Make, capsys: pytest.CaptureFixture[str]):
    model = {"model_path": small["lm"]}
    assert main(arguments(command, model=model)) == 4
    said = capsys.readouterr().err
    assert f"{TOO_FEW} tokens" in said
    assert "model.resize_embeddings" in said
    assert main(arguments(command, model=model | {"resize_embeddings": True})) == 0


def test_every_role_of_ppo(
    small: dict[str, str], tiny_lm: Path, tiny_rm: Path, arguments: Make, capsys: pytest.CaptureFixture[str]
):
    roles = {
        "policy": {"model_path": str(tiny_lm)},
        "reference": {"model_path": str(tiny_lm)},
        "reward": {"model_path": str(tiny_rm)},
        "value": {"model_path": str(tiny_rm)},
    }
    rollout = {"max_response_tokens": 8}
    assert main(arguments("ppo", rollout=rollout, **roles)) == 0
    for role, model in (("policy", "lm"), ("reference", "lm"), ("reward", "rm"), ("value", "rm")):
        capsys.readouterr()
        assert main(arguments("ppo", rollout=rollout, **roles | {role: {"model_path": small[model]}})) == 4
        assert f"the {role} model" in capsys.readouterr().err
    assert (
        main(arguments("ppo", rollout=rollout, **roles | {"policy": roles["policy"] | {"resize_embeddings": True}}))
        == 2
    )


def test_chat(small: dict[str, str], capsys: pytest.CaptureFixture[str]):
    assert main(["chat", small["lm"], "--device", "cpu"]) == 4
    assert f"{TOO_FEW} tokens" in capsys.readouterr().err
