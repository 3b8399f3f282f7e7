"""What becomes of a sequence that is longer than `max_length_tokens`."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.data import DataSettings
from rlhf_dist.core.errors import DataError, TooLongError
from rlhf_dist.data.encoding import Message, encode_conversation, encode_text
from rlhf_dist.data.records import Preference
from rlhf_dist.data.store import Tally

Encoded = tuple[list[int], list[bool]]
"""Ids and targets of a sequence."""


def all_targets(ids: list[int]) -> Encoded:
    """Every token is trained but the first, which nothing predicts."""
    return ids, [False] + [True] * (len(ids) - 1)


def fit_text(ids: list[int], settings: DataSettings) -> list[Encoded]:
    """A plain text in sequences of `max_length_tokens`. `truncate` cuts it into consecutive ones and loses nothing:
    each begins with the last token of the one before, since a sequence's first token is never a target."""
    limit = settings.max_length_tokens
    if len(ids) <= limit:
        return [all_targets(ids)]
    if settings.on_too_long == "skip":
        return []
    if settings.on_too_long == "error":
        raise _too_long(len(ids), limit)
    if limit < 2:
        raise DataError(f"max_length_tokens {limit} leaves no token to predict; it must be at least 2: raise it")
    return [all_targets(ids[start : start + limit]) for start in range(0, len(ids) - 1, limit - 1)]


def fit(encoded: Encoded, settings: DataSettings, tally: Tally) -> list[Encoded]:
    """[`encoded`], cut to `max_length_tokens` where it is longer and may be; [] where it is to be left out."""
    ids, mask = encoded
    limit = settings.max_length_tokens
    if len(ids) <= limit:
        return [encoded]
    if settings.on_too_long == "skip":
        return []
    if settings.on_too_long == "error":
        raise _too_long(len(ids), limit)
    prompt_tokens = mask.index(True)
    if prompt_tokens >= limit:
        raise DataError(
            f"the prompt alone has {prompt_tokens} tokens, which leaves no room for a response in max_length_tokens "
            f"{limit}, and prompts are never cut; raise max_length_tokens, shorten the prompt, or set on_too_long to "
            "skip"
        )
    tally.num_truncated += 1
    # What is left of a later prompt behind the last target would only be computed, never learnt from.
    end = limit - mask[:limit][::-1].index(True)
    return [(ids[:end], mask[:end])]


@dataclass(frozen=True)
class FittedResponses:
    """What of a prompt's responses can be compared."""

    sequences: list[list[int]]
    """Prompt and response."""
    kept: list[int]
    """Positions of the responses among all of the prompt's."""
    cut: list[bool]
    """Whether a response was cut."""
    response_tokens: list[int]
    """Tokens of each response, its end included."""


def fit_responses(
    tokenizer: PreTrainedTokenizerBase, preference: Preference, settings: DataSettings
) -> FittedResponses:
    """The responses that can be compared, as sequences.

    Left out are those that are too long under `skip`, and those that a better one equals: cutting the ends can make two
    the same, and so can a tokenizer that folds case or accents.
    """
    found = FittedResponses([], [], [], [])
    for i, response in enumerate(preference.responses):
        cut = Tally()
        for ids, mask in fit(_encode(tokenizer, preference.prompt, response), settings, cut):
            if ids not in found.sequences:
                found.sequences.append(ids)
                found.kept.append(i)
                found.cut.append(cut.num_truncated > 0)
                found.response_tokens.append(len(ids) - mask.index(True) if preference.prompt else len(ids))
    return found


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: tuple[Message, ...], response: tuple[Message, ...]) -> Encoded:
    """A continuation with its prompt; without a prompt, as plain text."""
    if prompt:
        return encode_conversation(tokenizer, (*prompt, *response), first_target=len(prompt))
    return all_targets(encode_text(tokenizer, response[-1]["content"]))


def _too_long(num_tokens: int, limit: int) -> TooLongError:
    return TooLongError(
        f"the record has {num_tokens} tokens, more than max_length_tokens {limit}; raise it, shorten the record, or "
        "set on_too_long to truncate or skip"
    )
