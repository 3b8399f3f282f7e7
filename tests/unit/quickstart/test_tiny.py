"""Tokenizer and model of the quickstart: deterministic, lossless, loadable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.quickstart.tiny_model import create_tiny_model, save_tiny_model
from rlhf_dist.quickstart.tokenizer import train_tokenizer, training_texts

TEXTS = ["calm is good; cool, calming, crime.", "Write three words that start like this.\n\ncalm"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.mark.parametrize("text", [*TEXTS[:2], "Tiếng Việt, 漢字 🙂", " two  spaces ;, \n\n", "calm, calm; calm"])
def test_any_text_survives_a_round_trip(tokenizer, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_padding_is_not_the_end_of_a_response(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_listed_word_has_the_tokens_it_has_at_the_start_of_a_line(tokenizer):
    ids = {text: tokenizer(text)["input_ids"] for text in ("calm", ", ", "calm, calm")}
    assert ids["calm, calm"] == ids["calm"] + ids[", "] + ids["calm"]


def test_the_tokenizer_is_a_function_of_the_texts(tokenizer):
    assert train_tokenizer(TEXTS, vocab_size=300).get_vocab() == tokenizer.get_vocab()


def test_the_model_is_a_function_of_the_seed(tokenizer):
    before = torch.random.get_rng_state()
    first, same, other = (create_tiny_model(tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_saved_model_is_loaded_by_transformers(tokenizer, tmp_path: Path):
    num_parameters = save_tiny_model(tmp_path, tokenizer, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == num_parameters < 3_000_000
    assert model.config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id
    expected = create_tiny_model(tokenizer, 0).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_instructions_are_laid_out_by_the_chat_template(tokenizer):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{{ eos_token }}"
    rows = [{"text": "plain"}, {"instruction": "Name one.", "input": "calm", "output": "cool."}]
    assert list(training_texts(rows, template)) == ["plain", "[user]Name one.\n\ncalm[assistant]cool."]
