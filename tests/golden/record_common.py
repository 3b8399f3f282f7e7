"""Tiny random Llamas, their prompts, and how numbers are written: what the recorders of golden fixtures share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
import transformers
import trl  # pyright: ignore[reportMissingImports]
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
PAD, EOS, VOCAB_SIZE = 0, 1, 12
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
TRAINING = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCAB_SIZE)}
    core = Tokenizer(models.WordLevel(words, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="w2", padding_side="left"
    )


def language_model(seed: int) -> LlamaForCausalLM:
    """Its head has a bias, so that it never samples the pad token (which TRL would take for the end of a response)."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    bias = torch.zeros(VOCAB_SIZE)
    bias[PAD], bias[EOS] = -30.0, 0.5
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


def score_model(seed: int) -> LlamaForSequenceClassification:
    sizes: dict[str, Any] = SIZES | {"num_labels": 1}
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(**sizes))


def prompts(num: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB_SIZE, size=rng.integers(2, 6)).tolist() for _ in range(num)]


def plain(value: Any) -> Any:
    """Tensors as lists; fp32 numbers as the shortest decimals that read back the same."""
    if isinstance(value, torch.Tensor):
        value = value.detach().float().numpy() if value.is_floating_point() else value.numpy()
    if isinstance(value, np.ndarray):
        return [plain(v) for v in value] if value.ndim else plain(value[()])
    if isinstance(value, np.floating):
        return float(str(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def save(name: str, content: dict[str, Any]) -> None:
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    path = HERE / name
    path.write_text(json.dumps({"versions": versions} | plain(content), separators=(",", ":")) + "\n")
    print(f"{path.name}: {path.stat().st_size} bytes")
