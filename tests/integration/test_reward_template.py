"""PPO with a reward model of another chat template: scores are what plain transformers gives the text in that template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import save_tiny_rm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_dist.ppo.build import run_ppo
from rlhf_dist.ppo.config import PPOConfig

OWN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
OWN += "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
OWN += "{% if add_generation_prompt %}[assistant] {% endif %}"


def test_scores(make_config: Any, records: dict[str, str], tmp_path: Path):
    path = save_tiny_rm(tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = OWN
    tokenizer.save_pretrained(path)
    made = make_config("ppo", tmp_path / "run", cluster="inline")
    made["reward"]["model_path"] = str(path)
    made["ppo"] |= {"num_iterations": 1, "missing_eos_penalty": 0.0}
    run_ppo(PPOConfig.model_validate(made))

    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    prompts = [json.loads(line)["prompt"] for line in Path(records["prompts"]).read_text(encoding="utf-8").splitlines()]
    [file, *_] = sorted((tmp_path / "run" / "samples").iterdir())
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(samples) > 1
    for sample in samples:
        said = max((prompt for prompt in prompts if prompt in sample["prompt"]), key=len)
        text = f"[user] {said}[assistant] {sample['response']}" + ("" if sample["truncated"] else tokenizer.eos_token)
        with torch.no_grad():
            score = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item()
        assert sample["score"] == pytest.approx(score, abs=2e-4)
