"""Rows of any format and kind → typed records, each with the place it came from.

How the kinds are read:

- `instruction`: the user message is `instruction`, then `input` after an empty line where there is one; the assistant's
  is `output`. A `demonstration` (a worked example) goes before the instruction, with an empty line between. With
  `templates`, rows of any columns are rendered into such records first (`templating.py`).
- `messages`: a chat, as a list of messages or as text with "\\n\\nHuman: " and "\\n\\nAssistant: " before the turns. It is
  trained on every assistant turn; as a prompt it is what comes before the last one.
- `text`: plain text, trained on every token.
- `preference`: a pair (`chosen`, `rejected`, and where it is known the `margin` between them) or a ranking (`responses`,
  the best first, and where they are known their `ratings`, whose differences are the margins). Responses of equal rating
  are tied: of the two nothing is learnt. A response that a better one equals is left out. The forms of texts and
  dialogues, and of rows that could be both: `dialogues.py`.
- `ratings`: responses of one prompt with a number each become pairs (`ratings.py`). Without a `prompt`, a response is
  judged as plain text.
- `prompt`: one user message, or a chat that ends with one.
- `candidates`: a prompt with responses that nobody has judged yet; `curation/candidates.py` reads them.

What is trained on may have a `task`: the kind of task that a record is an example of, by which it can be held out.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

from rlhf_dist.config.data import BadRowPolicy, DataSource, RecordKind
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.data.dialogues import chat_messages, is_ranking, preference_messages
from rlhf_dist.data.encoding import Message
from rlhf_dist.data.fields import Fields
from rlhf_dist.data.files import read_rows
from rlhf_dist.data.quarantine import Quarantine
from rlhf_dist.data.ratings import pair_by_rating
from rlhf_dist.data.templating import templated_rows

R = TypeVar("R")

FIELDS: dict[RecordKind, tuple[str, ...]] = {
    "instruction": ("instruction", "input", "output", "demonstration", "task"),
    "messages": ("messages", "task"),
    "text": ("text", "task"),
    "preference": ("prompt", "chosen", "rejected", "margin", "responses", "ratings"),
    "ratings": ("prompt", "response", "rating"),
    "prompt": ("prompt",),
    "candidates": ("prompt", "candidates"),
}
"""Fields that each kind knows."""


@dataclass(frozen=True)
class Conversation:
    """A chat with at least one assistant turn to learn from."""

    messages: tuple[Message, ...]
    location: str
    task: str = ""
    """What kind of task it is an example of; "" where nobody asked, or the record does not say."""
    row: str = ""
    """Place of the labelled row that a template made the record of; "" where none did."""
    on_bad_row: BadRowPolicy = "error"
    """Of its source, for a record that turns out unusable only when it is encoded."""

    @property
    def subject(self) -> Hashable:
        """What a split keeps on one side: the records of one labelled row, or of one prompt."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return self.row or turns_of(self.messages[: turns[-1]] if turns else self.messages)


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
        """What a split keeps on one side: the same text."""
        return self.text.strip()


@dataclass(frozen=True)
class Preference:
    """Two or more continuations of one prompt, in the order of preference."""

    prompt: tuple[Message, ...]
    """Empty: the continuations are plain texts."""
    responses: tuple[tuple[Message, ...], ...]
    """The best first; each begins and ends with an assistant message."""
    location: str
    ratings: tuple[float, ...] | None = None
    """Of each response, falling; by how much one is preferred is their difference. None where the data does not say."""
    ranks: tuple[int, ...] = ()
    """Of each response, rising from 0; equal ranks are a tie. Default: no ties."""
    num_repeated: int = 0
    """Responses of the record that are not here, since a better one has the same text."""
    on_bad_row: BadRowPolicy = "error"
    """As in `Conversation`."""

    def __post_init__(self) -> None:
        if not self.ranks:
            object.__setattr__(self, "ranks", tuple(range(len(self.responses))))

    def of(self, kept: Sequence[int]) -> Preference:
        """With the responses `kept` only (rising positions). A rank counts the responses that stand higher."""
        ranks = [self.ranks[i] for i in kept]
        return replace(
            self,
            responses=tuple(self.responses[i] for i in kept),
            ratings=None if self.ratings is None else tuple(self.ratings[i] for i in kept),
            ranks=tuple(map(ranks.index, ranks)),
        )


@dataclass(frozen=True)
class Prompt:
    """A chat that the assistant is to continue."""

    messages: tuple[Message, ...]
    location: str
    on_bad_row: BadRowPolicy = "error"
    """As in `Conversation`."""


