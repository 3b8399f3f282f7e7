"""Checks of what a chat template drops: messages, calls of tools, tools, reasoning, parts of an answer.

A row pays for them with a search of its text. It is rendered once more only where something is not found as it was written, or
where the template was seen to drop a message in a conversation of the same roles.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_dist.core.errors import DataError
from rlhf_dist.data.chat_template import CALL_ID, NEUTRAL_TOOLS, Message, calls_of, opening, render, template_for

_Shape = tuple[Any, ...]
"""What a template may look at in a message, but for its texts."""


def check_all_is_rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text: str,
    tools: Sequence[Any],
    *,
    mark: str,
    targets: Collection[int] = (),
    generation_prompt: bool = False,
) -> None:
    """Raise DataError where the template drops a message, calls of tools, tools or reasoning that the conversation has.

    Args:
        tokenizer: with the template.
        messages: of the conversation.
        text: what the template makes of it.
        tools: descriptions of tools.
        mark: in what spells special tokens.
        targets: messages whose content is checked by `check_content`.
        generation_prompt: whether `text` ends with one.
    """
    _check_messages(tokenizer, messages, text, tools, mark, frozenset(targets), generation_prompt)
    thought = [i for i, message in enumerate(messages) if message.get("reasoning_content")]
    if thought:
        # Of the last turn: many templates render that of earlier ones no more.
        until = list(messages[: thought[-1] + 1])
        without = [*until[:-1], {name: value for name, value in until[-1].items() if name != "reasoning_content"}]
        if render(tokenizer, until, tools=tools) == render(tokenizer, without, tools=tools):
            raise _dropped("reasoning_content")
    if tools and render(tokenizer, messages, generation_prompt) == text:
        raise _dropped("tools")


def _dropped(key: str, which: str = "") -> DataError:
    return DataError(
        f"the record has {key}, which the chat template does not render{which}, so they would be lost; set data.template_path "
        "to a template that does, or remove them"
    )


def _check_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text: str,
    tools: Sequence[Any],
    mark: str,
    targets: frozenset[int],
    generation_prompt: bool,
) -> None:
    shapes = tuple(_shape(message) for message in messages)
    template = template_for(tokenizer, tools)
    if not _drops_some(tokenizer, template, shapes, targets, bool(tools), generation_prompt) and _are_found(
        text, messages, targets
    ):
        return
    changed, sentinels = _with_sentinels(messages, targets)
    try:
        shown = render(tokenizer, changed, generation_prompt, tools).casefold()
    except DataError:  # the template looks into the texts
        return
    for sentinel, i, call in sentinels:
        if sentinel not in shown:
            raise _lost(messages[i], i, call, len(messages), mark)


def _lost(message: Message, i: int, call: int | None, num_messages: int, mark: str) -> DataError:
    if call is not None:
        name = [name for name, _ in calls_of(message)][call]
        which = f" (call {call + 1} of message {i + 1}, {name!r})"
        return _dropped("tool_calls", which.replace(mark, "") if mark else which)
    said = message["content"].replace(mark, "") if mark else message["content"]
    remedy = "set data.template_path to a template that does"
    if message["role"] == "system":
        remedy = f"set data.system to merge_into_user, or {remedy}"
    return DataError(
        f"the chat template does not render all of the {message['role']} message {said[:60]!r} (message {i + 1} of "
        f"{num_messages}), so it would be lost; {remedy}, or remove the message"
    )


def _shape(message: Message) -> _Shape:
    content = message["content"]
    return (
        message["role"],
        None if content is None else bool(content.strip()),
        tuple(isinstance(arguments, str) for _, arguments in calls_of(message)),
        tuple(sorted(message.keys() - {"role", "content", "tool_calls"})),
    )


@lru_cache(maxsize=4096)
def _drops_some(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    shapes: tuple[_Shape, ...],
    targets: frozenset[int],
    has_tools: bool,
    generation_prompt: bool,
) -> bool:
    """Whether the template drops something of a conversation of such messages, or does not render one with other texts."""
    messages: list[Message] = []
    for role, has_content, calls, others in shapes:
        message: Message = {name: CALL_ID if name == "tool_call_id" else "x" for name in others}
        message |= {"role": role, "content": None if has_content is None else "x" if has_content else ""}
        if calls:
            message["tool_calls"] = [
                {"type": "function", "id": CALL_ID, "function": {"name": "x", "arguments": "{}" if is_text else {}}}
                for is_text in calls
            ]
        messages.append(message)
    changed, sentinels = _with_sentinels(messages, targets)
    try:
        shown = render(tokenizer, changed, generation_prompt, NEUTRAL_TOOLS if has_tools else ()).casefold()
    except DataError:
        return True
    return any(sentinel not in shown for sentinel, _, _ in sentinels)


def _are_found(text: str, messages: Sequence[Message], targets: Collection[int]) -> bool:
    """Whether contents and calls are in the text as they were written, and in order, so that none is taken for another."""
    at = 0
    for i, message in enumerate(messages):
        content = (message["content"] or "").strip()
        found = text.find(content, at)
        if found < 0 and i not in targets:
            return False
        at = max(at, found + len(content))
        for name, arguments in calls_of(message):
            written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            places = [(text.find(one, at), len(one)) for one in (name, written)]
            if any(place < 0 for place, _ in places):
                return False
            at = max(place + length for place, length in places)
    return True


def _with_sentinels(
    messages: Sequence[Message], targets: Collection[int]
) -> tuple[list[Message], list[tuple[str, int, int | None]]]:
    """(messages with words of their own in their texts, each of these words with its message and call)."""
    found: list[Message] = []
    sentinels: list[tuple[str, int, int | None]] = []

    def sentinel(call: int | None = None) -> str:
        sentinels.append((f"zqword{len(sentinels)}zq", i, call))
        return sentinels[-1][0]

    for i, message in enumerate(messages):
        changed = dict(message)
        if (message["content"] or "").strip() and i not in targets:
            # Of an assistant's earlier turns, reasoning at the beginning may be cut.
            begin = sentinel() if message["role"] != "assistant" else ""
            changed["content"] = begin + message["content"] + sentinel()
        if message.get("tool_calls"):
            changed["tool_calls"] = [
                {**call, "function": {**call["function"], "name": name + sentinel(number), "arguments": arguments}}
                for number, (call, (name, given)) in enumerate(
                    zip(message["tool_calls"], calls_of(message), strict=True)
                )
                for arguments in [_with_argument(given, lambda number=number: sentinel(number))]
            ]
        found.append(changed)
    return found, sentinels


def _with_argument(arguments: Any, sentinel: Any) -> Any:
    if isinstance(arguments, dict):
        return {**arguments, (word := sentinel()): word}
    if isinstance(arguments, str):
        return arguments + sentinel()
    return [*arguments, sentinel()] if isinstance(arguments, list) else arguments


def check_content(message: Message, rendered: str, mark: str) -> None:
    """Raise DataError where the template drops a part of what is to be learnt."""
    content = str(message["content"] or "").strip()
    if content not in rendered:
        said, shown = content.replace(mark, "") if mark else content, rendered.replace(mark, "") if mark else rendered
        raise DataError(
            f"the chat template cuts the assistant's message {said[:60]!r} to {shown.strip()[:60]!r}; put reasoning into "
            "reasoning_content, or set data.template_path to a template that renders the whole message"
        )


def check_reasoning(message: Message, rendered: str, mark: str) -> None:
    """Raise DataError where the template drops the reasoning of a turn that is to be learnt; it may render it before the turn's
    own characters."""
    reasoning = str(message.get("reasoning_content") or "").strip()
    if reasoning not in rendered:
        said = reasoning.replace(mark, "") if mark else reasoning
        raise DataError(
            f"the chat template drops the reasoning_content {said[:60]!r} of a turn that others follow; set data.train_on to "
            "last to train on the last turn of each conversation only, or data.template_path to a template that renders it"
        )


def check_generation_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError where the template ignores `add_generation_prompt` and begins responses with a header: a model in use
    would have to write the header itself."""
    found = opening(tokenizer)
    if found is not None and not found.cue.strip() and found.header.strip():
        raise DataError(
            f"the chat template renders {found.header!r} before a response, but not in a prompt for one; end it with "
            f"{{% if add_generation_prompt %}}{found.header!r}{{% endif %}} (in a copy that data.template_path names)"
        )
