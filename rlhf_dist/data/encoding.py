"""Conversations, prompts and texts → token ids and loss masks.

A conversation is rendered whole and tokenized once; the character offsets of that tokenization say which tokens belong to
assistant turns. Tokenizing a prompt and its response separately gives other tokens at the boundary than the model sees in
use, and a loss mask that is off by the difference.

What people wrote is text: where it spells a special token, that place is tokenized by itself as text, so that nobody can forge
the end of a turn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain, pairwise
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_dist.core.errors import DataError
from rlhf_dist.data.chat_template import Message, stop_token_ids
from rlhf_dist.data.rendering import Rendered, Span, render_conversation, render_prompt
from rlhf_dist.data.special_tokens import special_pattern

Encoded = tuple[list[int], list[bool]]
"""Token ids of a sequence and its loss mask."""


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    targets: Collection[int] | None = None,
    tools: Sequence[Any] = (),
) -> Encoded:
    """Ids of a conversation up to its last target, and its loss mask.

    Targets are the tokens that contain any character of an assistant turn of `targets` (None: all) or of the token that ends
    it. The last id is EOS or the template's end-of-turn token: EOS is appended where a template ends turns with neither, and
    white space that a template renders after it is dropped. What follows the last target is dropped. The mask is never True
    at 0.

    Raises:
        DataError: as `render_conversation`.
    """
    [encoded] = encode_rendered(tokenizer, [render_conversation(tokenizer, messages, targets, tools)])
    if isinstance(encoded, DataError):
        raise encoded
    return encoded


def encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered]) -> list[Encoded | DataError]:
    """Ids and loss masks of rendered conversations, tokenized in one call; a `DataError` in place of an invalid one."""
    stops = stop_token_ids(tokenizer)
    return [
        _masked(ids, offsets, one, stops)
        for (ids, offsets), one in zip(_tokenized(tokenizer, rendered), rendered, strict=True)
    ]


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered]
) -> list[tuple[list[int], Sequence[Span]]]:
    """Ids and the characters of each."""
    whole = [one.text for one in rendered if not one.literals]
    found: Any = {"input_ids": [], "offset_mapping": []}
    if whole:
        found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    plain = iter(zip(found["input_ids"], found["offset_mapping"], strict=True))
    return [_in_pieces(tokenizer, one) if one.literals else next(plain) for one in rendered]


def _in_pieces(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> tuple[list[int], list[Span]]:
    """As `_tokenized`, where some of the text spells special tokens and is none."""
    ids: list[int] = []
    offsets: list[Span] = []
    # A literal is cut behind its first character: only special tokens can be told to be split, and not every turn mark is one.
    borders = [0, *(at for start, end in rendered.literals for at in (start, start + 1, end)), len(rendered.text)]
    for number, (start, end) in enumerate(pairwise(borders)):
        found = _piece(tokenizer, rendered.text, start, end, is_literal=number % 3 > 0)
        ids += [one for one, _ in found]
        offsets += [span for _, span in found]
    return ids, offsets


def _piece(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int, *, is_literal: bool
) -> list[tuple[int, Span]]:
    """(id, characters) of each token of `text[start:end]`, as they are inside of a text.

    Some tokenizers begin a text as if a space stood before it (SentencePiece's dummy prefix), so a piece is tokenized behind
    some character, whose token is taken away again; one that no token of the piece has a part of.
    """
    if start == end:
        return []
    for before in (text[start - 1], "\n", "a", "0", "?") if start else ():
        found = _ids_and_offsets(tokenizer, before + text[start:end], is_literal)
        kept = [(one, (first, last)) for one, (first, last) in found if last > 1]
        if all(first >= 1 for _, (first, _) in kept):
            return [(one, (start + first - 1, start + last - 1)) for one, (first, last) in kept]
    found = _ids_and_offsets(tokenizer, text[start:end], is_literal)
    return [(one, (start + first, start + last)) for one, (first, last) in found]


def _ids_and_offsets(tokenizer: PreTrainedTokenizerBase, text: str, is_literal: bool) -> list[tuple[int, Span]]:
    found: Any = tokenizer(
        text, add_special_tokens=False, split_special_tokens=is_literal, return_offsets_mapping=True, verbose=False
    )
    return list(zip(found["input_ids"], found["offset_mapping"], strict=True))


def _masked(
    ids: Sequence[int], offsets: Sequence[Span], rendered: Rendered, stops: Sequence[int]
) -> Encoded | DataError:
    ids = list(ids)
    if not ids or ids[-1] not in stops:
        return DataError(
            f"the rendered conversation ends in {rendered.text[-20:]!r}, which does not tokenize to an end-of-turn "
            "token; make the template end assistant turns with eos_token"
        )
    mask = _mask(offsets, rendered.spans)
    mask[0] = False
    if not any(mask):
        return DataError(
            f"the conversation {rendered.text[:40]!r} is one token, so nothing comes before its response; let the chat "
            "template mark the turns"
        )
    return ids, mask


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any] = ()
) -> list[int]:
    """Ids of a conversation up to where the assistant's response begins.

    Raises:
        DataError: messages that the template does not support, or a prompt of no tokens.
    """
    rendered = render_prompt(tokenizer, messages, tools)
    [(ids, _)] = _tokenized(tokenizer, [rendered])
    if not ids:
        raise DataError(f"the prompt {rendered.text[:40]!r} tokenizes to nothing; give it text")
    return list(ids)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a plain text: the tokenizer's own special tokens at its beginning (BOS, if it adds one), one EOS at its end.

    Raises:
        DataError: a text of no tokens.
    """
    eos = cast(int, tokenizer.eos_token_id)  # `load_tokenizer` requires one
    text = text.removesuffix(str(tokenizer.eos_token))  # the end of a text, where one writes it out
    ids: list[int]
    if literals := tuple(found.span() for found in special_pattern(tokenizer).finditer(text)):
        # Piece by piece, for turn marks that are no special tokens to the tokenizer are not split by `split_special_tokens`.
        ids = [*_beginning(tokenizer), *_in_pieces(tokenizer, Rendered(text, (), literals))[0]]
    else:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
    if ids and ids[-1] == eos:
        ids.pop()
    if not ids:
        raise DataError(f"the text {text[:40]!r} tokenizes to nothing; give it text")
    return [*ids, eos]


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer begins a text with."""
    ids, own = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    return list(ids[: ids.index(own[0])])


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """True for tokens that contain any character of a span.

    Some tokenizers trim a token's leading space off its offsets, so a token extends back to the end of the previous one.
    The tokens of a character that takes several all report that character.
    """
    if not offsets or not spans:
        return [False] * len(offsets)
    starts, ends = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2).T
    reached = np.maximum.accumulate(np.concatenate(([0], ends[:-1])))
    starts = np.minimum(starts, reached)
    span_starts, span_ends = np.asarray(spans, dtype=np.int64).T
    which = np.searchsorted(span_ends, starts, side="right")  # the first span that ends behind the token's start
    known = which < len(spans)
    return (known & (ends > span_starts[np.minimum(which, len(spans) - 1)])).tolist()
