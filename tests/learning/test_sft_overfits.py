"""SFT learns a small set by heart: nothing between the records and the weights keeps the loss up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.sft.build import run_sft
from rlhf_dist.sft.config import SFTConfig

ANSWERS = {
    "Name a color.": "red",
    "Name a town.": "Huế, by the river",
    "Count to three.": "one two three",
    "Say nothing much.": "well, well, well",
    "Name a tree.": "lime",
    "Translate: xin chào": "hello",
    "Opposite of calm?": "crime",
    "Spell it.": "c o o l",
}


@pytest.fixture
def run_dir(tiny_lm: Path, tmp_path: Path) -> Path:
    """A finished run that ends with an evaluation on what it was trained on."""
    records = tmp_path / "records.jsonl"
    rows = [json.dumps({"instruction": question, "output": answer}) for question, answer in ANSWERS.items()]
    records.write_text("\n".join(rows), encoding="utf-8")
    source = {"path": str(records), "kind": "instruction"}
    config = {
        "run_dir": str(tmp_path / "run"),
        "cluster": "inline",
        "device": "cpu",
        "model": {
            "model_path": str(tiny_lm),
            "precision": "fp32",
            "zero_stage": 0,
            "micro_batch_size": 4,
            "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0},
        },
        "data": {"train": [source], "eval": [source], "max_length_tokens": 96},
        "sft": {"batch_size": 8, "num_steps": 80},
    }
    run_sft(SFTConfig.model_validate(config))
    return tmp_path / "run"


def test_a_small_set_is_learnt_by_heart(run_dir: Path):
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    before, after = summary["before"]["eval_loss"], summary["after"]["eval_loss"]
    print(f"loss from {before:.3f} to {after:.5f} nats a token; uniform would be {math.log(300):.2f}")
    assert before > 3
    assert after < 0.01
    # What it says, read with plain transformers, is what it was taught, to the end of the text.
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    for question, answer in ANSWERS.items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            said = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert said[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(said, skip_special_tokens=True) == answer
