"""Typed records, each with the place it came from; what a split keeps together; duplicates and contradictions."""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

from rlhf_dist.config.data import BadRowPolicy
from rlhf_dist.data.chat_template import Message

Messages = tuple[Message, ...]


def turns_of(messages: Sequence[Message]) -> Hashable:
    """A dialogue's identity: roles and texts, without surrounding white space, and whatever else its messages have."""
    return tuple((message["role"], (message["content"] or "").strip(), *_others(message)) for message in messages)


def _others(message: Message) -> list[str]:
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    return [json.dumps(rest, sort_keys=True, default=str)] if rest else []


def before_last_response(messages: Messages) -> Messages:
    """The messages before the last assistant turn; all where there is none."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: turns[-1]] if turns else messages


def arranged(
    messages: Messages,
    system: Literal["keep", "merge_into_user"],
    same_role_turns: Literal["keep", "merge"],
    targets: Collection[int] | None = None,
) -> tuple[Messages, list[int]]:
    """(messages as a chat template is to get them, where each is among them): see `DataSettings`. A system message that no user
    message follows stays. A message of `targets` is not joined with one that is not learnt from."""
    found: list[Message] = []
    moved: list[int] = []
    waiting: list[str] = []
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        if message["role"] == "system" and system == "merge_into_user" and i < last_user:
            waiting += [message["content"]] if message["content"] else []
        else:
            if message["role"] == "user" and waiting:
                message = {**message, "content": "\n\n".join([*waiting, message["content"]])}
                waiting = []
            is_alike = targets is None or (i in targets) == (i - 1 in targets)
            if same_role_turns == "merge" and found and is_alike and _joinable(found[-1], message):
                found[-1] = {**message, "content": "\n\n".join([found[-1]["content"], message["content"]])}
            else:
                found.append(message)
        moved.append(max(len(found) - 1, 0))
    return tuple(found), moved


def _joinable(first: Message, second: Message) -> bool:
    return first["role"] == second["role"] and first.keys() == second.keys() == {"role", "content"}


@dataclass(frozen=True)
class Conversation:
    """A chat with at least one assistant turn to learn from."""

    messages: Messages
    location: str
    task: str = ""
    """The task that it is an example of; "" where tasks are not read, or the record has none."""
    targets: tuple[int, ...] | None = None
    """Positions of the assistant messages to learn from; None: all."""
    tools: tuple[Any, ...] = ()
    """Descriptions of tools, for the chat template."""
    row: str = ""
    """Place of the labeled row that a template rendered it from; "" where none did."""
    on_bad_row: BadRowPolicy = "error"
    """Of its source, for a record that turns out invalid when it is tokenized."""

    @property
    def subject(self) -> Hashable:
        """Records of one subject stay on one side of a split: those of one labeled row, or of one prompt."""
        return self.row or turns_of(before_last_response(self.messages))

    @property
    def content(self) -> Hashable:
        """What makes two records duplicates."""
        return _exactly(self.messages), self.targets, _tools(self.tools)


@dataclass(frozen=True)
class Text:
    """Plain text."""

    text: str
    location: str
    task: str = ""
    """As in `Conversation`."""
    on_bad_row: BadRowPolicy = "error"
    """As in `Conversation`."""

    @property
    def subject(self) -> Hashable:
        """As in `Conversation`: the text, without surrounding white space."""
        return self.text.strip()

    @property
    def content(self) -> Hashable:
        """As in `Conversation`."""
        return self.text


@dataclass(frozen=True)
class Preference:
    """Two or more responses to one prompt, best first."""

    prompt: Messages
    """Empty: the responses are plain texts."""
    responses: tuple[Messages, ...]
    """Each begins and ends with an assistant message."""
    location: str
    ratings: tuple[float, ...] | None = None
    """Of each response, non-increasing; margins are their differences. None where the data has none."""
    ranks: tuple[int, ...] = ()
    """Of each response, non-decreasing from 0; equal ranks are a tie. Default: no ties."""
    num_repeated: int = 0
    """Responses of the row that were dropped because they equal a better one."""
    on_bad_row: BadRowPolicy = "error"
    """As in `Conversation`."""
    tools: tuple[Any, ...] = ()
    """As in `Conversation`."""

    def __post_init__(self) -> None:
        if not self.ranks:
            object.__setattr__(self, "ranks", tuple(range(len(self.responses))))

    def of(self, kept: Sequence[int]) -> Preference:
        """With the responses `kept` only (increasing positions). A rank is the number of better-ranked responses."""
        ranks = [self.ranks[i] for i in kept]
        return replace(
            self,
            responses=tuple(self.responses[i] for i in kept),
            ratings=None if self.ratings is None else tuple(self.ratings[i] for i in kept),
            ranks=tuple(map(ranks.index, ranks)),
        )

    @property
    def subject(self) -> Hashable:
        """As in `Conversation`: the prompt. Pairs of plain texts have none, and each is its own subject."""
        return turns_of(self.prompt) if self.prompt else self.location

    @property
    def content(self) -> Hashable:
        """As in `Conversation`: prompt, responses, ranks and tools."""
        return _exactly(self.prompt), tuple(map(_exactly, self.responses)), self.ranks, _tools(self.tools)


@dataclass(frozen=True)
class Prompt:
    """A chat that the assistant is to continue."""

    messages: Messages
    location: str
    on_bad_row: BadRowPolicy = "error"
    """As in `Conversation`."""
    tools: tuple[Any, ...] = ()
    """As in `Conversation`."""

    @property
    def subject(self) -> Hashable:
        """As in `Conversation`."""
        return turns_of(self.messages)

    @property
    def content(self) -> Hashable:
        """As in `Conversation`."""
        return _exactly(self.messages), _tools(self.tools)


Record = Conversation | Text | Preference | Prompt

# Contents are compared by their 64-bit hashes: a million records take little memory, and the probability that two different
# ones among them collide is about 3e-8.


def duplicates(records: Iterable[Record]) -> list[str]:
    """`PLACE as PLACE` for each record whose content equals an earlier one's exactly."""
    first: dict[int, str] = {}
    found = []
    for record in records:
        content = hash(record.content)
        if content in first:
            found.append(f"{record.location} as {first[content]}")
        else:
            first[content] = record.location
    return found


def contradictions(preferences: Iterable[Preference]) -> list[str]:
    """`PLACE against PLACE` for each record that orders two responses opposite to an earlier record of the same prompt."""
    first: dict[int, str] = {}
    found = []
    for record in preferences:
        prompt, texts = _exactly(record.prompt), [_exactly(response) for response in record.responses]
        pairs = [(i, j) for i, j in combinations(range(len(texts)), 2) if record.ranks[i] < record.ranks[j]]
        against = (first.get(hash((prompt, texts[worse], texts[better]))) for better, worse in pairs)
        if (earlier := next(filter(None, against), None)) is not None:
            found.append(f"{record.location} against {earlier}")
        for better, worse in pairs:
            first.setdefault(hash((prompt, texts[better], texts[worse])), record.location)
    return found


def _tools(tools: Sequence[Any]) -> str:
    return json.dumps(tools, default=str)


def _exactly(messages: Sequence[Message]) -> Hashable:
    return tuple((message["role"], message["content"], *_others(message)) for message in messages)
