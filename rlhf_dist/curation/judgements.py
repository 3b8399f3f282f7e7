"""Judgements of pairs of responses: the record that people and judges write, and preference records made of them.

One line a judgement:

    {"item": id, "annotator": name, "choice": "a" | "b" | "tie" | "both_bad" | "skip", "shown": [i, j],
     "criteria": {"helpful": "a" | "b" | "tie"}, "comment": text, "seconds": number, "time": ISO 8601, UTC}

`shown` are the candidates that stood left (A) and right (B). A later judgement of an annotator about the same pair replaces
the earlier one, whichever way round they stood; the choice "withdrawn" takes it back. How far annotators agree:
`agreement.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf_dist.core.errors import DataError
from rlhf_dist.curation.candidates import Item, Messages, is_text
from rlhf_dist.curation.journal import read_journal

CHOICES = ("a", "b", "tie", "both_bad", "skip")
WITHDRAWN = "withdrawn"
CRITERION_CHOICES = ("a", "b", "tie")
Policy = Literal["majority", "plurality", "unanimous", "each"]
"""What a pair of several votes becomes.

`majority`: the response that more than half of the votes prefer (a tie and "both bad" are votes). `plurality`: the one that
more votes prefer than the other (votes for neither do not count). `unanimous`: the one that all votes prefer. `each`: one
record for every vote that prefers one. Who skipped did not vote.
"""


@dataclass(frozen=True)
class Judgement:
    """What one annotator said about two candidates of one item."""

    item: str
    annotator: str
    choice: str
    """One of `CHOICES`, or `WITHDRAWN`."""
    shown: tuple[int, int]
    """Candidates at the left (A) and the right (B), counted from 0."""
    criteria: Mapping[str, str] = field(default_factory=dict)
    """Criterion → "a", "b" or "tie"."""
    comment: str = ""
    seconds: float | None = None
    """From showing to choosing."""
    time: str = ""
    """ISO 8601, UTC."""

    @property
    def pair(self) -> tuple[int, int]:
        """The two candidates, the lower index first."""
        i, j = self.shown
        return (i, j) if i < j else (j, i)

    @property
    def key(self) -> tuple[str, str, tuple[int, int]]:
        """Annotator, item and pair: of these there is one judgement."""
        return self.annotator, self.item, self.pair

    @property
    def preferred(self) -> int | None:
        """The candidate that was chosen, where one was."""
        return {"a": self.shown[0], "b": self.shown[1]}.get(self.choice)

    @property
    def is_vote(self) -> bool:
        """Whether it says something about the pair: neither skipped nor withdrawn."""
        return self.choice not in ("skip", WITHDRAWN)

    def entry(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "item": self.item,
            "annotator": self.annotator,
            "choice": self.choice,
            "shown": list(self.shown),
            "criteria": dict(self.criteria),
            "comment": self.comment,
            "seconds": self.seconds,
            "time": self.time,
        }


def parse_judgement(entry: Mapping[str, Any], location: str) -> Judgement:
    """A line of a file of judgements. `criteria`, `comment`, `seconds` and `time` may be absent.

    Raises:
        DataError: a field that is missing or has a value that it cannot have.
    """

    def reject(name: str, constraint: str) -> DataError:
        return DataError(f"{location}: {name} is {entry.get(name)!r}, which is not {constraint}; fix the line")

    for name in ("item", "annotator"):
        if not isinstance(entry.get(name), str) or not entry[name]:
            raise reject(name, "a text")
    if entry.get("choice") not in (*CHOICES, WITHDRAWN):
        raise reject("choice", f"one of {', '.join(CHOICES)}")
    shown = entry.get("shown")
    if (
        not isinstance(shown, Sequence)
        or len(shown) != 2
        or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in shown)
        or shown[0] == shown[1]
    ):
        raise reject("shown", "two different candidates, counted from 0")
    criteria = entry.get("criteria") or {}
    if not isinstance(criteria, Mapping) or any(value not in CRITERION_CHOICES for value in criteria.values()):
        raise reject("criteria", f"a mapping of criteria to {', '.join(CRITERION_CHOICES)}")
    seconds = entry.get("seconds")
    if seconds is not None and (
        isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf
    ):
        raise reject("seconds", "a number of 0 or more")
    comment, time = entry.get("comment") or "", entry.get("time") or ""
    if not isinstance(comment, str) or not isinstance(time, str):
        raise reject("time" if isinstance(comment, str) else "comment", "a text")
    return Judgement(
        item=entry["item"],
        annotator=entry["annotator"],
        choice=entry["choice"],
        shown=(shown[0], shown[1]),
        criteria=dict(criteria),
        comment=comment,
        seconds=seconds,
        time=time,
    )


def read_judgements(path: Path) -> list[Judgement]:
    """What is in a file of judgements, every line, the oldest first; also while another process writes it.

    Raises:
        DataError: there is no such file, or a line of it is not a judgement.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist, so nothing has been judged yet; give a file of judgements")
    return [parse_judgement(entry, f"{path}:{number}") for number, entry in enumerate(read_journal(path), start=1)]