def read_sequences(
    source: DataSource, quarantine: Quarantine | None = None, with_tasks: bool | None = False
) -> list[Conversation | Text]:
    """Records of kinds `instruction`, `messages` and `text`.

    Args:
        source: where they are.
        quarantine: takes the rows that cannot be used, under `source.on_bad_row: skip`.
        with_tasks: read the field `task`, too. Otherwise an unrelated column of that name does no harm; None reads it where
            it is text, and it does none either.

    Raises:
        DataError: what cannot be read, with its place.
        ConfigError: a kind or field name that cannot be meant.
    """
    _check_kind(source, ("instruction", "messages", "text"), "supervised training")
    policy = source.on_bad_row

    def record(row: Fields) -> Conversation | Text:
        task = row.optional_text("task").strip() if with_tasks else ""
        if with_tasks is None and isinstance(found := row.get("task"), str):
            task = found.strip()
        if source.kind == "text":
            return Text(row.text("text"), row.location, task, policy)
        if source.kind == "instruction":
            response = {"role": "assistant", "content": row.text("output")}
            return Conversation((_instruction(row), response), row.location, task, _labelled_row(row), policy)
        return Conversation(chat_messages(row, "messages"), row.location, task, on_bad_row=policy)

    return _read(source, quarantine, record)


def turns_of(messages: Sequence[Message]) -> Hashable:
    """A dialogue as what it is told by: roles and texts, without the white space around them."""
    return tuple((message["role"], message["content"].strip()) for message in messages)


def _labelled_row(row: Fields) -> str:
    """As in `Conversation`, also of records that `data templates` has written to a file."""
    made = row.values.get("provenance")
    place = made.get("row") if isinstance(made, Mapping) and "template" in made else None
    return place if isinstance(place, str) else ""


def _read(source: DataSource, quarantine: Quarantine | None, record: Callable[[Fields], R]) -> list[R]:
    """What `record` makes of the rows that can be used.

    Raises:
        DataError: a bad row under `error`; under `skip`, that no row is left.
    """
    quarantine = Quarantine() if quarantine is None else quarantine
    records: list[R] = []
    known = len(quarantine)
    rows = read_fields(source, quarantine)
    for row in rows if source.templates is None else templated_rows(source, rows, quarantine):
        with quarantine.guard(source.on_bad_row, row.values):
            records.append(record(row))
    if not records:
        bad = quarantine.rows[known:]
        if not bad:
            raise DataError(
                f"{source.path}: every row is passed over by all templates; give others, or mend their `when`"
            )
        raise DataError(
            f"{source.path}: none of its rows can be used ({len(bad)} are bad, the first since {bad[0].reason})"
        )
    return records


def read_preferences(
    source: DataSource, seed: int, use_margins: bool = True, quarantine: Quarantine | None = None
) -> list[Preference]:
    """Pairs and rankings of kind `preference`, and pairs made of kind `ratings` (drawn by `seed`).

    `use_margins` False: the field `margin` of pairs is not read, so that an unrelated column of that name does no harm.
    `quarantine` and errors as in `read_sequences`.
    """
    _check_kind(source, ("preference", "ratings"), "reward modelling")
    if source.kind == "ratings":
        return _rated_pairs(source, seed, quarantine)

    def record(row: Fields) -> Preference:
        prompt, responses = preference_messages(row)
        if is_ranking(row):
            return replace(_ranking(row, prompt, responses), on_bad_row=source.on_bad_row)
        margin = _margin(row) if use_margins else None
        return Preference(prompt, responses, row.location, margin, on_bad_row=source.on_bad_row)

    return _read(source, quarantine, record)


def _ranking(row: Fields, prompt: tuple[Message, ...], responses: tuple[tuple[Message, ...], ...]) -> Preference:
    """Without responses that a better one equals: of equal texts nothing can be learnt."""
    ratings = _ratings(row, len(responses))
    whole = Preference(prompt, responses, row.location, ratings, _ranks(ratings) if ratings else ())
    kept = whole.of([i for i, response in enumerate(responses) if response not in responses[:i]])
    if kept.ratings and kept.ratings[0] == kept.ratings[-1]:
        raise row.error(
            "ratings", f"are all {kept.ratings[0]:g}, so nothing can be learnt from the row", "remove the row"
        )
    return replace(kept, num_repeated=len(responses) - len(kept.responses))


def _margin(row: Fields) -> tuple[float, float] | None:
    """A pair's margin as ratings."""
    if row.get("margin") is None:
        return None
    margin = row.number("margin")
    if margin < 0:
        raise row.error(
            "margin",
            f"is {margin:g}, less than 0, though chosen is the better",
            "exchange chosen and rejected, mend it, or set reward.margin_coef to 0",
        )
    return margin, 0.0


