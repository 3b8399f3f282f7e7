"""Conversations, prompts and texts → token ids and loss masks.

A conversation is rendered whole and tokenized once; the character offsets of that tokenization say which tokens belong to
assistant turns. Tokenizing a prompt and its response separately gives other tokens at the boundary than the model sees in
use, and a loss mask that is off by the difference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf_dist.core.errors import DataError

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}, as chat templates take it."""

Encoded = tuple[list[int], list[bool]]
"""Token ids of a sequence and its loss mask."""

Span = tuple[int, int]
"""Characters start..end-1 of a rendered conversation."""

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SENTINEL = "SENTINELRESPONSE"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    """Ends with the stop token of the last assistant turn."""
    spans: tuple[Span, ...]
    """Assistant turns (content and stop token) in `text`, in order, not overlapping."""


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], first_target: int = 0
) -> Encoded:
    """Ids of a conversation up to its last assistant turn, and its loss mask.

    Targets are the tokens that contain any character of an assistant turn or of the token that ends it, for the turns
    from `messages[first_target]` on. The last id is EOS or the template's end-of-turn token: EOS is appended where a
    template ends turns with neither, and white space that a template renders after it is dropped. What follows the last
    assistant turn is dropped, since no target can see it. The mask is never True at 0.

    Raises:
        DataError: no assistant turn, messages that the template does not support, or a template that renders a
            conversation's beginning differently from the conversation (without location: the caller knows it).
    """
    [encoded] = encode_rendered(tokenizer, [render_conversation(tokenizer, messages, first_target)])
    if isinstance(encoded, DataError):
        raise encoded
    return encoded


def encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered]) -> list[Encoded | DataError]:
    """Ids and loss masks of rendered conversations, tokenized in one call; a `DataError` in place of an invalid one."""
    if not rendered:
        return []
    found = tokenizer(
        [one.text for one in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    stops = stop_token_ids(tokenizer)
    return [
        _masked(list(ids), offsets, one, stops)
        for ids, offsets, one in zip(found["input_ids"], found["offset_mapping"], rendered, strict=True)
    ]


def _masked(ids: list[int], offsets: Sequence[Span], rendered: Rendered, stops: Sequence[int]) -> Encoded | DataError:
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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to where the assistant's response begins.

    Raises:
        DataError: messages that the template does not support, or a prompt of no tokens.
    """
    text = _render(tokenizer, messages, generation_prompt=True)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise DataError(f"the prompt {text[:40]!r} tokenizes to nothing; give it text")
    return ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a plain text: the tokenizer's own special tokens at its beginning (BOS, if it adds one), one EOS at its end.

    Raises:
        DataError: a text of no tokens.
    """
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if ids and ids[-1] == _eos(tokenizer):
        ids.pop()
    if not ids:
        raise DataError(f"the text {text[:40]!r} tokenizes to nothing; give it text")
    return [*ids, _eos(tokenizer)]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: EOS, and the chat template's end-of-turn token where that is another."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return list(_stop_token_ids(tokenizer, template, _eos(tokenizer)))


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    return cast(int, tokenizer.eos_token_id)  # `load_tokenizer` requires one


@lru_cache(maxsize=8)
def _stop_token_ids(tokenizer: PreTrainedTokenizerBase, template: str | None, eos: int) -> tuple[int, ...]:
    """Cached, since every conversation asks; the template and EOS are arguments because they can be reassigned."""
    if template is None:
        return (eos,)
    probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _SENTINEL}]
    try:
        after = _render(tokenizer, probe).rpartition(_SENTINEL)[2].strip()
    except DataError:
        return (eos,)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (eos, ids[0]) if ids and ids[0] != eos and ids[0] in special else (eos,)


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], first_target: int = 0
) -> Rendered:
    """Text of a conversation up to its last assistant turn, with the spans of the turns from `first_target` on."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [i for i in turns if i >= first_target]
    if not wanted:
        raise DataError("the conversation has no assistant turn to learn from; add one, or remove the record")
    if turns[0] == 0:
        raise DataError("the conversation begins with an assistant turn; put a user or system message before it")
    messages = messages[: turns[-1] + 1]
    if _GENERATION_TAG.search(tokenizer.get_chat_template()):
        text, spans = _tagged_spans(tokenizer, messages, len(turns))
        spans = spans[len(turns) - len(wanted) :]
    else:
        text = _render(tokenizer, messages)
        spans = [_prefix_span(tokenizer, messages, text, i) for i in wanted]
    return _close_turns(tokenizer, text, spans, messages[-1]["content"])


def _tagged_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], num_turns: int
) -> tuple[str, list[Span]]:
    """Spans that a template marks itself with {% generation %} … {% endgeneration %}."""
    try:
        # What apply_chat_template calls; it keeps the spans to itself. Its annotations miss that they are returned.
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **cast(dict[str, Any], tokenizer.special_tokens_map),
        )
    except TemplateError as err:
        raise _unsupported(err) from err
    [text], [spans] = rendered
    if len(spans) != num_turns:
        raise DataError(
            f"the chat template marks {len(spans)} assistant turns with {{% generation %}} where the conversation "
            f"has {num_turns}; fix the template so that each turn is marked once, or remove the marks"
        )
    return text, list(spans)


def _prefix_span(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str, turn: int) -> Span:
    """Characters by which rendering `messages[:turn + 1]` is longer than the prompt for that turn."""
    before = _render(tokenizer, messages[:turn], generation_prompt=True)
    through = text if turn == len(messages) - 1 else _render(tokenizer, messages[: turn + 1])
    if not text.startswith(through):
        through = through.removesuffix(
            str(tokenizer.eos_token)
        )  # which some templates end a whole conversation with (Phi 3)
    if not (through.startswith(before) and text.startswith(through)):
        raise DataError(
            f"the chat template renders the messages before assistant turn {turn} (message {turn + 1} of "
            f"{len(messages)}) differently when the turn follows, so its tokens cannot be told from the prompt's; mark "
            "assistant turns in the template with {% generation %}, or give a record for each turn"
        )
    return len(before), len(through)


def _close_turns(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[Span], last_content: str) -> Rendered:
    """Extends or shortens every span to its stop token, and the text to the end of the last span.

    Templates render white space after the stop token, which a model that stops there never generates, and some a second stop
    token; some render the stop token outside their {% generation %} marks.
    """
    stops = tuple(str(tokenizer.convert_ids_to_tokens(i)) for i in stop_token_ids(tokenizer))
    closed: list[Span] = []
    has_stop = False
    for start, end in spans:
        body, after = text[start:end].rstrip(), text[end:].lstrip()
        stop = next((s for s in stops if after.startswith(s)), None)
        has_stop = True
        if body.endswith(stops):
            while (shorter := _without_stop(body, stops)).endswith(stops):
                body = shorter
            end = start + len(body)
        elif stop is not None:
            end = len(text) - len(after) + len(stop)
        else:
            has_stop = False
        closed.append((start, end))
    start, end = closed[-1]
    if not has_stop:
        at = text.rfind(last_content, start, end)
        text = text[: at + len(last_content) if at >= 0 else end] + str(tokenizer.eos_token)
        closed[-1] = start, len(text)
    return Rendered(text[: closed[-1][1]], tuple(closed))


def _without_stop(body: str, stops: Sequence[str]) -> str:
    return body.removesuffix(next(stop for stop in stops if body.endswith(stop))).rstrip()


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """True for tokens that contain any character of a span.

    Some tokenizers trim a token's leading space off its offsets, so a token extends back to the end of the previous one.
    The tokens of a character that takes several all report that character.
    """
    mask: list[bool] = []
    which, reached = 0, 0
    for start, end in offsets:
        start = min(start, reached)
        reached = max(reached, end)
        while which < len(spans) and spans[which][1] <= start:
            which += 1
        mask.append(which < len(spans) and start < spans[which][1] and end > spans[which][0])
    return mask


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation_prompt: bool = False) -> str:
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
    except TemplateError as err:
        raise _unsupported(err) from err
    return str(text)


def _unsupported(err: TemplateError) -> DataError:
    return DataError(
        f"the chat template does not support the conversation ({err}); fix the roles and their order, or use another template"
    )
