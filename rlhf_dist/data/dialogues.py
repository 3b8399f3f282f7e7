"""Preference records in the forms they are published in, to prompt and two continuations.

- `prompt` with `chosen` and `rejected` continuations: strings, or lists of messages that begin with the assistant's.
- The HH form (Bai et al. 2022): `chosen` and `rejected` each hold the whole dialogue, as text with "\\n\\nHuman: " and
  "\\n\\nAssistant: " before the turns, or as messages that begin with the user's. What the two have in common is the
  prompt; a `prompt` that stands beside them must be part of it.
"""

from __future__ import annotations

import re
from typing import Any

from rlhf_dist.data.encoding import Message
from rlhf_dist.data.fields import Fields

Messages = tuple[Message, ...]

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_GENERATION_CUE = re.compile(r"\n\nAssistant:\s*$")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def preference_messages(row: Fields) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected messages of a preference record.

    Raises:
        DataError: a missing field, mixed forms, dialogues that differ before the last turn, chosen equal to rejected.
    """
    chosen, rejected = _continuation(row, "chosen"), _continuation(row, "rejected")
    if chosen == rejected:
        raise row.error(
            "chosen",
            f"equals its rejected ({chosen[-1]['content'][:40]!r}), so nothing can be learnt from the pair",
            "remove the row",
        )
    whole = [turns[0]["role"] != "assistant" for turns in (chosen, rejected)]
    if whole[0] != whole[1]:
        dialogue, other = ("chosen", "rejected") if whole[0] else ("rejected", "chosen")
        raise row.error(dialogue, f"is a whole dialogue and {other!r} is only a response", "write both in one form")
    if whole[0]:
        return _split(row, chosen, rejected)
    prompt = _prompt(row)
    if not prompt:
        raise row.error(
            "prompt",
            "is missing, and chosen and rejected are not whole dialogues",
            'add it, map it with fields: {prompt: <column>}, or write "\\n\\nHuman: ...\\n\\nAssistant: ..." dialogues',
        )
    if prompt[-1]["role"] != "user":
        raise row.error("prompt", "does not end with a user message", "add the message that is answered")
    return prompt, chosen, rejected


def _continuation(row: Fields, field: str) -> Messages:
    """The messages of `chosen` or `rejected`; they end with the assistant's."""
    value = row.required(field)
    if isinstance(value, str):
        text = row.checked_text(field, value)
        # With a prompt beside it, a response may talk of "Human:" without being a dialogue, if it does not begin so.
        if not re.match(r"\s*Human:", text):
            return ({"role": "assistant", "content": text},)
        messages = _dialogue(row, field, text)
    else:
        messages = row.messages(field)
    if messages[-1]["role"] != "assistant":
        raise row.error(field, "does not end with an assistant message", "add the response")
    return messages


def _dialogue(row: Fields, field: str, text: str) -> Messages:
    """Turns of an HH text; the white space around a turn belongs to the format."""
    _, *parts = _TURN.split(text.lstrip())
    messages: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = _ROLE[speaker]
        content = row.checked_text(f"{field} (turn {len(messages) + 1})", content).strip()
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _split(row: Fields, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Common beginning and the two ends of whole dialogues."""
    common = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        common += 1
    prompt, ends = chosen[:common], (chosen[common:], rejected[common:])
    if not prompt or any(not end or end[0]["role"] != "assistant" for end in ends):
        raise row.error(
            "chosen",
            f"and its rejected part after {common} messages, not at an assistant's turn",
            "make the prompts equal",
        )
    stated = _prompt(row)
    contents = [message["content"] for message in prompt]
    if any(message["content"].strip() not in map(str.strip, contents) for message in stated):
        raise row.error(
            "prompt",
            f"is {stated[-1]['content'][:40]!r}, which the dialogues in chosen and rejected do not begin with",
            "make them agree, or remove the prompt",
        )
    return prompt, *ends


def _prompt(row: Fields) -> Messages:
    value: Any = row.get("prompt")
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    if isinstance(value, str):
        text = row.checked_text("prompt", value)
        if not re.match(r"\s*Human:", text):
            return ({"role": "user", "content": text},)
        return _dialogue(row, "prompt", _GENERATION_CUE.sub("", text))
    return row.messages("prompt")
