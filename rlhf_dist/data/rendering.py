"""Conversations → text, by the tokenizer's chat template, and which characters of it are what.

Three things are found in the rendered text: the assistant turns (what is trained on), the token that ends each, and special
tokens that only a person's text spells out (`</s>` in a question), which must stay text.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf_dist.core.errors import DataError

log = logging.getLogger(__name__)

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}, as chat templates take it; an assistant's may have
`tool_calls` and `reasoning_content`, a tool's `tool_call_id` and `name`."""

Span = tuple[int, int]
"""Characters start..end-1 of a rendered conversation."""

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SENTINEL = "SENTINELRESPONSE"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    """Ends with the stop token of the last assistant turn (of a prompt: where the response begins)."""
    spans: tuple[Span, ...]
    """Assistant turns to learn from (content and stop token) in `text`, in order, not overlapping."""
    literals: tuple[Span, ...] = ()
    """What spells a special token in `text` and is none."""


def render_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    targets: Collection[int] | None = None,
    tools: Sequence[Any] = (),
    may_cut: bool = False,
) -> Rendered:
    """Text of a conversation up to its last target.

    Args:
        tokenizer: with a chat template.
        messages: of the conversation.
        targets: positions of the assistant messages to learn from; None: all.
        tools: descriptions of tools, for the template.
        may_cut: whether the template may drop a part of what is to be learnt.

    Raises:
        DataError: no assistant turn to learn from, messages that the template does not support, or of which it drops
            something (without location: the caller knows it).
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [i for i in turns if targets is None or i in targets]
    if not wanted:
        raise DataError("the conversation has no assistant turn to learn from; add one, or remove the record")
    if turns[0] == 0:
        raise DataError("the conversation begins with an assistant turn; put a user or system message before it")
    messages = messages[: wanted[-1] + 1]
    turns = [i for i in turns if i <= wanted[-1]]
    mark, messages, tools = _marked(tokenizer, messages, tools)
    if _GENERATION_TAG.search(_template_for(tokenizer, tools)):
        text, spans = _tagged_spans(tokenizer, messages, len(turns), tools)
        spans = [span for turn, span in zip(turns, spans, strict=True) if turn in wanted]
    else:
        text = _render(tokenizer, messages, tools=tools)
        spans = [_turn_span(tokenizer, messages, text, i, tools) for i in wanted]
    _check_all_is_rendered(tokenizer, messages, text, tools)
    before = 0
    for turn, (start, end) in zip(wanted, spans, strict=True) if not may_cut else ():
        _check_content(messages[turn], text[start:end], mark)
        _check_reasoning(messages[turn], text[before:end], mark)
        before = end
    text, spans = _close_turns(tokenizer, text, spans, str(messages[-1]["content"] or ""))
    return _without_marks(tokenizer, text, spans, mark)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any] = ()
) -> Rendered:
    """Text of a conversation up to where the assistant's response begins.

    Raises:
        DataError: messages that the template does not support, or of which it drops something.
    """
    mark, messages, tools = _marked(tokenizer, messages, tools)
    text = _render(tokenizer, messages, generation_prompt=True, tools=tools)
    _check_all_is_rendered(tokenizer, messages, text, tools, generation_prompt=True)
    return _without_marks(tokenizer, text, [], mark)


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
    probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _SENTINEL}]
    try:
        after = _render(tokenizer, probe).rpartition(_SENTINEL)[2].strip()
    except DataError:
        return (eos,)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    # Published fine-tunes add turn marks as tokens that are not "special".
    return (eos, ids[0]) if ids and ids[0] != eos and ids[0] in tokenizer.added_tokens_decoder else (eos,)


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches what spells a special token or a turn mark of the template, the longest first."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _alternatives(tuple(sorted(names | _turn_marks(tokenizer, template), key=lambda name: (-len(name), name))))


@lru_cache(maxsize=8)
def _turn_marks(tokenizer: PreTrainedTokenizerBase, template: str | None) -> frozenset[str]:
    """Added tokens that the template renders around a user's turn, and the one that ends an assistant's; whether they are
    "special" or not. Others of the template (`<think>`, `<tool_call>`) may be written out in data."""
    if template is None:
        return frozenset()
    try:
        around = _render(tokenizer, [{"role": "user", "content": _SENTINEL}])
    except DataError:
        around = ""
    ends = [tokenizer.added_tokens_decoder.get(i) for i in stop_token_ids(tokenizer)]
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return frozenset(
        {token.content for token in ends if token is not None} | {name for name in added if name in around}
    )


@lru_cache(maxsize=8)
def _alternatives(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")


def _marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any]
) -> tuple[str, list[Message], list[Any]]:
    """(mark, messages and tools in which the mark comes after the first character of all that spells a special token), so that
    it can be found after rendering; ("", messages, tools) where nothing does."""
    pattern = special_pattern(tokenizer)
    texts = "".join(_texts([messages, tools]))
    if not pattern.search(texts):
        return "", list(messages), list(tools)
    mark = next(chr(point) for point in range(0xE000, 0xF8FF) if chr(point) not in texts)  # private use

    def change(text: str) -> str:
        return pattern.sub(lambda m: m[0][0] + mark + m[0][1:], text)

    # Roles are checked, and templates compare them.
    marked = [{**_changed(message, change), "role": message["role"]} for message in messages]
    return mark, marked, _changed(list(tools), change)


def _texts(value: Any) -> list[str]:
    """All texts in messages or tools, keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for key, item in value.items() for text in (key, *_texts(item))]
    return [text for item in value for text in _texts(item)] if isinstance(value, (list, tuple)) else []


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _changed(item, change) for key, item in value.items()}
    return [_changed(item, change) for item in value] if isinstance(value, (list, tuple)) else value


