"""Preference records in the forms they are published in, to prompt and continuations, the best first.

Two continuations are in `chosen` and `rejected`, two or more in the list `responses`.

- `prompt` with continuations: strings, or lists of messages that begin with the assistant's.
- The HH form (Bai et al. 2022): continuations each hold the whole dialogue, as text with "\\n\\nHuman: " and
  "\\n\\nAssistant: " before the turns, or as messages that begin with the user's. What they have in common is the
  prompt; a `prompt` that stands beside them must be part of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from rlhf_dist.data.encoding import Message
from rlhf_dist.data.fields import Fields

Messages = tuple[Message, ...]

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_GENERATION_CUE = re.compile(r"\n\nAssistant:\s*$")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def preference_messages(row: Fields) -> tuple[Messages, tuple[Messages, ...]]:
    """Prompt and continuations (the best first) of a preference record.

    Raises:
        DataError: a missing field, mixed forms, dialogues that differ before the last turn, equal continuations.
    """
    values = _continuations(row)
    names = list(values)
    turns = [_continuation(row, name, value) for name, value in values.items()]
    for i, j in combinations(range(len(turns)), 2):
        if turns[i] == turns[j]:
            raise row.error(
                names[i],
                f"equals its {names[j]} ({turns[i][-1]['content'][:40]!r}), so nothing can be learnt from the pair",
                "remove the row" if len(turns) == 2 else "remove one of the two",
            )
    whole = [messages[0]["role"] != "assistant" for messages in turns]
    if len(set(whole)) > 1:
        dialogue, other = names[whole.index(True)], names[whole.index(False)]
        raise row.error(dialogue, f"is a whole dialogue and {other!r} is only a response", "write all in one form")
    if all(whole):
        return _split(row, names, turns)
    prompt = _prompt(row)
    if not prompt:
        raise row.error(
            "prompt",
            f"is missing, and {_listed(names)} are not whole dialogues",
            'add it, map it with fields: {prompt: <column>}, or write "\\n\\nHuman: ...\\n\\nAssistant: ..." dialogues',
        )
    if prompt[-1]["role"] != "user":
        raise row.error("prompt", "does not end with a user message", "add the message that is answered")
    return prompt, tuple(turns)


def _continuations(row: Fields) -> dict[str, Any]:
    """Name in messages → value; the best first."""
    if row.get("responses") is None:
        return {name: row.required(name) for name in ("chosen", "rejected")}
    beside = [name for name in ("chosen", "rejected", "margin") if row.get(name) is not None]
    if beside:
        raise row.error(
            "responses",
            f"stands beside {_listed(beside)}, and a record is a ranking or a pair",
            "keep either responses (and ratings) or chosen and rejected (and margin)",
        )
    values = row.items("responses")
    if len(values) < 2:
        raise row.error(
            "responses", f"holds {len(values)}, and a ranking needs at least 2", "add responses, or remove the row"
        )
    return {f"responses[{i}]": value for i, value in enumerate(values)}


def _continuation(row: Fields, name: str, value: Any) -> Messages:
    """The messages of one continuation; they end with the assistant's."""
    if isinstance(value, str):
        text = row.checked_text(name, value)
        # With a prompt beside it, a response may talk of "Human:" without being a dialogue, if it does not begin so.
        if not re.match(r"\s*Human:", text):
            return ({"role": "assistant", "content": text},)
        messages = _dialogue(row, name, text)
    else:
        messages = row.checked_messages(name, value)
    if messages[-1]["role"] != "assistant":
        raise row.error(name, "does not end with an assistant message", "add the response")
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


def _split(row: Fields, names: Sequence[str], turns: Sequence[Messages]) -> tuple[Messages, tuple[Messages, ...]]:
    """Common beginning and the ends of whole dialogues."""
    common = 0
    for same in zip(*turns, strict=False):
        if any(message != same[0] for message in same):
            break
        common += 1
    prompt, ends = turns[0][:common], tuple(messages[common:] for messages in turns)
    if not prompt or any(not end or end[0]["role"] != "assistant" for end in ends):
        raise row.error(
            names[0],
            f"and its {_listed(names[1:])} part after {common} messages, not at an assistant's turn",
            "make the prompts equal",
        )
    stated = _prompt(row)
    contents = [message["content"] for message in prompt]
    if any(message["content"].strip() not in map(str.strip, contents) for message in stated):
        raise row.error(
            "prompt",
            f"is {stated[-1]['content'][:40]!r}, which the dialogues in {_listed(names)} do not begin with",
            "make them agree, or remove the prompt",
        )
    return prompt, ends


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{names[0]} to {names[-1]}"


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