def latest(judgements: Iterable[Judgement]) -> list[Judgement]:
    """What holds: each annotator's last word on a pair, without what was withdrawn, in the order of the last words."""
    last: dict[tuple[str, str, tuple[int, int]], Judgement] = {}
    for judgement in judgements:
        last.pop(judgement.key, None)
        if judgement.choice != WITHDRAWN:
            last[judgement.key] = judgement
    return list(last.values())


def check_items(judgements: Iterable[Judgement], items: Mapping[str, Item], place: Path) -> None:
    """Reject judgements of another set of prompts.

    Raises:
        DataError: one is about an item that is not in `items`, or about a candidate that the item does not have.
    """
    unknown: Counter[str] = Counter()
    for judgement in judgements:
        if judgement.item not in items:
            unknown[judgement.item] += 1
        elif max(judgement.shown) >= len(items[judgement.item].candidates):
            raise DataError(
                f"{place}: a judgement of {judgement.annotator} is about candidates {list(judgement.shown)} of item "
                f"{judgement.item}, which has {len(items[judgement.item].candidates)}; the file belongs to other sources"
            )
    if unknown:
        raise DataError(
            f"{place} holds {sum(unknown.values())} judgements of items that are not in the sources (such as "
            f"{next(iter(unknown))}): it was made with other prompts or other candidates, and judgements are not carried "
            "over to texts that nobody saw. Give the sources it was made with, or another out_dir."
        )


@dataclass(frozen=True)
class Tally:
    """The votes of all annotators on one pair of candidates."""

    item: str
    pair: tuple[int, int]
    judgements: tuple[Judgement, ...]
    """Those that are votes."""

    def preferring(self, candidate: int) -> int:
        """Votes for a candidate."""
        return sum(judgement.preferred == candidate for judgement in self.judgements)

    @property
    def neither(self) -> int:
        """Votes for a tie or "both bad"."""
        return sum(judgement.preferred is None for judgement in self.judgements)

    def winner(self, policy: Policy) -> int | None:
        """The preferred candidate by a policy other than `each`, where there is one."""
        first, second = (self.preferring(candidate) for candidate in self.pair)
        most, best = max((first, self.pair[0]), (second, self.pair[1]), key=lambda entry: entry[0])
        if policy == "majority":
            return best if 2 * most > len(self.judgements) else None
        if policy == "unanimous":
            return best if most == len(self.judgements) else None
        return None if first == second else best


def tallies(judgements: Iterable[Judgement]) -> list[Tally]:
    """What holds of `judgements`, gathered by pair, in the order of each pair's first vote."""
    votes: dict[tuple[str, tuple[int, int]], list[Judgement]] = {}
    for judgement in latest(judgements):
        if judgement.is_vote:
            votes.setdefault((judgement.item, judgement.pair), []).append(judgement)
    return [Tally(item, pair, tuple(found)) for (item, pair), found in votes.items()]