def _without_marks(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], mark: str) -> Rendered:
    if not mark:
        return Rendered(text, tuple(spans))
    parts = text.split(mark)
    clean = "".join(parts)
    pattern, literals, at = special_pattern(tokenizer), [], 0
    for part in parts[:-1]:
        at += len(part)
        found = pattern.match(clean, at - 1)
        # A template may have changed the text, and then it spells no special token any more.
        if found is not None and (not literals or literals[-1][1] <= found.start()):
            literals.append(found.span())
    moved = [(start - text.count(mark, 0, start), end - text.count(mark, 0, end)) for start, end in spans]
    return Rendered(clean, tuple(moved), tuple(literals))


def _template_for(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any]) -> str:
    """The chat template; a tokenizer may have another for conversations with tools."""
    return tokenizer.get_chat_template(tools=list(tools) or None)


def _tagged_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], num_turns: int, tools: Sequence[Any]
) -> tuple[str, list[Span]]:
    """Spans that a template marks itself with {% generation %} … {% endgeneration %}."""
    try:
        # What apply_chat_template calls; it keeps the spans to itself. Its annotations miss that they are returned.
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) or None,
            chat_template=_template_for(tokenizer, tools),
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


def _turn_span(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str, turn: int, tools: Sequence[Any]
) -> Span:
    """Characters of an assistant turn: from where the prompt for it ends to where the next message begins.

    Templates render a turn differently when others follow: they drop its reasoning (Qwen 3), or open a block of reasoning in
    the prompt for a turn that a finished turn does not have (DeepSeek R1). What counts is how the whole conversation has it.
    """
    before = _render(tokenizer, messages[:turn], generation_prompt=True, tools=tools)
    start = len(before)
    if not text.startswith(before):
        start = len(os.path.commonprefix([before, text]))  # noqa: RUF071 (characters are meant)
        without_cue = _without_eos(tokenizer, _render(tokenizer, messages[:turn], tools=tools))
        if start < len(without_cue):
            raise _ambiguous(turn, len(messages))
        _warn_of_cue(before[start:])
    if turn == len(messages) - 1:
        return start, len(text)
    through = _without_eos(tokenizer, _render(tokenizer, messages[: turn + 1], tools=tools))
    if text.startswith(through):
        return start, len(through)
    content = str(messages[turn]["content"] or "").strip()
    at = text.find(content, start)
    ends = [text.find(stop, at + len(content)) for stop in _stops(tokenizer)]
    ends = [end for end in ends if end >= 0]
    if at < 0 or not ends or any(stop in text[start:at] for stop in _stops(tokenizer)):
        raise _ambiguous(turn, len(messages))
    return start, min(ends)


