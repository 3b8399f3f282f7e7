"""Parsing of preference rows in the formats they are published in: prompt, responses (best first), ratings and ranks.

Two responses are in `chosen` and `rejected`, two or more in the list `responses`. A row may have columns of these names
that mean something else: `chosen` and `rejected` are the pair unless `fields` maps `responses`, and only columns that it
maps contradict each other.

- `prompt` with responses: strings, or lists of messages that begin with the assistant's.
- The HH format (Bai et al. 2022): each response contains the whole dialogue, as text with "\\n\\nHuman: " and
  "\\n\\nAssistant: " before the turns, or as messages that begin with the user's. The common prefix is the prompt; if there
  is a `prompt` as well, it must be part of it.
- Rated responses to one prompt, a row each (kind `ratings`), are paired by `pair_by_rating`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from rlhf_dist.core.random import permutation
from rlhf_dist.data.chat_template import Message
from rlhf_dist.data.fields import Fields
from rlhf_dist.data.records import Messages, Preference

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_GENERATION_CUE = re.compile(r"\n\nAssistant:\s*$")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def chat_messages(row: Fields, field: str, keep_weights: bool = False) -> Messages:
    """A chat: a list of messages, or a dialogue as text in the HH format. `keep_weights` as in `Fields.messages`.

    Raises:
        DataError: neither.
    """
    value = row.required(field)
    if isinstance(value, str) and re.match(r"\s*Human:", value):
        return _dialogue(row, field, row.checked_text(field, value))
    return row.checked_messages(field, value, keep_weights)


def preference_messages(row: Fields) -> tuple[Messages, tuple[Messages, ...]]:
    """Prompt and responses (best first) of a preference row. Some responses of a ranking may be equal, but not all.

    Raises:
        DataError: a missing field, mixed formats, dialogues that differ before the last turn, only equal responses.
    """
    values = _responses(row)
    names = list(values)
    turns = [_response(row, name, value) for name, value in values.items()]
    if all(messages == turns[0] for messages in turns):
        raise row.error(
            names[0],
            f"equals its {names[1]} ({turns[0][-1]['content'][:40]!r}), so nothing can be learnt from the row",
            "remove the row",
        )
    whole = [messages[0]["role"] != "assistant" for messages in turns]
    if len(set(whole)) > 1:
        dialogue, other = names[whole.index(True)], names[whole.index(False)]
        raise row.error(dialogue, f"is a whole dialogue and {other!r} is only a response", "write all in one format")
    if all(whole):
        prompt, responses = _split(row, names, turns)
        return row.with_system(prompt), responses
    prompt = prompt_messages(row)
    if not prompt:
        raise row.error(
            "prompt",
            f"is missing, and {_listed(names)} are not whole dialogues",
            'add it, map it with fields: {prompt: <column>}, or write "\\n\\nHuman: ...\\n\\nAssistant: ..." dialogues',
        )
    return row.with_system(answerable(row, "prompt", prompt)), tuple(turns)


def is_ranking(row: Fields) -> bool:
    """Whether a preference row is a ranking (`responses`) rather than a pair (`chosen` and `rejected`).

    Raises:
        DataError: it is both, by the fields that the config maps, or a ranking and half a pair.
    """
    sides = [name for name in ("chosen", "rejected") if row.get(name) is not None]
    if row.get("responses") is None or (len(sides) == 2 and not row.is_mapped("responses")):
        if sides and row.is_mapped("ratings") and row.get("ratings") is not None:
            raise row.error(
                "ratings",
                f"is mapped in a row with {_listed(sides)}, and ratings belong to a ranking",
                "map responses too if the record is a ranking; if it is a pair, remove the mapping and use margin",
            )
        row.note_unused("responses", "ratings")
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
            f"is in a row with {_listed(beside)}, and a row is a ranking or a pair, not both",
            "keep either responses (and ratings) or chosen and rejected (and margin), or map only those of one, "
            "as with fields: {responses: responses}",
        )
    row.note_unused(*sides, "margin")
    return True


def _responses(row: Fields) -> dict[str, Any]:
    """Name in messages → value; best first."""
    if not is_ranking(row):
        return {name: row.required(name) for name in ("chosen", "rejected")}
    values = row.items("responses")
    if len(values) < 2:
        raise row.error(
            "responses", f"has {len(values)}, and a ranking needs at least 2", "add responses, or remove the row"
        )
    return {f"responses[{i}]": value for i, value in enumerate(values)}


def _response(row: Fields, name: str, value: Any) -> Messages:
    """The messages of one response; they end with the assistant's."""
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
    """Turns of an HH text; white space around a turn belongs to the format."""
    _, *parts = _TURN.split(text.lstrip())
    messages: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = _ROLE[speaker]
        content = row.checked_text(f"{field} (turn {len(messages) + 1})", content).strip()
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _split(row: Fields, names: Sequence[str], turns: Sequence[Messages]) -> tuple[Messages, tuple[Messages, ...]]:
    """Common prefix and the remainders of whole dialogues."""
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
    stated = prompt_messages(row)
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


def prompt_messages(row: Fields) -> Messages:
    """The field `prompt`: a user's text, a dialogue as text in the HH format, or a chat; () where the row has none."""
    value: Any = row.get("prompt")
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    if isinstance(value, str):
        text = row.checked_text("prompt", value)
        if not re.match(r"\s*Human:", text):
            return ({"role": "user", "content": text},)
        row.note("prompts in the HH format")
        return _dialogue(row, "prompt", _GENERATION_CUE.sub("", text))
    return row.messages("prompt")


