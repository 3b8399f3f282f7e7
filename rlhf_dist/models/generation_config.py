"""What a language model's generation_config.json says: which tokens end a response, and whether transformers can save it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from rlhf_dist.core.errors import ModelError

log = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_NAMED = re.compile(r"^- `(\w+)`:", re.MULTILINE)
"""An attribute that a message of `GenerationConfig.validate` is about."""


def make_savable(config: GenerationConfig) -> None:
    """Make a generation config one that transformers saves. Many published models have others, which it reads, and raises
    ValueError for when it is to save them.

    Settings of sampling (`temperature`, `top_p`) where `do_sample` is not set switch it on; where it is off, or the temperature
    is 0, decoding stays greedy without them. Whatever else is invalid gets its default. What changes is named in a warning.
    """
    default, reset = GenerationConfig(), []
    given = [name for name in _SAMPLING if getattr(config, name) is not None]
    if config.temperature == 0 or (config.do_sample is False and _invalid(config) is not None):
        config.do_sample = False
        for name in given:
            setattr(config, name, None)
        reset += given
    elif config.do_sample is None and given and _invalid(config) is not None:
        config.do_sample = True
        log.warning(
            "the model's generation_config.json has %s but no do_sample, and will be saved with do_sample: true",
            ", ".join(given),
        )
    while (reason := _invalid(config)) is not None:
        named = [name for name in _NAMED.findall(reason) if getattr(config, name, None) != getattr(default, name, None)]
        if not named:
            raise ModelError(f"the model's generation_config.json cannot be saved again: {reason}; fix it")
        for name in named:
            setattr(config, name, getattr(default, name))
        reset += named
    if reset:
        log.warning("the model's generation_config.json has invalid %s, which will be saved as unset", ", ".join(reset))


def check_generation_config(path: str) -> None:
    """Reject a folder's generation_config.json that cannot be read, or names ids that are none.

    Raises:
        ModelError: as said.
    """
    file = Path(path) / GENERATION_CONFIG_NAME
    if not file.is_file():
        return
    try:
        config = GenerationConfig.from_pretrained(path)
    except Exception as error:  # whatever a file holds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{file} is invalid: {reason} Fix or remove it") from error
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = getattr(config, name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ModelError(f"{file} has {name} {value!r}, which must be a token id, or a list of them; fix it")


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