def _ratings(row: Fields, num_responses: int) -> tuple[float, ...] | None:
    if row.get("ratings") is None:
        return None
    values = row.items("ratings")
    if len(values) != num_responses:
        raise row.error(
            "ratings", f"holds {len(values)} numbers for {num_responses} responses", "give each response one rating"
        )
    ratings = tuple(row.checked_number(f"ratings[{i}]", value) for i, value in enumerate(values))
    for i, (here, after) in enumerate(pairwise(ratings)):
        if here < after:
            raise row.error(
                f"ratings[{i}]",
                f"is {here:g}, less than the {after:g} of the next response, though the best stands first",
                "order responses and ratings from best to worst",
            )
    return ratings


def _ranks(ratings: Sequence[float]) -> tuple[int, ...]:
    """Rank of each: how many ratings are higher."""
    return tuple(ratings.index(rating) for rating in ratings)


def read_prompts(source: DataSource, quarantine: Quarantine | None = None) -> list[Prompt]:
    """Prompts of kind `prompt`, or those of `instruction`, `messages` and `preference` records.

    `quarantine` and errors as in `read_sequences`.
    """
    _check_kind(source, ("prompt", "instruction", "messages", "preference"), "prompts")
    return _read(source, quarantine, lambda row: Prompt(_prompt(source, row), row.location, source.on_bad_row))


def _prompt(source: DataSource, row: Fields) -> tuple[Message, ...]:
    if source.kind == "instruction":
        return (_instruction(row),)
    if source.kind == "preference":
        return preference_messages(row)[0]
    field = source.kind
    if source.kind == "prompt" and isinstance(row.required(field), str):
        return ({"role": "user", "content": row.text(field)},)
    messages = chat_messages(row, field)
    if source.kind == "messages":
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        messages = messages[: turns[-1]] if turns else messages
    if not messages or messages[-1]["role"] != "user":
        raise row.error(field, "does not end with a user message for the assistant to answer", "add one")
    return messages


def _instruction(row: Fields) -> Message:
    parts = (row.optional_text("demonstration"), row.text("instruction"), row.optional_text("input"))
    return {"role": "user", "content": "\n\n".join(part for part in parts if part)}


def _rated_pairs(source: DataSource, seed: int, quarantine: Quarantine | None) -> list[Preference]:
    groups: dict[str, list[tuple[str, float, str]]] = {}

    def record(row: Fields) -> tuple[str, tuple[str, float, str]]:
        return row.optional_text("prompt"), (row.text("response"), row.number("rating"), row.location)

    for prompt, rated in _read(source, quarantine, record):
        groups.setdefault(prompt, []).append(rated)
    pairs = []
    for number, (prompt, rated) in enumerate(groups.items()):
        for i, j in pair_by_rating([rating for _, rating, _ in rated], seed, source.min_margin, group=number):
            (better, high, here), (worse, low, there) = rated[i], rated[j]
            pairs.append(
                Preference(
                    prompt=({"role": "user", "content": prompt},) if prompt else (),
                    responses=tuple(({"role": "assistant", "content": text},) for text in (better, worse)),
                    location=f"{here} over {there}",
                    ratings=(high, low),
                    on_bad_row=source.on_bad_row,
                )
            )
    if not pairs:
        raise DataError(
            f"{source.path}: no two responses to one prompt differ in rating by min_margin {source.min_margin} or "
            "more; lower min_margin, or give more rated responses a prompt"
        )
    return pairs


def read_fields(source: DataSource, quarantine: Quarantine | None = None) -> Iterator[Fields]:
    """Rows by field; a mapped column that no row has is refused, since optional fields would hide the misspelling.

    `quarantine` takes the rows that cannot be parsed, under `source.on_bad_row: skip`.
    """
    known = FIELDS[source.kind]
    for field in source.fields if source.templates is None else ():
        if field not in known:
            near = difflib.get_close_matches(field, known, 1)
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise ConfigError(
                f"{source.path}: fields maps {field!r}, which kind {source.kind!r} does not have{hint}; map one of "
                f"{', '.join(known)} to a column"
            )
    unseen = set(source.fields.values())
    for location, values in read_rows(source, quarantine):
        row = Fields(location, values, source.fields)
        unseen = {column for column in unseen if not row.has_column(column)}
        yield row
    if unseen:
        raise DataError(
            f"{source.path}: no row has the column {', '.join(map(repr, sorted(unseen)))} that fields names; give the "
            "name of a column, or remove the mapping"
        )


def _check_kind(source: DataSource, kinds: Sequence[RecordKind], purpose: str) -> None:
    if source.kind not in kinds:
        raise ConfigError(
            f"{source.path}: kind {source.kind!r} cannot be used for {purpose}; use one of {', '.join(kinds)}"
        )