def answerable(row: Fields, field: str, messages: Messages) -> Messages:
    """`messages`, if the assistant may speak next: after the user, or after the result of a tool.

    Raises:
        DataError: they end otherwise, or there are none.
    """
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise row.error(
            field, "does not end with a user message or the result of a tool", "add the message that is answered"
        )
    return messages


def preference_of(row: Fields, use_margins: bool) -> Preference:
    """The pair or ranking of a preference row. `use_margins` False: the field `margin` of pairs is not read.

    Raises:
        DataError: as `preference_messages`, or invalid margins or ratings.
    """
    prompt, responses = preference_messages(row)
    if is_ranking(row):
        return _ranking(row, prompt, responses)
    return Preference(prompt, responses, row.location, _margin(row) if use_margins else None, tools=row.tools())


def _ranking(row: Fields, prompt: Messages, responses: tuple[Messages, ...]) -> Preference:
    """Without responses that equal a better one: nothing can be learnt from equal texts."""
    ratings = _ratings(row, len(responses))
    ranks = tuple(ratings.index(rating) for rating in ratings) if ratings else ()  # how many ratings are higher
    whole = Preference(prompt, responses, row.location, ratings, ranks, tools=row.tools())
    kept = whole.of([i for i, response in enumerate(responses) if response not in responses[:i]])
    if kept.ratings and kept.ratings[0] == kept.ratings[-1]:
        raise row.error(
            "ratings", f"are all {kept.ratings[0]:g}, so nothing can be learnt from the row", "remove the row"
        )
    return replace(kept, num_repeated=len(responses) - len(kept.responses))


def _margin(row: Fields) -> tuple[float, float] | None:
    """A pair's margin as ratings."""
    if row.get("margin") is None:
        return _score_margin(row)
    margin = row.number("margin")
    if margin < 0:
        raise row.error(
            "margin",
            f"is {margin:g}, less than 0, though chosen is the better",
            "exchange chosen and rejected, fix it, or set reward.margin_coef to 0",
        )
    return margin, 0.0


def _score_margin(row: Fields) -> tuple[float, float] | None:
    """Of the columns `score_chosen` and `score_rejected`, as published data sets have them."""
    if row.get("score_chosen") is None or row.get("score_rejected") is None:
        return None
    row.note("margins of 'score_chosen' and 'score_rejected'")
    chosen, rejected = row.number("score_chosen"), row.number("score_rejected")
    if chosen < rejected:
        raise row.error(
            "score_chosen",
            f"is {chosen:g}, less than score_rejected {rejected:g}, though chosen is the better",
            "exchange chosen and rejected, fix them, or set reward.margin_coef to 0",
        )
    return chosen - rejected, 0.0


def _ratings(row: Fields, num_responses: int) -> tuple[float, ...] | None:
    if row.get("ratings") is None:
        return None
    values = row.items("ratings")
    if len(values) != num_responses:
        raise row.error(
            "ratings", f"has {len(values)} numbers for {num_responses} responses", "give each response one rating"
        )
    ratings = tuple(row.checked_number(f"ratings[{i}]", value) for i, value in enumerate(values))
    for i, (here, after) in enumerate(pairwise(ratings)):
        if here < after:
            raise row.error(
                f"ratings[{i}]",
                f"is {here:g}, less than the {after:g} of the next response, though responses are ordered best first",
                "order responses and ratings from best to worst",
            )
    return ratings


_NUM_ROUNDS = 4
"""Random rounds before the rest is paired by sorting. Each leaves about half of the items without a partner."""


def pair_by_rating(ratings: Sequence[float], seed: int, min_margin: float, group: int = 0) -> list[tuple[int, int]]:
    """Pairs (i, j) of items of which i is rated higher than j, by at least `min_margin`.

    Every item is in at most one pair. Neighbors of a random permutation are paired where they differ enough, the others are
    permuted again; after `_NUM_ROUNDS` rounds the rest is sorted and its lower half is paired with its upper half. The
    result depends on the arguments only; `group` gives each prompt draws of its own.
    """

    def ordered(i: int, j: int) -> tuple[int, int] | None:
        high, low = (i, j) if ratings[i] > ratings[j] else (j, i)
        margin = ratings[high] - ratings[low]
        return (high, low) if margin > 0 and margin >= min_margin else None

    pairs: list[tuple[int, int]] = []
    left = list(range(len(ratings)))
    for shuffle in range(_NUM_ROUNDS):
        order = permutation(seed, f"data/ratings/{shuffle}", group, len(left)).tolist()
        left = [left[k] for k in order]
        unpaired = left[len(left) // 2 * 2 :]
        for i, j in zip(left[::2], left[1::2], strict=False):
            pair = ordered(i, j)
            if pair is None:
                unpaired += [i, j]
            else:
                pairs.append(pair)
        left = unpaired
    # Two pointers over the lower and the upper half of the sorted rest make the most pairs of it.
    left.sort(key=lambda i: ratings[i])
    low = 0
    for high in range((len(left) + 1) // 2, len(left)):
        if low < len(left) // 2 and (pair := ordered(left[low], left[high])):
            pairs.append(pair)
            low += 1
    return pairs
