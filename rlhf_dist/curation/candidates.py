"""Prompts with two or more candidate responses: what people and judges choose among.

A file of candidates (kind `candidates`) has one line a prompt: `{"id", "prompt", "candidates": [{"text", "model",
"sampling", "finish_reason"}, ...]}`, as `rlhf-dist data responses` writes it. Records of kind `preference` can be read as
candidates too: the order in which they stand is then ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_dist.config.data import BadRowPolicy, DataSource
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.chat_template import Message
from rlhf_dist.data.fields import Fields
from rlhf_dist.data.preferences import answerable, preference_messages
from rlhf_dist.data.reader import read_fields

Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Item:
    """A prompt and its candidates; what a judgement is about."""

    id: str
    """16 hex digits of a hash of prompt and candidates (`item_id`): another text is another item."""
    prompt: Messages
    candidates: tuple[Messages, ...]
    """Each begins and ends with an assistant message; most are one message."""
    models: tuple[str, ...]
    """What made each candidate; "" where it is not said."""
    location: str
    """File and line."""
    on_bad_row: BadRowPolicy = "error"
    """Of its source."""
    tools: tuple[Any, ...] = ()
    """Descriptions of tools that the prompt is given with."""


def item_id(
    prompt: str | Sequence[Message], candidates: Iterable[str | Sequence[Message]], tools: Sequence[Any] = ()
) -> str:
    """16 hex digits of the SHA-256 of prompt, candidates in their order, and tools.

    A string is the same as one message: of the user for a prompt, of the assistant for a candidate.
    """
    content: list[Any] = [_pairs(prompt, "user"), [_pairs(candidate, "assistant") for candidate in candidates]]
    # What plain texts do not have is left out of their ids, which files of judgements refer to.
    content += [json.dumps(list(tools), sort_keys=True, default=str)] if tools else []
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def _pairs(value: str | Sequence[Message], role: str) -> list[list[str]]:
    if isinstance(value, str):
        return [[role, value]]
    return [list(turn) for turn in identity_of_messages(value)]


def identity_of_messages(messages: Sequence[Message]) -> list[list[str]]:
    """Role and text of each message, and whatever else it has as JSON."""
    found = []
    for message in messages:
        rest = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
        more = [json.dumps(rest, sort_keys=True, default=str)] if rest else []
        found.append([message["role"], message["content"], *more])
    return found


def is_text(messages: Sequence[Message], role: str) -> bool:
    """Whether messages are one of `role` that is its text and nothing else."""
    return len(messages) == 1 and messages[0]["role"] == role and messages[0].keys() == {"role", "content"}


def shown_text(message: Message) -> str:
    """All that a message holds, to be read: its reasoning, its text, its calls of tools."""
    parts = [f"Reasoning: {message['reasoning_content']}"] if message.get("reasoning_content") else []
    parts += [message["content"]] if message["content"] else []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        parts.append(f"Tool call: {function['name']}({written})")
    named = f"{message['name']}: " if message.get("name") else ""
    return named + "\n\n".join(parts)


def shown_tools(tools: Sequence[Any]) -> str:
    """Descriptions of tools, one a line."""
    return "\n".join(json.dumps(tool, ensure_ascii=False, default=str) for tool in tools)


def read_items(sources: Iterable[DataSource], bad_rows: BadRows | None = None) -> list[Item]:
    """The items of sources of kind `candidates` or `preference`, each once.

    Args:
        sources: where they are.
        bad_rows: takes the rows that cannot be used, under a source's `on_bad_row: skip`.

    Raises:
        DataError: a row that cannot be used (also one that repeats an item), with its place; a source without items.
        ConfigError: another kind of source.
    """
    bad_rows = BadRows() if bad_rows is None else bad_rows
    items: dict[str, Item] = {}
    for source in sources:
        if source.kind not in ("candidates", "preference"):
            raise ConfigError(
                f"{source.path}: kind {source.kind!r} has no responses to choose among; use candidates or preference"
            )
        before, known = len(items), len(bad_rows)
        for row in read_fields(source, bad_rows):
            with bad_rows.guard(source.on_bad_row, row.values):
                item = item_of(row) if source.kind == "candidates" else _of_preference(row)
                if item.id in items:
                    raise DataError(
                        f"{row.location}: has the prompt and the candidates of {items[item.id].location}; remove one of them"
                    )
                items[item.id] = replace(item, on_bad_row=source.on_bad_row)
        if len(items) == before:
            raise DataError(
                f"{source.path}: none of its {len(bad_rows) - known} rows can be used, the first since "
                f"{bad_rows.rows[known].reason}"
            )
    return list(items.values())


def item_of(row: Fields) -> Item:
    """The item of a row of kind `candidates`.

    Raises:
        DataError: a field that is missing or not of the form, fewer than two candidates, none that differ.
    """
    prompt = row.required("prompt")
    messages: Messages
    if isinstance(prompt, str):
        messages = ({"role": "user", "content": row.text("prompt")},)
    else:
        messages = answerable(row, "prompt", row.messages("prompt"))
    messages = row.with_system(messages)
    values = row.items("candidates")
    if len(values) < 2:
        raise row.error(
            "candidates", f"holds {len(values)}, and a choice needs at least 2", "add some, or remove the row"
        )
    texts = tuple(_text(row, f"candidates[{i}]", value) for i, value in enumerate(values))
    models = tuple(str(value.get("model") or "") if isinstance(value, Mapping) else "" for value in values)
    if len(set(texts)) == 1:
        raise row.error("candidates", "are all the same text, so there is no choice", "remove the row")
    candidates = tuple(({"role": "assistant", "content": text},) for text in texts)
    tools = row.tools()
    return Item(item_id(messages, candidates, tools), messages, candidates, models, row.location, tools=tools)


def _text(row: Fields, name: str, value: Any) -> str:
    """A response may be empty (a model that stops at once), but it must be text."""
    text = value.get("text") if isinstance(value, Mapping) else value
    if isinstance(text, str) and not text.strip():
        return text
    return row.checked_text(f"{name}.text" if isinstance(value, Mapping) else name, text)


def _of_preference(row: Fields) -> Item:
    prompt, candidates = preference_messages(row)
    tools, models = row.tools(), ("",) * len(candidates)
    return Item(item_id(prompt, candidates, tools), prompt, candidates, models, row.location, tools=tools)
