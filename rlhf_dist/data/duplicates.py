"""Records that stand twice, and preferences that contradict each other."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations

from rlhf_dist.data.encoding import Message
from rlhf_dist.data.records import Conversation, Preference, Prompt, Text

# What was seen is told by its 64-bit hash: a million records take little memory, and that two of them have the same hash by
# chance has a probability of about 3e-8.


def duplicates(records: Iterable[Conversation | Text | Preference | Prompt]) -> list[str]:
    """`PLACE as PLACE` for each record that an earlier one equals to the letter: the same text, the same messages, or the
    same prompt with the same responses in the same ranks."""
    first: dict[int, str] = {}
    found = []
    for record in records:
        content = hash(_content(record))
        if content in first:
            found.append(f"{record.location} as {first[content]}")
        else:
            first[content] = record.location
    return found


def contradictions(preferences: Iterable[Preference]) -> list[str]:
    """`PLACE against PLACE` for each record that puts two responses in the opposite order of an earlier one, to the same
    prompt."""
    first: dict[int, str] = {}
    found = []
    for record in preferences:
        prompt, texts = _turns(record.prompt), [_turns(response) for response in record.responses]
        pairs = [(i, j) for i, j in combinations(range(len(texts)), 2) if record.ranks[i] < record.ranks[j]]
        against = (first.get(hash((prompt, texts[worse], texts[better]))) for better, worse in pairs)
        if (earlier := next(filter(None, against), None)) is not None:
            found.append(f"{record.location} against {earlier}")
        for better, worse in pairs:
            first.setdefault(hash((prompt, texts[better], texts[worse])), record.location)
    return found


def _content(record: Conversation | Text | Preference | Prompt) -> Hashable:
    if isinstance(record, Text):
        return record.text
    if isinstance(record, Preference):
        return _turns(record.prompt), tuple(map(_turns, record.responses)), record.ranks
    return _turns(record.messages)


def _turns(messages: Sequence[Message]) -> Hashable:
    return tuple((message["role"], message["content"]) for message in messages)