def preference_records(
    items: Mapping[str, Item],
    judgements: Iterable[Judgement],
    policy: Policy,
    *,
    source: str = "",
    margins: bool = True,
) -> Iterator[dict[str, Any]]:
    """Records of kind `preference`: prompt, chosen, rejected, provenance, and a margin where votes give one.

    The margin is the share of votes for `chosen` less that for `rejected`, in (0, 1]. Where one person judged a pair it
    would say nothing, and under `each` votes are not put together: then there is none. Pairs that nobody prefers a response
    of (or not by the policy), and winners that are empty texts, give no record.

    Args:
        items: by id; every judgement's item is in it (`check_items`).
        judgements: of any number of annotators.
        policy: see `Policy`.
        source: the name of the set; written as `source` where it is not "".
        margins: whether margins are written.
    """
    for tally in tallies(judgements):
        item = items[tally.item]
        if policy == "each":
            for judgement in tally.judgements:
                if judgement.preferred is not None:
                    yield from _record(item, tally, judgement.preferred, (judgement,), source, margins)
        elif (winner := tally.winner(policy)) is not None:
            yield from _record(item, tally, winner, tally.judgements, source, margins)


def _record(
    item: Item, tally: Tally, winner: int, judgements: Sequence[Judgement], source: str, margins: bool
) -> Iterator[dict[str, Any]]:
    loser = sum(tally.pair) - winner
    chosen, rejected = item.candidates[winner], item.candidates[loser]
    if not all(message["content"].strip() or message.get("tool_calls") for message in (*chosen, *rejected)):
        return  # a trainer needs text, or a call of a tool, on both sides
    record: dict[str, Any] = {
        "prompt": response_record(item.prompt, "user"),
        "chosen": response_record(chosen, "assistant"),
        "rejected": response_record(rejected, "assistant"),
    }
    if item.tools:
        record["tools"] = list(item.tools)
    for_chosen = sum(judgement.preferred == winner for judgement in judgements)
    for_rejected = sum(judgement.preferred == loser for judgement in judgements)
    if margins and len(judgements) > 1:
        record["margin"] = (for_chosen - for_rejected) / len(judgements)
    if source:
        record["source"] = source
    provenance = {
        "item": item.id,
        "candidates": [winner, loser],
        "models": [item.models[winner], item.models[loser]],
        "annotators": [judgement.annotator for judgement in judgements],
        "votes": {
            "chosen": for_chosen,
            "rejected": for_rejected,
            "tie": sum(judgement.choice == "tie" for judgement in judgements),
            "both_bad": sum(judgement.choice == "both_bad" for judgement in judgements),
        },
    }
    comments = [judgement.comment for judgement in judgements if judgement.comment]
    criteria = _criteria(judgements, winner)
    yield record | {
        "provenance": provenance
        | ({"criteria": criteria} if criteria else {})
        | ({"comments": comments} if comments else {})
    }


def _criteria(judgements: Sequence[Judgement], winner: int) -> dict[str, dict[str, int]]:
    """Votes by criterion, told by `chosen` and `rejected` instead of A and B."""
    counts: dict[str, dict[str, int]] = {}
    for judgement in judgements:
        for name, value in judgement.criteria.items():
            side = {"a": judgement.shown[0], "b": judgement.shown[1]}.get(value)
            told = "tie" if side is None else "chosen" if side == winner else "rejected"
            of_name = counts.setdefault(name, {"chosen": 0, "rejected": 0, "tie": 0})
            of_name[told] += 1
    return counts


def response_record(messages: Messages, role: str) -> str | list[dict[str, Any]]:
    """Messages as a preference record holds them: a text where it is one message of `role` that is read back as it is."""
    if is_text(messages, role) and not _looks_like_a_dialogue(messages[0]["content"]):
        return messages[0]["content"]
    return [dict(message) for message in messages]


def _looks_like_a_dialogue(text: str) -> bool:
    """A text that begins so would be read as the HH form (`data/preferences.py`)."""
    return text.lstrip().startswith("Human:")
