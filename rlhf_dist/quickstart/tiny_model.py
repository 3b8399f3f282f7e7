"""A randomly initialized Llama, small enough to be trained from nothing on two CPU cores in under a minute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_dist.core.random import derived_seed
from rlhf_dist.quickstart.tokenizer import EOS, PAD


@dataclass(frozen=True)
class TinyShape:
    """Architecture of the tiny model."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 2
    num_heads: int = 4
    max_positions: int = 256


def create_tiny_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, shape: TinyShape | None = None
) -> LlamaForCausalLM:
    """An fp32 Llama with tied embeddings over the tokenizer's vocabulary; weights are a function of `seed` and `shape`.

    The caller's torch generator is left as it was.
    """
    shape = shape or TinyShape()
    pad, eos = (tokenizer.get_vocab()[token] for token in (PAD, EOS))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=eos,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "starter/tiny_model", 0))
        return LlamaForCausalLM(config)


def save_tiny_model(path: Path, tokenizer: PreTrainedTokenizerFast, seed: int, shape: TinyShape | None = None) -> int:
    """Create the model and write it with its tokenizer in Hugging Face format; returns the number of parameters."""
    model = create_tiny_model(tokenizer, seed, shape)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return sum(p.numel() for p in model.parameters())