def _without_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Without the EOS token that some templates end a whole conversation with (Phi 3)."""
    return text.removesuffix(str(tokenizer.eos_token))


@lru_cache(maxsize=64)
def _warn_of_cue(cue: str) -> None:
    """Once for each: training text differs there from what a response follows in use."""
    log.warning(
        "the chat template's prompt for a response ends in %r, which it does not render before a finished response; turns are "
        "trained on without it (set data.template_path to a template that renders it to train with it)",
        cue,
    )


def _ambiguous(turn: int, num_messages: int) -> DataError:
    return DataError(
        f"the chat template renders the messages before assistant turn {turn} (message {turn + 1} of {num_messages}) "
        "differently when the turn follows, so its tokens cannot be told from the prompt's; mark assistant turns in the "
        "template with {% generation %}, or set data.train_on to last"
    )


def _check_all_is_rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text: str,
    tools: Sequence[Any],
    generation_prompt: bool = False,
) -> None:
    """Raise DataError where the template does not look at tools, calls of tools or reasoning that the conversation has."""
    if any(message.get("tool_calls") for message in messages):
        rest = [{name: value for name, value in message.items() if name != "tool_calls"} for message in messages]
        if _render(tokenizer, rest, generation_prompt, tools) == text:
            raise _dropped("tool_calls")
    thought = [i for i, message in enumerate(messages) if message.get("reasoning_content")]
    if thought:
        # Of the last turn: many templates render that of earlier ones no more.
        until = list(messages[: thought[-1] + 1])
        without = [*until[:-1], {name: value for name, value in until[-1].items() if name != "reasoning_content"}]
        if _render(tokenizer, until, tools=tools) == _render(tokenizer, without, tools=tools):
            raise _dropped("reasoning_content")
    if tools and _render(tokenizer, messages, generation_prompt) == text:
        raise _dropped("tools")


def _dropped(key: str) -> DataError:
    return DataError(
        f"the record has {key}, which the chat template does not render, so they would be lost; set data.template_path to a "
        "template that does, or remove them"
    )


def _check_content(message: Message, rendered: str, mark: str) -> None:
    """Raise DataError where the template drops a part of what is to be learnt."""
    content = str(message["content"] or "").strip()
    if content not in rendered:
        said, shown = content.replace(mark, "") if mark else content, rendered.replace(mark, "") if mark else rendered
        raise DataError(
            f"the chat template cuts the assistant's message {said[:60]!r} to {shown.strip()[:60]!r}; put reasoning into "
            "reasoning_content, or set data.template_path to a template that renders the whole message"
        )


def _check_reasoning(message: Message, rendered: str, mark: str) -> None:
    """Raise DataError where the template drops the reasoning of a turn that is to be learnt; it may render it before the turn's
    own characters."""
    reasoning = str(message.get("reasoning_content") or "").strip()
    if reasoning not in rendered:
        said = reasoning.replace(mark, "") if mark else reasoning
        raise DataError(
            f"the chat template drops the reasoning_content {said[:60]!r} of a turn that others follow; set data.train_on to "
            "last to train on the last turn of each conversation only, or data.template_path to a template that renders it"
        )


def _stops(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    return tuple(str(tokenizer.convert_ids_to_tokens(i)) for i in stop_token_ids(tokenizer))


def _close_turns(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[Span], last_content: str
) -> tuple[str, list[Span]]:
    """Extends or shortens every span to its stop token, and the text to the end of the last span.

    Templates render white space after the stop token, which a model that stops there never generates, and some a second stop
    token; some render the stop token outside their {% generation %} marks.
    """
    stops = _stops(tokenizer)
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
    return text[: closed[-1][1]], closed


def _without_stop(body: str, stops: Sequence[str]) -> str:
    return body.removesuffix(next(stop for stop in stops if body.endswith(stop))).rstrip()


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    generation_prompt: bool = False,
    tools: Sequence[Any] = (),
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=generation_prompt
        )
    except (TemplateError, TypeError) as err:  # a template that adds content of None to a string
        raise _unsupported(err) from err
    return str(text)


def _unsupported(err: Exception) -> DataError:
    return DataError(
        f"the chat template does not support the conversation ({err}); fix the roles and their order, or use another template"
    )
