"""What a language model's generation_config.json says: which tokens end a response, and whether transformers can save it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig


def make_savable(config: GenerationConfig) -> None:
    """Switch sampling on where a generation config has settings of it (`temperature`, `top_p`) without `do_sample`.

    Many published models have such a file. transformers reads it, and raises ValueError when it is to save it.
    """
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def stop_tokens(model: Any, known: Iterable[int]) -> list[int]:
    """Ids that end a response: those known from the tokenizer and its chat template, and the model's own.

    Args:
        model: a causal LM; its config and its generation config each may name one id or several.
        known: the first of them stays the first.
    """
    found = list(known)
    for config in (model.config.get_text_config(), model.generation_config):
        ids = config.eos_token_id
        found += [ids] if isinstance(ids, int) else list(ids or ())
    return [i for i in dict.fromkeys(found) if 0 <= i < model.config.get_text_config().vocab_size]


def save_stop_tokens(model: Any, known: Iterable[int]) -> None:
    """Have the saved model stop, in plain `generate`, where its rollouts do."""
    ids = stop_tokens(model, known)
    model.generation_config.eos_token_id = ids[0] if len(ids) == 1 else ids
