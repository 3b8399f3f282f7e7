"""Typed access to the fields of one row; every error names place, field, value, constraint and remedy."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_dist.core.errors import DataError
from rlhf_dist.data.chat_template import Message

ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""What published data sets call roles, in any case."""
CALL_ROLES = ("function_call", "tool_call")
"""Turns of the assistant whose content is a call of a tool, or several, as JSON (ShareGPT)."""
MESSAGE_KEYS = frozenset(
    {"role", "content", "from", "value", "weight", "tool_calls", "tool_call_id", "name", "reasoning_content"}
    | {"function_call", "refusal"}
)

ARGUMENT_KEYS = ("arguments", "parameters", "input")
"""What the arguments of a call are called: by OpenAI and transformers, Llama 3, Anthropic."""
FUNCTION_KEYS = frozenset({"name", *ARGUMENT_KEYS})
CALL_KEYS = frozenset({"id", "type", "index"})
MEDIA_COLUMNS = frozenset({"image", "images", "audio", "audios", "video", "videos"})
METADATA_COLUMNS = frozenset(
    {
        "id",
        "idx",
        "index",
        "uid",
        "uuid",
        "guid",
        "hash",
        "source",
        "dataset",
        "task",
        "category",
        "language",
        "license",
        "split",
    }
    | {"created", "created_at", "updated_at", "date", "timestamp", "url", "provenance"}
)
"""Columns that say where a row is from; that nothing uses them needs no note."""

MAX_DEPTH = 50
"""Of tools and of the arguments of their calls: deeper ones end in the limit of Python's own reader and writer of JSON."""

_MISSING = object()


