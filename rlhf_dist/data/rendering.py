"""Conversations → text, by the tokenizer's chat template, and which characters of it are what.

Three things are found in the rendered text: the assistant turns (what is trained on), the token that ends each, and special
tokens that only a person's text spells out (`</s>` in a question), which must stay text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf_dist.core.errors import DataError
from rlhf_dist.data.chat_template import (
    SENTINEL,
    Message,
    in_form,
    opening,
    render,
    stops,
    template_for,
    unsupported,
    without_eos,
)
from rlhf_dist.data.special_tokens import literals_of, marked
from rlhf_dist.data.template_checks import (
    check_all_is_rendered,
    check_content,
    check_generation_prompt,
    check_reasoning,
)

Span = tuple[int, int]
"""Characters start..end-1 of a rendered conversation."""

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    """Ends with the stop token of the last assistant turn (of a prompt: where the response begins)."""
    spans: tuple[Span, ...]
    """Assistant turns to learn from (content and stop token) in `text`, in order, not overlapping."""
    literals: tuple[Span, ...] = ()
    """What spells a special token in `text` and is none."""
    notes: tuple[str, ...] = ()
    """How `text` differs from what a response follows in use."""


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
    messages = in_form(tokenizer, messages[: wanted[-1] + 1], tools)
    turns = [i for i in turns if i <= wanted[-1]]
    mark, messages, tools = marked(tokenizer, messages, tools)
    notes: list[str] = []
    is_tagged = _GENERATION_TAG.search(template_for(tokenizer, tools)) is not None
    if is_tagged:
        text, spans = _tagged_spans(tokenizer, messages, len(turns), tools)
        spans = [span for turn, span in zip(turns, spans, strict=True) if turn in wanted]
    else:
        check_generation_prompt(tokenizer)
        text, spans = render(tokenizer, messages, tools=tools), []
    check_all_is_rendered(tokenizer, messages, text, tools, mark=mark, targets=wanted)
    if not is_tagged:
        found = [_turn_span(tokenizer, messages, text, i, tools) for i in wanted]
        spans = [span for span, _ in found]
        notes = [_note_of_cue(missing) for _, missing in found if missing]
    before = 0
    for turn, (start, end) in zip(wanted, spans, strict=True) if not may_cut else ():
        check_content(messages[turn], text[start:end], mark)
        check_reasoning(messages[turn], text[before:end], mark)
        before = end
    text, spans = _close_turns(tokenizer, text, spans, str(messages[-1]["content"] or ""))
    return _without_marks(tokenizer, text, spans, mark, tuple(dict.fromkeys(notes)))


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any] = ()
) -> Rendered:
    """Text of a conversation up to where the assistant's response begins.

    Raises:
        DataError: messages that the template does not support, or of which it drops something.
    """
    if not _GENERATION_TAG.search(template_for(tokenizer, tools)):
        check_generation_prompt(tokenizer)
    mark, messages, tools = marked(tokenizer, in_form(tokenizer, messages, tools), tools)
    text = render(tokenizer, messages, generation_prompt=True, tools=tools)
    check_all_is_rendered(tokenizer, messages, text, tools, mark=mark, generation_prompt=True)
    return _without_marks(tokenizer, text, [], mark)


def _without_marks(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], mark: str, notes: tuple[str, ...] = ()
) -> Rendered:
    if not mark:
        return Rendered(text, tuple(spans), notes=notes)
    clean, literals = literals_of(tokenizer, text, mark)
    moved = [(start - text.count(mark, 0, start), end - text.count(mark, 0, end)) for start, end in spans]
    return Rendered(clean, tuple(moved), tuple(literals), notes)


def _tagged_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], num_turns: int, tools: Sequence[Any]
) -> tuple[str, list[Span]]:
    """Spans that a template marks itself with {% generation %} … {% endgeneration %}."""
    try:
        # What apply_chat_template calls; it keeps the spans to itself. Its annotations miss that they are returned.
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) or None,
            chat_template=template_for(tokenizer, tools),
            return_assistant_tokens_mask=True,
            **cast(dict[str, Any], tokenizer.special_tokens_map),
        )
    except TemplateError as err:
        raise unsupported(err) from err
    [text], [spans] = rendered
    if len(spans) != num_turns:
        raise DataError(
            f"the chat template marks {len(spans)} assistant turns with {{% generation %}} where the conversation "
            f"has {num_turns}; fix the template so that each turn is marked once, or remove the marks"
        )
    return text, list(spans)


def _turn_span(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str, turn: int, tools: Sequence[Any]
) -> tuple[Span, str]:
    """(characters of an assistant turn: from where the prompt for it ends to where the next message begins; the end of that
    prompt that the text lacks).

    Templates render a turn differently when others follow: they drop its reasoning (Qwen 3), or open a block of reasoning in
    the prompt for a turn that a finished turn does not have (DeepSeek R1). What counts is how the whole conversation has it.
    """
    before = render(tokenizer, messages[:turn], generation_prompt=True, tools=tools)
    start = len(before)
    if not text.startswith(before):
        start = _start_without_cue(tokenizer, messages, text, turn, tools, before)
    missing = before[start:]
    if turn == len(messages) - 1:
        return (start, len(text)), missing
    through = without_eos(tokenizer, render(tokenizer, messages[: turn + 1], tools=tools))
    if text.startswith(through):
        return (start, len(through)), missing
    content = str(messages[turn]["content"] or "").strip()
    at = text.find(content, start)
    ends = [text.find(stop, at + len(content)) for stop in stops(tokenizer)]
    ends = [end for end in ends if end >= 0]
    if at < 0 or not ends or any(stop in text[start:at] for stop in stops(tokenizer)):
        raise _ambiguous(turn, messages)
    return (start, min(ends)), missing


def _start_without_cue(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text: str,
    turn: int,
    tools: Sequence[Any],
    before: str,
) -> int:
    """Where a turn begins that lacks some of what the prompt for it, `before`, ends in.

    How much of it the turn has is seen with another response: this one may begin as the rest of the prompt does (`<answer>`
    where a prompt ends in `<think>`).
    """
    usual = opening(tokenizer)
    if usual is not None and usual.shared != usual.cue and before.endswith(usual.cue):
        start = len(before) - len(usual.cue) + len(usual.shared)
        if text.startswith(before[:start]):
            return start
    said: Message = {"role": "assistant", "content": SENTINEL}
    if messages[turn].get("reasoning_content"):
        said["reasoning_content"] = SENTINEL
    try:
        other = render(tokenizer, [*messages[:turn], said, *messages[turn + 1 :]], tools=tools)
    except DataError:  # a template that requires the calls that later messages answer
        other = text
    start = len(os.path.commonprefix([before, other]))  # noqa: RUF071 (characters are meant)
    without_cue = without_eos(tokenizer, render(tokenizer, messages[:turn], tools=tools))
    if start < len(without_cue) or not text.startswith(before[:start]):
        raise _ambiguous(turn, messages)
    return start


def _note_of_cue(cue: str) -> str:
    return (
        f"turns trained on without {cue!r}, in which the chat template's prompt for a response ends, but which it does not "
        "render before a finished one (data.template_path can name a template that does)"
    )


def _ambiguous(turn: int, messages: Sequence[Message]) -> DataError:
    remedy = "mark assistant turns in the template with {% generation %}, or set data.train_on to last"
    if any(message["role"] == "system" for message in messages):
        # Rendered into the last user message, say, which another one is when more turns follow.
        remedy = f"set data.system to merge_into_user, {remedy}"
    return DataError(
        f"the chat template renders the messages before assistant turn {turn} (message {turn + 1} of {len(messages)}) "
        f"differently when the turn follows, so its tokens cannot be told from the prompt's; {remedy}"
    )


def _close_turns(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[Span], last_content: str
) -> tuple[str, list[Span]]:
    """Extends or shortens every span to its stop token, and the text to the end of the last span.

    Templates render white space after the stop token, which a model that stops there never generates, and some a second stop
    token; some render the stop token outside their {% generation %} marks.
    """
    ends = stops(tokenizer)
    closed: list[Span] = []
    has_stop = False
    for number, (start, end) in enumerate(spans):
        body, after = text[start:end].rstrip(), text[end:].lstrip()
        stop = next((s for s in ends if after.startswith(s)), None)
        has_stop = True
        if body.endswith(ends):
            while (shorter := _without_stop(body, ends)).endswith(ends):
                body = shorter
            end = start + len(body)
        elif stop is not None:
            end = len(text) - len(after) + len(stop)
        elif number < len(spans) - 1:
            raise DataError(
                f"the chat template ends the assistant's turn {text[start:end][:60]!r} with no stop token, so a model would "
                "not learn to stop there; set data.train_on to last, or data.template_path to a template that ends turns with "
                "eos_token"
            )
        else:
            has_stop = False
        closed.append((start, end))
    start, end = closed[-1]
    if not has_stop:
        at = text.rfind(last_content, start, end)
        text = text[: at + len(last_content) if at >= 0 else end] + str(tokenizer.eos_token)
        closed[-1] = start, len(text)
    return text[: closed[-1][1]], closed


def _without_stop(body: str, ends: Sequence[str]) -> str:
    return body.removesuffix(next(stop for stop in ends if body.endswith(stop))).rstrip()
