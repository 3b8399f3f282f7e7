"""PPO with a reward model of another chat template: its scores are those that plain transformers gives the text in that template."""

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


@pytest.mark.parametrize("template", ["own", "policy"])
def test_scores(make_config: Any, tmp_path: Path, template: str):
    path = save_tiny_rm(tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = OWN
    tokenizer.save_pretrained(path)
    made = make_config("ppo", tmp_path / "run", cluster="inline")
    made["reward"]["model_path"] = str(path)
    made["ppo"] |= {"num_iterations": 1, "reward_template": template, "missing_eos_penalty": 0.0}
    run_ppo(PPOConfig.model_validate(made))

    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    policy_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    [file] = [file for file in sorted((tmp_path / "run" / "samples").iterdir()) if "eval" not in file.name][:1]
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert samples
    for sample in samples:
        chat = [{"role": "user", "content": sample["prompt"]}]
        if template == "own":
            text = f"[user] {sample['prompt']}[assistant] {sample['response']}"
        else:
            text = policy_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            text += sample["response"]
        text += tokenizer.eos_token if sample["finish_reason"] == "eos" else ""
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            score = float(model(**ids).logits[0, 0])
        assert sample["score"] == pytest.approx(score, abs=2e-4)