class Fields:
    """One row, read by field name. `mapping` (field → column) comes from the config; a column may be a dotted path
    into nested records ("instances.0.output"). `notes` counts the rows in which something was recognized or is not used."""

    def __init__(
        self, location: str, values: Mapping[str, Any], mapping: Mapping[str, str], notes: Counter[str] | None = None
    ) -> None:
        self.location = location
        self._values = values
        self._mapping = mapping
        self._notes = Counter() if notes is None else notes
        self._noted: set[str] = set()
        self._read: set[str] = set()
        """Columns that something was looked up in."""

    def note(self, what: str) -> None:
        """Count the row among those with `what`, once."""
        if what not in self._noted:
            self._noted.add(what)
            self._notes[what] += 1

    def note_unused(self, *fields: str) -> None:
        """Note the unmapped fields of these that the row has."""
        for field in fields:
            if not self.is_mapped(field) and not _is_empty(self._values.get(field)):
                self.note(unused_note(field))

    @property
    def values(self) -> Mapping[str, Any]:
        """The row as it was read, column by column."""
        return self._values

    def unused(self, fields: Iterable[str]) -> list[str]:
        """Columns with content that are none of `fields`, that nothing has read, and that are no metadata of the row."""
        columns = {_column(self._values, self._mapping.get(field, field)) for field in fields}
        return [
            name
            for name, value in self._values.items()
            if name not in columns and name not in self._read and not _is_metadata(name) and not _is_empty(value)
        ]

    def check_is_text(self) -> None:
        """Raise DataError for a row with an image, a sound or a video: texts about what a model does not get."""
        mapped = {_column(self._values, column) for column in self._mapping.values()}
        for column in MEDIA_COLUMNS & self._values.keys() - mapped:
            value = self._values[column]
            if not _is_empty(value) and value not in (0, False):
                raise self.error(
                    column,
                    f"is {_short(value)}, and only text is supported",
                    "remove the row, or the column if no text needs it",
                )

    def named_values(self) -> dict[str, Any]:
        """All columns, and the mapped ones under their field names, too."""
        named = {field: self.get(field) for field in self._mapping if self.has_column(self._mapping[field])}
        return {**self._values, **named}

    def column(self, column: str) -> Any:
        """A column's value, or a mapped field's.

        Raises:
            DataError: it is missing or null.
        """
        value = _lookup(self._values, self._mapping.get(column, column))
        if value is _MISSING or value is None:
            raise self.error(
                column, f"is missing; the row has {_listed(self._values)}", "name another column, or fix the row"
            )
        return value

    def has_column(self, column: str) -> bool:
        """Whether the row has that column, null or not."""
        return _lookup(self._values, column) is not _MISSING

    def is_mapped(self, field: str) -> bool:
        """Whether the config maps the field to a column, be it one of its own name."""
        return field in self._mapping

    def get(self, field: str) -> Any:
        """The field's value; None where it is missing, or NaN, as tables write what is missing."""
        path = self._mapping.get(field, field)
        self._read.add(_column(self._values, path))
        value = _lookup(self._values, path)
        return None if value is _MISSING or _is_missing(value) else value

    def required(self, field: str) -> Any:
        """The field's value.

        Raises:
            DataError: it is missing or null.
        """
        value = self.get(field)
        if value is None:
            raise self.error(field, f"is missing; the row has {_listed(self._values)}", _remedy(field))
        return value

    def text(self, field: str) -> str:
        """A non-blank string; errors as `required` and `checked_text`."""
        return self.checked_text(field, self.required(field))

    def optional_text(self, field: str) -> str:
        """A string, or "" where the field is missing, null or blank."""
        value = self.get(field)
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        return self.checked_text(field, value)

    def number(self, field: str) -> float:
        """A finite number, as a number or as text."""
        return self.checked_number(field, self.required(field))

    def messages(self, field: str, keep_weights: bool = False) -> tuple[Message, ...]:
        """A list of {"role", "content"} messages, with `keep_weights` also of their `weight`."""
        return self.checked_messages(field, self.required(field), keep_weights)

    def tools(self) -> tuple[Any, ...]:
        """Descriptions of tools that the field `tools` has, as a list or as JSON, or else a column `functions` (OpenAI's older
        form); () where there are none."""
        value = self.get("tools")
        if _is_empty(value) and not self.is_mapped("tools"):
            value = self._functions() or value
        if isinstance(value, str):
            self.optional_text("tools")
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise self.error("tools", "is no JSON", "write it as a list") from error
        if not value:
            return ()
        if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
            raise self.error("tools", f"is {_short(value)}, not a list of descriptions", "write it as a list")
        self._check_json("tools", list(value))
        return tuple(value)

    def with_system(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Messages after the system message that the row has in a column, unless they begin with another."""
        column, text = self.system()
        first = messages[0] if messages and messages[0]["role"] == "system" else None
        if not text or (first is not None and first["content"] == text):
            return tuple(messages)
        if first is not None and first["content"].strip():
            self.note(f"column {column!r} beside a system turn, which is not used")
            return tuple(messages)
        if not self.is_mapped("system"):
            self.note(f"column {column!r} taken for the system message")
        return ({"role": "system", "content": text}, *messages[first is not None :])

    def _functions(self) -> list[Any]:
        """The tools of a column `functions`; [] where it has something else."""
        value = self._values.get("functions")
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, list) or not value:
            return []
        if not all(isinstance(item, Mapping) and isinstance(item.get("name"), str) for item in value):
            return []
        self._read.add("functions")
        self.note("column 'functions' (OpenAI) taken for tools")
        return [{"type": "function", "function": function} for function in value]

    def system(self) -> tuple[str, str]:
        """(column, text) of the field `system`, or of a column `system_prompt`; text "" where there is none, or where an
        unmapped one is no text."""
        mapped = self.is_mapped("system")
        for column in ("system",) if mapped else ("system", "system_prompt"):
            if not mapped and not isinstance(self.get(column), str):
                self.note_unused(column)
            elif text := self.optional_text(column):
                return self._mapping.get(column, column), text
        return "system", ""

    def items(self, field: str) -> Sequence[Any]:
        """A list."""
        value = self.required(field)
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise self.error(field, f"is {_short(value)}, a {type(value).__name__}, not a list", "write it as a list")
        return value

    def checked_number(self, field: str, value: Any) -> float:
        """`value`, if it is a finite number, as a number or as text."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.error(field, f"is {_short(value)}, which is not a finite number", "fix the row")
        return number

    def checked_messages(self, field: str, value: Any, keep_weights: bool = False) -> tuple[Message, ...]:
        """`value`, if it is a list of {"role", "content"} messages, with `keep_weights` also of their `weight`."""
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
            raise self.error(
                field, f"is {_short(value)}, not a list of messages", 'write it as [{"role": ..., "content": ...}]'
            )
        found = tuple(self._message(f"{field}[{i}]", item) for i, item in enumerate(value))
        for message in found if not keep_weights else ():
            if message.pop("weight", 1) == 0:
                self.note("weight 0 of messages, which only supervised training uses")
        return found

    def checked_text(self, field: str, value: Any) -> str:
        """`value`, if it is a non-blank string that can be encoded."""
        if not isinstance(value, str):
            raise self.error(
                field, f"is {_short(value)}, a {type(value).__name__}, not a string", "write it as a string"
            )
        if not value.strip():
            raise self.error(field, f"is {value[:20]!r}, which is blank", "fill it, or remove the row")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as err:
            raise self.error(
                field, f"has a lone surrogate (half a character) at position {err.start}", "write it as valid UTF-8"
            ) from err
        return value

    def error(self, field: str, problem: str, remedy: str) -> DataError:
        """The error of a field: place, field (and column), then `problem` and `remedy`."""
        column = self._mapping.get(field, field)
        named = f"field {field!r}" if column == field else f"field {field!r} (column {column!r})"
        return DataError(f"{self.location}: {named} {problem}; {remedy}")

    def _message(self, field: str, item: Any) -> Message:
        """A message as chat templates take it, also of one in the shapes of ShareGPT and of OpenAI's content parts, with its
        `weight`."""
        if isinstance(item, Mapping) and "from" in item and "value" in item:
            self.note("ShareGPT turns (from, value)")
            others = {key: value for key, value in item.items() if key not in ("from", "value")}
            item = others | {"role": item["from"], "content": item["value"]}
        # OpenAI leaves out the content of calls and refusals.
        optional = isinstance(item, Mapping) and any(
            item.get(key) for key in ("tool_calls", "function_call", "refusal")
        )
        if not isinstance(item, Mapping) or "role" not in item or not ("content" in item or optional):
            raise self.error(field, f'is {_short(item)}, without "role" and "content"', "give it both")
        named = item["role"].strip().lower() if isinstance(item["role"], str) else item["role"]
        if named in CALL_ROLES:
            item = {**item, "role": "assistant", "content": "", "tool_calls": self._calls_of_text(field, item)}
            named = "assistant"
        role = ROLE_NAMES.get(str(named), named)
        if role not in ROLES:
            raise self.error(f"{field}.role", f"is {_short(item['role'])}", f"use one of {', '.join(ROLES)}")
        content = self._content(f"{field}.content", item.get("content"))
        if not _is_missing(refusal := item.get("refusal")) and refusal != "":
            content = self._refused(field, role, content, refusal)
        message: Message = {"role": role, "content": content}
        calls = item.get("tool_calls")
        if legacy := item.get("function_call"):
            if calls:
                raise self.error(field, "has tool_calls and function_call, which mean the same", "keep one of them")
            self.note("function_call of messages (OpenAI), taken for a call of a tool")
            calls = [legacy]
        if calls:
            message["tool_calls"] = self._tool_calls(f"{field}.tool_calls", role, calls)
        for key in ("reasoning_content", "name", "tool_call_id"):
            if not _is_missing(item.get(key)) and item[key] != "":
                message[key] = self.checked_text(f"{field}.{key}", item[key])
        # An empty system message is a common way to write that there is none, and a call of tools needs no text.
        if message["content"] != "" or not (calls or role == "system"):
            self.checked_text(f"{field}.content", message["content"])
        if not _is_missing(weight := item.get("weight")):
            if weight not in (0, 1):
                raise self.error(f"{field}.weight", f"is {_short(weight)}", "use 1 to learn from the message, or 0")
            message["weight"] = int(weight)
        for key in sorted(item.keys() - MESSAGE_KEYS):
            if not _is_missing(item[key]):
                self.note(f"key {key!r} of messages, which is not used")
        return message

    def _calls_of_text(self, field: str, item: Mapping[str, Any]) -> list[Any]:
        """The calls that are the content of a turn of `CALL_ROLES`."""
        self.note(f"turns of the role {item['role']!r}, taken for calls of tools")
        calls = item.get("content")
        if item.get("tool_calls"):
            raise self.error(field, f"has tool_calls and the role {item['role']}", "keep one of them")
        if isinstance(calls, str):
            try:
                calls = json.loads(calls)
            except (ValueError, RecursionError) as error:
                raise self.error(
                    f"{field}.content",
                    f"is {_short(item['content'])}, no JSON, in a turn of the role {item['role']}",
                    'write it as {"name": ..., "arguments": ...}, or give the turn the role assistant',
                ) from error
        return list(calls) if isinstance(calls, (list, tuple)) and calls else [calls]

    def _refused(self, field: str, role: str, content: Any, refusal: Any) -> Any:
        """The content of a message with a refusal, which OpenAI writes in place of it."""
        if role != "assistant" or (content != "" and content != refusal):
            self.note("key 'refusal' of messages, which is not used")
            return content
        self.note("refusals taken for content")
        return self.checked_text(f"{field}.refusal", refusal)

    def _content(self, field: str, content: Any) -> Any:
        """The text of a content, which may be a list of parts; "" where there is none."""
        if _is_missing(content):
            return ""
        if not isinstance(content, Sequence) or isinstance(content, (str, bytes)):
            return content
        self.note("content in parts")
        texts = []
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("text", "refusal"):
                raise self.error(
                    f"{field}[{i}]", f"is a part of type {_short(kind)}, and only text is supported", "remove the row"
                )
            texts.append(self.checked_text(f"{field}[{i}].{kind}", part.get(kind)))
        return "".join(texts)

    def _tool_calls(self, field: str, role: str, calls: Any) -> list[Any]:
        """Calls of tools; arguments that are JSON in a string, as OpenAI has them, are read, for templates write them again."""
        if role != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
            raise self.error(
                field, f"is {_short(calls)} of a {role} message", "give a list of calls to an assistant message"
            )
        return [self._tool_call(f"{field}[{i}]", call) for i, call in enumerate(calls)]

    def _tool_call(self, field: str, call: Any) -> dict[str, Any]:
        """A call as chat templates take it, also of one without `function` around it."""
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise self.error(field, f"is {_short(call)}, without the name of a function", "give it one")
        present = {key for key, value in function.items() if not _is_missing(value)}
        others = present - FUNCTION_KEYS - (CALL_KEYS if function is call else set())
        if function is not call:
            others |= {key for key, value in call.items() if not _is_missing(value)} - CALL_KEYS - {"function"}
        # A key that is not read would be a part of the call that is never learnt.
        if others:
            raise self.error(
                field,
                f"has {_listed(dict.fromkeys(sorted(others, key=str)))}, which a call does not have",
                "give it a name and arguments, maybe an id and the type function",
            )
        self.checked_text(f"{field}.name", function["name"])
        named = [key for key in ARGUMENT_KEYS if key in present]
        if len(named) > 1:
            raise self.error(field, f"has {' and '.join(named)}, which mean the same", "keep one of them")
        arguments = function[named[0]] if named else {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise self.error(f"{field}.{named[0]}", "is no JSON", "fix the row") from error
        self._check_json(f"{field}.{named[0] if named else 'arguments'}", arguments)
        made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if not _is_missing(name := call.get("id")):  # templates that name calls need it (Mistral's)
            made["id"] = self.checked_text(f"{field}.id", name)
        return made

    def _check_json(self, field: str, value: Any, depth: int = 0) -> None:
        """Raise DataError unless a template can write `value` as JSON, and a file can hold that."""
        if depth > MAX_DEPTH:
            raise self.error(field, f"is nested more than {MAX_DEPTH} deep", "make it flatter")
        if isinstance(value, Mapping):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise self.error(field, f"has the key {_short(key)}, which is no string", "write it as a string")
                self._check_json(field, key, depth + 1)
                self._check_json(f"{field}.{key[:20]}", item, depth + 1)
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                self._check_json(f"{field}[{i}]", item, depth + 1)
        elif isinstance(value, str):
            if value.strip():
                self.checked_text(field, value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise self.error(field, f"is {value}, which is no JSON", "write null or a number")
        elif value is not None and not isinstance(value, (bool, int, float)):
            raise self.error(
                field, f"is {_short(value)}, a {type(value).__name__}, which is no JSON", "write it as text or a number"
            )


def unused_note(column: str) -> str:
    """The note of a row with content that nothing uses."""
    return f"column {column!r}, which is not used"


def _column(values: Mapping[str, Any], path: str) -> str:
    """The column that a path begins in."""
    return path if path in values else path.partition(".")[0]


def _is_metadata(column: str) -> bool:
    name = column.lower()
    return name in METADATA_COLUMNS or name.endswith(("_id", "_idx", "_index")) or name.startswith("__index_level_")


def _is_empty(value: Any) -> bool:
    """Missing, blank, or records and lists of nothing else."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        value = list(value.values())
    # A list of lists may be deep, and what is in one is not nothing.
    return _is_missing(value) or (
        isinstance(value, (list, tuple)) and all(item is None or item == "" for item in value)
    )


def _is_missing(value: Any) -> bool:
    """Null, or NaN, as tables write what is missing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _lookup(values: Mapping[str, Any], column: str) -> Any:
    if column in values:
        return values[column]
    node: Any = values
    for part in column.split("."):
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return _MISSING
    return node


def _remedy(field: str) -> str:
    return f"add it, or map it with fields: {{{field}: <column>}}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, values)) or "no columns"


def _short(value: Any) -> str:
    try:
        shown = repr(value)
    except RecursionError:
        return "nested too deeply to be shown"
    return shown if len(shown) <= 40 else shown[:37] + "..."
