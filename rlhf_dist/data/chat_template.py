"""A tokenizer's chat template: rendering with it, and what depends on the template alone, found by rendering once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf_dist.core.errors import DataError

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}, as chat templates take it; an assistant's may have
`tool_calls` and `reasoning_content`, a tool's `tool_call_id` and `name`."""

SENTINEL = "SENTINELRESPONSE"
"""Content that no template looks for."""
CALL_ID = "callid000"
"""Nine letters and digits, which some templates require (Mistral's)."""
NEUTRAL_TOOLS = (
    {
        "type": "function",
        "function": {"name": "x", "description": "x", "parameters": {"type": "object", "properties": {}}},
    },
)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    generation_prompt: bool = False,
    tools: Sequence[Any] = (),
) -> str:
    """The text that the template makes of messages.

    Raises:
        DataError: it does not support them.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=generation_prompt
        )
    except (TemplateError, TypeError) as err:  # a template that adds content of None to a string
        raise unsupported(err) from err
    return str(text)


def unsupported(err: Exception) -> DataError:
    """What a template's own error becomes."""
    return DataError(
        f"the chat template does not support the conversation ({err}); fix the roles and their order, or use another template"
    )


def template_for(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] = ()) -> str:
    """The chat template; a tokenizer may have another for conversations with tools."""
    return tokenizer.get_chat_template(tools=list(tools) or None)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: EOS, and the chat template's end-of-turn token where that is another."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    eos = cast(int, tokenizer.eos_token_id)  # `load_tokenizer` requires one
    return list(_stop_token_ids(tokenizer, template, eos))


@lru_cache(maxsize=8)
def _stop_token_ids(tokenizer: PreTrainedTokenizerBase, template: str | None, eos: int) -> tuple[int, ...]:
    """Cached, since every conversation asks; the template and EOS are arguments because they can be reassigned."""
    if template is None:
        return (eos,)
    probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": SENTINEL}]
    try:
        after = render(tokenizer, probe).rpartition(SENTINEL)[2].strip()
    except DataError:
        return (eos,)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    # Published fine-tunes add turn marks as tokens that are not "special".
    return (eos, ids[0]) if ids and ids[0] != eos and ids[0] in tokenizer.added_tokens_decoder else (eos,)


def stops(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """`stop_token_ids` as they are written."""
    return tuple(str(tokenizer.convert_ids_to_tokens(i)) for i in stop_token_ids(tokenizer))


def without_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Without the EOS token that some templates end a whole conversation with (Phi 3)."""
    return text.removesuffix(str(tokenizer.eos_token))


@dataclass(frozen=True)
class Opening:
    """What comes before a response."""

    cue: str
    """In a prompt for it (`add_generation_prompt`)."""
    header: str
    """In a finished turn, before its content."""

    @property
    def shared(self) -> str:
        """What a finished turn has of the cue."""
        return os.path.commonprefix([self.cue, self.header])  # noqa: RUF071 (characters are meant)


def opening(tokenizer: PreTrainedTokenizerBase) -> Opening | None:
    """What comes before a response to one user message; None where the rendering does not tell."""
    return _opening(tokenizer, template_for(tokenizer))


@lru_cache(maxsize=8)
def _opening(tokenizer: PreTrainedTokenizerBase, template: str) -> Opening | None:
    user = [{"role": "user", "content": "x"}]
    try:
        without = without_eos(tokenizer, render(tokenizer, user))
        before = render(tokenizer, user, generation_prompt=True)
        whole = render(tokenizer, [*user, {"role": "assistant", "content": SENTINEL}])
    except DataError:
        return None
    if SENTINEL not in whole or not (before.startswith(without) and whole.startswith(without)):
        return None
    return Opening(before[len(without) :], whole[len(without) : whole.index(SENTINEL)])


def in_form(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any]) -> Sequence[Message]:
    """The messages with calls of tools in the form that the template renders.

    Most templates take the arguments of a call as a mapping and content as text; others (DeepSeek R1's) add the arguments to a
    string, and look at calls only where the content is None.
    """
    if not any(message.get("tool_calls") for message in messages):
        return messages
    no_text, as_text = _call_form(tokenizer, template_for(tokenizer, tools), bool(tools))
    return [_with_calls(message, no_text, as_text) for message in messages]


@lru_cache(maxsize=8)
def _call_form(tokenizer: PreTrainedTokenizerBase, template: str, has_tools: bool) -> tuple[bool, bool]:
    call = {"type": "function", "id": CALL_ID, "function": {"name": "zqname", "arguments": {"zqkey": "zqvalue"}}}
    probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    lengths: dict[tuple[bool, bool], int] = {}
    for form in ((False, False), (True, False), (True, True), (False, True)):
        messages = [_with_calls(message, *form) for message in probe]
        try:
            text = render(tokenizer, messages, tools=NEUTRAL_TOOLS if has_tools else ())
        except DataError:
            continue
        if all(name in text for name in ("zqname", "zqkey", "zqvalue")):
            lengths[form] = len(text)
    # Of a form that is not meant, something is rendered besides: "None", an empty turn, quotes in quotes.
    return min(lengths, key=lengths.__getitem__, default=(False, False))


def _with_calls(message: Message, no_text: bool, as_text: bool) -> Message:
    if not message.get("tool_calls"):
        return message
    found = dict(message)
    if no_text and not found["content"]:
        found["content"] = None
    if as_text:
        found["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _written(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return found


def _written(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def calls_of(message: Message) -> Iterator[tuple[str, Any]]:
    """(name, arguments) of each call of tools."""
    for call in message.get("tool_calls") or ():
        function: Mapping[str, Any] = call["function"]
        yield function["name"], function["arguments"]
