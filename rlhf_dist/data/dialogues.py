"""Preference records in the forms they are published in, to prompt and continuations, the best first.

Two continuations are in `chosen` and `rejected`, two or more in the list `responses`. A row may have columns of these names
that mean something else: `chosen` and `rejected` are the pair unless `fields` maps `responses`, and only columns that it
maps contradict each other.

- `prompt` with continuations: strings, or lists of messages that begin with the assistant's.
- The HH form (Bai et al. 2022): continuations each hold the whole dialogue, as text with "\\n\\nHuman: " and
  "\\n\\nAssistant: " before the turns, or as messages that begin with the user's. What they have in common is the
  prompt; a `prompt` that stands beside them must be part of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlhf_dist.data.encoding import Message
from rlhf_dist.data.fields import Fields

Messages = tuple[Message, ...]

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_GENERATION_CUE = re.compile(r"\n\nAssistant:\s*$")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def chat_messages(row: Fields, field: str) -> Messages:
    """A chat: a list of messages, or a dialogue as text in the HH form.

    Raises:
        DataError: neither.
    """
    value = row.required(field)
    if isinstance(value, str) and re.match(r"\s*Human:", value):
        return _dialogue(row, field, row.checked_text(field, value))
    return row.checked_messages(field, value)


def preference_messages(row: Fields) -> tuple[Messages, tuple[Messages, ...]]:
    """Prompt and continuations (the best first) of a preference record. Some of a ranking may be equal, but not all.

    Raises:
        DataError: a missing field, mixed forms, dialogues that differ before the last turn, nothing but equal continuations.
    """
    values = _continuations(row)
    names = list(values)
    turns = [_continuation(row, name, value) for name, value in values.items()]
    if all(messages == turns[0] for messages in turns):
        raise row.error(
            names[0],
            f"equals its {names[1]} ({turns[0][-1]['content'][:40]!r}), so nothing can be learnt from the row",
            "remove the row",
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


def is_ranking(row: Fields) -> bool:
    """Whether a preference record is a ranking (`responses`) rather than a pair (`chosen` and `rejected`).

    Raises:
        DataError: it is both, as far as the fields that the config maps say, or a ranking and half a pair.
    """
    sides = [name for name in ("chosen", "rejected") if row.get(name) is not None]
    if row.get("responses") is None or (len(sides) == 2 and not row.is_mapped("responses")):
        if sides and row.is_mapped("ratings") and row.get("ratings") is not None:
            raise row.error(
                "ratings",
                f"stands beside {_listed(sides)}, and ratings are those of a ranking",
                "map responses too if the record is a ranking; if it is a pair, remove the mapping and use margin",
            )
        return False
    # Half a pair beside an unmapped `responses` may be a broken pair of a file in which that column means something else.
    doubtful = [] if row.is_mapped("responses") else sides
    beside = [
        name
        for name in ("chosen", "rejected", "margin")
        if name in doubtful or (row.is_mapped(name) and row.get(name) is not None)
    ]
    if beside:
        raise row.error(
            "responses",
            f"stands beside {_listed(beside)}, and a record is a ranking or a pair",
            "keep either responses (and ratings) or chosen and rejected (and margin), or map only those of one form, "
            "as with fields: {responses: responses}",
        )
    return True


def _continuations(row: Fields) -> dict[str, Any]:
    """Name in messages → value; the best first."""
    if not is_ranking(row):
        return {name: row.required(name) for name in ("chosen", "rejected")}
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
