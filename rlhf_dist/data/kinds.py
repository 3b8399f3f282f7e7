"""The kinds of records: one class each, with its fields, its parsing, its subject and its uses.

A new kind is a class here, an entry in `KINDS`, and its name in `RecordKind` (`config/data.py`). What a kind can be used for
is what its class implements:

    use                     method              gives
    supervised training     `sequence`          Conversation or Text
    reward modeling         `preference`        Preference, or what `paired` makes preferences of
    prompts                 `prompt`            the messages that a model continues
    pipeline sets           `subject`           what a split keeps together; validates the fields that every use needs
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rlhf_dist.config.data import DataSource, RecordKind
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.data.fields import Fields
from rlhf_dist.data.preferences import (
    answerable,
    chat_messages,
    pair_by_rating,
    preference_messages,
    preference_of,
    prompt_messages,
)
from rlhf_dist.data.records import (
    Conversation,
    Messages,
    Preference,
    Text,
    before_last_response,
    turns_of,
)

Use = Literal["supervised training", "reward modeling", "prompts"]


class Kind:
    """A kind of records. Methods raise `DataError` (place, field, value, remedy) for an invalid row."""

    fields: ClassVar[tuple[str, ...]]
    """Fields that the kind has."""
    uses: ClassVar[tuple[Use, ...]] = ()
    line_field: ClassVar[str | None] = None
    """The field that a line of a .txt file is; None: the kind needs columns."""

    def subject(self, row: Fields) -> Hashable:
        """What keeps records together in a split: the same as `Record.subject` of what is read from the row."""
        return turns_of(self.prompt(row))

    def sequence(self, row: Fields, task: str) -> Conversation | Text:
        """The record that a language model is trained on."""
        raise NotImplementedError

    def preference(self, row: Fields, use_margins: bool) -> Any:
        """A preference, or what `paired` makes them of. `use_margins` False: the field `margin` is not read."""
        raise NotImplementedError

    def paired(self, found: Iterable[Any], source: DataSource, seed: int) -> Iterable[Preference]:
        """The preferences of what `preference` gave for the rows of a source."""
        return found

    def prompt(self, row: Fields) -> Messages:
        """The messages that a model is to continue."""
        raise NotImplementedError


class InstructionKind(Kind):
    """User message: `demonstration` (a worked example), `instruction` and `input`, those there are, separated by empty lines.
    Assistant message: `output`. Before them: `system`, and the turns of `history`, which are not trained on. With
    `templates`, rows of any columns are rendered into such records first."""

    fields = ("instruction", "input", "output", "demonstration", "system", "history", "tools", "task")
    uses = ("supervised training", "prompts")

    def subject(self, row: Fields) -> Hashable:
        if (prompt := _before_completion(row, "instruction")) is not None:
            return turns_of(prompt)
        if row.get("output") is not None:  # as prompts, instructions need none
            row.text("output")
        return _labeled_row(row) or turns_of(self.prompt(row))

    def sequence(self, row: Fields, task: str) -> Conversation:
        if (prompt := _before_completion(row, "instruction")) is not None:
            return _completed(row, prompt, task)
        prompt = self.prompt(row)
        messages = (*prompt, {"role": "assistant", "content": row.text("output")})
        targets = (len(prompt),) if any(message["role"] == "assistant" for message in prompt) else None
        return Conversation(messages, row.location, task, targets, row.tools(), _labeled_row(row))

    def prompt(self, row: Fields) -> Messages:
        if (prompt := _before_completion(row, "instruction")) is not None:
            return answerable(row, "prompt", prompt)
        parts = (row.optional_text("demonstration"), row.text("instruction"), row.optional_text("input"))
        user = _user("\n\n".join(part for part in parts if part))
        return row.with_system((*_history(row), user))


class MessagesKind(Kind):
    """A chat, as a list of messages or as text in the HH format. Trained on every assistant turn whose `weight` is not 0; as a
    prompt, what comes before the last one. In a column `conversations` (ShareGPT) the turns before the first user's are
    dropped; `prompt` and `completion` (TRL) are a chat of which the completion is trained on. `system` comes before a chat
    that has no system turn, here and in the other kinds."""

    fields = ("messages", "system", "tools", "task")
    uses = ("supervised training", "prompts")

    def subject(self, row: Fields) -> Hashable:
        return turns_of(self._before_response(row))

    def sequence(self, row: Fields, task: str) -> Conversation:
        if (prompt := _before_completion(row, "messages")) is not None:
            return _completed(row, prompt, task)
        messages = self._chat(row, keep_weights=True)
        weighted = any("weight" in message for message in messages)
        targets = tuple(_targets(messages)) if weighted else None
        return Conversation(_plain(messages), row.location, task, targets, row.tools())

    def prompt(self, row: Fields) -> Messages:
        return answerable(row, "messages", self._before_response(row))

    def _before_response(self, row: Fields) -> Messages:
        prompt = _before_completion(row, "messages")
        return before_last_response(self._chat(row)) if prompt is None else prompt

    def _chat(self, row: Fields, keep_weights: bool = False) -> Messages:
        field = "messages"
        if row.get("messages") is None and row.get("conversations") is not None:
            field = "conversations"
            row.note("column 'conversations' taken for messages")
        messages = chat_messages(row, field, keep_weights)
        first = row.get(field)[0]
        if field == "messages" and not (isinstance(first, Mapping) and "from" in first):
            return row.with_system(messages)
        leading = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
        dropped = [i for i in range(leading) if messages[i]["role"] == "assistant"]
        if dropped:
            row.note("assistant turns before the first user turn, which are dropped")
        return row.with_system([message for i, message in enumerate(messages) if i not in dropped])


class TextKind(Kind):
    """Plain text, trained on every token."""

    fields = ("text", "task")
    uses = ("supervised training",)
    line_field = "text"

    def subject(self, row: Fields) -> Hashable:
        return row.text("text").strip()

    def sequence(self, row: Fields, task: str) -> Text:
        return Text(row.text("text"), row.location, task)


class PreferenceKind(Kind):
    """A pair (`chosen`, `rejected`, optional `margin`) or a ranking (`responses`, best first, optional `ratings`, whose
    differences are the margins). Responses of equal rating are tied; one that equals a better one is dropped. The formats,
    and rows that could be both: `preferences.py`."""

    fields = ("prompt", "chosen", "rejected", "margin", "responses", "ratings", "system", "tools")
    uses = ("reward modeling", "prompts")

    def preference(self, row: Fields, use_margins: bool) -> Preference:
        return preference_of(row, use_margins)

    def prompt(self, row: Fields) -> Messages:
        return preference_messages(row)[0]


@dataclass(frozen=True)
class Rated:
    """A response with its rating."""

    prompt: Messages
    response: str
    rating: float
    location: str


class RatingsKind(Kind):
    """Rated responses, of which pairs of one prompt are made. Without a `prompt`, a response is rated as plain text."""

    fields = ("prompt", "response", "rating", "system")
    uses = ("reward modeling",)

    def subject(self, row: Fields) -> Hashable:
        rated = self.preference(row, use_margins=False)
        return turns_of(rated.prompt) if rated.prompt else rated.response.strip()

    def preference(self, row: Fields, use_margins: bool) -> Rated:
        prompt = row.optional_text("prompt")
        messages = row.with_system((_user(prompt),)) if prompt else ()
        return Rated(messages, row.text("response"), row.number("rating"), row.location)

    def paired(self, found: Iterable[Rated], source: DataSource, seed: int) -> list[Preference]:
        groups: dict[tuple[str, ...], list[Rated]] = {}
        for rated in found:
            groups.setdefault(tuple(message["content"] for message in rated.prompt), []).append(rated)
        pairs = []
        for number, group in enumerate(groups.values()):
            for i, j in pair_by_rating([rated.rating for rated in group], seed, source.min_margin, group=number):
                better, worse = group[i], group[j]
                pairs.append(
                    Preference(
                        prompt=better.prompt,
                        responses=tuple(({"role": "assistant", "content": r.response},) for r in (better, worse)),
                        location=f"{better.location} over {worse.location}",
                        ratings=(better.rating, worse.rating),
                    )
                )
        if not pairs:
            raise DataError(
                f"{source.path}: no two responses to one prompt differ in rating by min_margin {source.min_margin} or "
                "more; lower min_margin, or give more rated responses a prompt"
            )
        return pairs


class PromptKind(Kind):
    """One user message, or a chat that ends with one or with the result of a tool."""

    fields = ("prompt", "system", "tools")
    uses = ("prompts",)
    line_field = "prompt"

    def subject(self, row: Fields) -> Hashable:
        return turns_of(_string_or_chat(row))

    def prompt(self, row: Fields) -> Messages:
        return answerable(row, "prompt", _string_or_chat(row))


class CandidatesKind(Kind):
    """A prompt with responses that nobody has judged yet; `curation/candidates.py` reads them."""

    fields = ("prompt", "candidates", "system", "tools")

    def subject(self, row: Fields) -> Hashable:
        row.items("candidates")
        return turns_of(_string_or_chat(row))


KINDS: Mapping[RecordKind, Kind] = {
    "instruction": InstructionKind(),
    "messages": MessagesKind(),
    "text": TextKind(),
    "preference": PreferenceKind(),
    "ratings": RatingsKind(),
    "prompt": PromptKind(),
    "candidates": CandidatesKind(),
}


def kind_of(source: DataSource, use: Use) -> Kind:
    """The kind of a source that is used for `use`.

    Raises:
        ConfigError: the kind has no such use.
    """
    kind = KINDS[source.kind]
    if use not in kind.uses:
        suitable = ", ".join(name for name, other in KINDS.items() if use in other.uses)
        raise ConfigError(f"{source.path}: kind {source.kind!r} is not supported for {use}; use one of {suitable}")
    return kind


def _before_completion(row: Fields, field: str) -> Messages | None:
    """The prompt of a row with `prompt` and `completion` in place of `field`; None where it is none."""
    if row.get(field) is not None or row.get("prompt") is None or row.get("completion") is None:
        return None
    row.note("columns 'prompt' and 'completion'")
    return _string_or_chat(row)


def _completed(row: Fields, prompt: Messages, task: str) -> Conversation:
    """The chat of a row with `prompt` and `completion`, of which the latter is trained on."""
    if isinstance(row.required("completion"), str):
        completion: Messages = ({"role": "assistant", "content": row.text("completion")},)
    else:
        completion = row.messages("completion", keep_weights=True)
    messages = (*prompt, *completion)
    targets = tuple(i for i in _targets(messages) if i >= len(prompt))
    return Conversation(_plain(messages), row.location, task, targets, row.tools())


def _targets(messages: Messages) -> Iterator[int]:
    """Positions of the assistant messages whose weight is not 0."""
    return (i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1))


def _plain(messages: Messages) -> Messages:
    """Without weights."""
    return tuple({key: value for key, value in message.items() if key != "weight"} for message in messages)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _string_or_chat(row: Fields) -> Messages:
    if isinstance(row.required("prompt"), str):
        row.text("prompt")  # one that is blank is not absent
    return row.with_system(prompt_messages(row))


def _history(row: Fields) -> Messages:
    """The turns before an instruction: messages, or pairs of what the user and the assistant said (Alpaca)."""
    value = row.get("history")
    if not row.is_mapped("history") and not isinstance(value, (list, tuple)):
        row.note_unused("history")
        return ()
    if value is None or len(turns := row.items("history")) == 0:
        return ()
    if not row.is_mapped("history"):
        row.note("column 'history' taken for the turns before the instruction")
    if all(isinstance(turn, Mapping) for turn in turns):
        return row.messages("history")
    messages: list[dict[str, str]] = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise row.error(
                f"history[{i}]", "is no pair of what the user and the assistant said", "write it as [text, text]"
            )
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": row.checked_text(f"history[{i}]", text)})
    return tuple(messages)


def _labeled_row(row: Fields) -> str:
    """As `Conversation.row`, also of records that `data templates` has written to a file."""
    made = row.values.get("provenance")
    place = made.get("row") if isinstance(made, Mapping) and "template" in made else None
    return place if isinstance(place, str) else ""
