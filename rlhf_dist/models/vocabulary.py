"""Token ids and embedding rows: every id needs a row, and a row without a token is never drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.core.errors import ModelError


def num_token_ids(tokenizer: Any) -> int:
    """One more than the largest id that the tokenizer gives."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def check_embeddings(config: Any, tokenizer: Any, role: str, remedy: str) -> None:
    """Raise ModelError where ids of the tokenizer have no row in the embeddings that the model's `config` describes."""
    rows, ids = config.get_text_config().vocab_size, num_token_ids(tokenizer)
    if ids > rows:
        raise ModelError(
            f"the {role} model at {config.name_or_path!r} has embeddings for {rows} tokens but the tokenizer gives ids up to "
            f"{ids - 1}; {remedy}"
        )


def grown(weight: Tensor, rows: int) -> nn.Parameter:
    """[V, ...] → [rows, ...]: the new rows are the mean of the old ones.

    Rows drawn at random would give new tokens more than their share of the probability (Hewitt 2021, "Initializing new word
    embeddings for pretrained language models").
    """
    mean = weight.detach().float().mean(0, keepdim=True).to(weight.dtype)
    more = mean.expand(rows - weight.shape[0], *weight.shape[1:])
    return nn.Parameter(torch.cat([weight.detach(), more]), requires_grad=weight.requires_grad)
