"""What a language model's generation_config.json says: which tokens end a response, and whether transformers can save it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig

from rlhf_dist.core.errors import ModelError

log = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_NAMED = re.compile(r"^- `(\w+)`:", re.MULTILINE)
"""An attribute that a message of `GenerationConfig.validate` is about."""


def make_savable(config: GenerationConfig) -> None:
    """Make a generation config one that transformers saves. Many published models have others, which it reads, and raises
    ValueError for when it is to save them.

    Settings of sampling (`temperature`, `top_p`) without `do_sample` switch it on; a temperature of 0 means greedy decoding and
    switches it off. Whatever else is invalid gets its default, and is named once in a warning.
    """
    if config.temperature == 0:
        config.do_sample = False
        for name in _SAMPLING:
            setattr(config, name, None)
    elif config.do_sample is not True and any(getattr(config, name) is not None for name in _SAMPLING):
        config.do_sample = True
    default, reset = GenerationConfig(), []
    while (reason := _invalid(config)) is not None:
        named = [name for name in _NAMED.findall(reason) if getattr(config, name, None) != getattr(default, name, None)]
        if not named:
            raise ModelError(f"the model's generation_config.json cannot be saved again: {reason}; fix it")
        for name in named:
            setattr(config, name, getattr(default, name))
        reset += named
    if reset:
        log.warning("the model's generation_config.json has invalid %s, which will be saved as unset", ", ".join(reset))


def _invalid(config: GenerationConfig) -> str | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return None


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
