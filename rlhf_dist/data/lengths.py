"""Sequences at the length limit, as `on_too_long` says."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_dist.config.data import DataSettings
from rlhf_dist.core.errors import DataError, TooLongError
from rlhf_dist.data.encoding import Encoded


def all_targets(ids: list[int]) -> Encoded:
    """Every token is a target but the first, which nothing predicts."""
    return ids, [False] + [True] * (len(ids) - 1)


def fit_text(ids: list[int], settings: DataSettings) -> list[Encoded]:
    """A plain text as sequences of at most `max_length_tokens`.

    `truncate` chunks it without loss: each chunk begins with the last token of the previous one, since a sequence's first
    token is never a target. `skip` gives [].

    Raises:
        TooLongError: it is longer, under `error`.
        DataError: a limit below 2, under `truncate`.
    """
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


def fit(
    encoded: Encoded, settings: DataSettings, response_tokens: int | None = None
) -> list[tuple[list[int], list[bool], bool]]:
    """[(ids, mask, was truncated)] of a conversation at `max_length_tokens`; [] where it is skipped.

    Args:
        encoded: of the conversation.
        settings: what happens to one that is longer.
        response_tokens: `truncate_left`: what the prompt leaves room for, if that is less than half of the limit; None: what
            follows it.

    Raises:
        TooLongError: it is longer, under `error`.
        DataError: its prompt alone is longer, under `truncate`: prompts are never truncated.
    """
    ids, mask = encoded
    limit = settings.max_length_tokens
    if len(ids) <= limit:
        return [(ids, mask, False)]
    if settings.on_too_long == "skip":
        return []
    if settings.on_too_long == "error":
        raise _too_long(len(ids), limit)
    prompt_tokens = mask.index(True)
    if settings.on_too_long == "truncate_left":
        room = len(ids) - prompt_tokens if response_tokens is None else response_tokens
        first = max(0, prompt_tokens - _room(limit, room))
        ids, mask = ids[first:], mask[first:]
        if len(ids) <= limit:
            return [(ids, mask, True)]
    elif prompt_tokens >= limit:
        raise DataError(
            f"the prompt alone has {prompt_tokens} tokens, which leaves no token for a response in max_length_tokens "
            f"{limit}, and prompts are never truncated; raise max_length_tokens, shorten the prompt, or set on_too_long to "
            "skip or truncate_left"
        )
    # What is left of a later prompt after the last target would only be computed, never learnt from.
    end = limit - mask[:limit][::-1].index(True)
    return [(ids[:end], mask[:end], True)]


def longest_response(encoded: Sequence[Encoded]) -> int:
    """Tokens from the first target on, of the conversation that has most of them."""
    return max((len(ids) - mask.index(True) for ids, mask in encoded), default=0)


def prompt_room(encoded: Sequence[Encoded], limit: int) -> int:
    """Tokens that `truncate_left` leaves to the prompt of these responses: what the longest does not take of `limit`, or half
    of it if that is more."""
    return _room(limit, longest_response(encoded))


def _room(limit: int, response_tokens: int) -> int:
    return max(limit - response_tokens, limit // 2, 1)


def fit_prompt(ids: list[int], settings: DataSettings) -> list[list[int]]:
    """[`ids`] of a prompt; [] where it is longer than `max_length_tokens`, under `skip`.

    Raises:
        TooLongError: it is longer, under `error`.
        DataError: it is longer, under `truncate`: prompts are never truncated.
    """
    if len(ids) <= settings.max_length_tokens:
        return [ids]
    if settings.on_too_long == "skip":
        return []
    if settings.on_too_long == "truncate_left":
        return [ids[-settings.max_length_tokens :]]
    raise (TooLongError if settings.on_too_long == "error" else DataError)(
        f"the prompt has {len(ids)} tokens, more than the {settings.max_length_tokens} that data.max_length_tokens "
        "leaves beside rollout.max_response_tokens; raise the first, lower the second, shorten the prompt, "
        "or set on_too_long to skip or truncate_left"
    )


def _too_long(num_tokens: int, limit: int) -> TooLongError:
    return TooLongError(
        f"the record has {num_tokens} tokens, more than max_length_tokens {limit}; raise it, shorten the record, or "
        "set on_too_long to truncate or skip"
    )
