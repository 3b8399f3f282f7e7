"""Labeling by people: which pairs there are, who judges which, how they stand, and what has been judged.

Everything here is the work without the page. Orders and positions are counter-based, drawn for the item's texts and the
annotator's name: items that are appended to the sources change nothing of those that are there, nor does a restart.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal

from rlhf_dist.config.load import dump_yaml
from rlhf_dist.config.yaml_file import read_mapping
from rlhf_dist.core.errors import DataError, RunFolderError
from rlhf_dist.core.random import derived_seed, permutation
from rlhf_dist.curation.candidates import Item
from rlhf_dist.curation.config.label import LabelConfig
from rlhf_dist.curation.journal import Journal
from rlhf_dist.curation.judgements import CHOICES, WITHDRAWN, Judgement, check_items, parse_judgement
from rlhf_dist.run.run_folder import write_atomically

PairPolicy = Literal["all", "chain", "one"]
UnitKey = tuple[str, tuple[int, int]]

JUDGEMENTS = "judgements.jsonl"
CONFIG = "config.yaml"
TOKENS = "tokens.json"
MAX_COMMENT = 10_000
"""Characters of a comment."""


@dataclass(frozen=True)
class Unit:
    """Two candidates of an item: what is judged at a time."""

    item: Item
    pair: tuple[int, int]
    """Rising."""

    @property
    def key(self) -> UnitKey:
        """Item id and pair."""
        return self.item.id, self.pair


@dataclass(frozen=True)
class Shown:
    """A unit as an annotator sees it."""

    unit: Unit
    left: int
    """Candidate shown as A."""
    right: int
    """Candidate shown as B."""
    before: Judgement | None = None
    """What the annotator had said before taking it back."""

    @property
    def token(self) -> str:
        """Names the unit on the page, so that a late key press cannot be taken for an answer to the next pair."""
        return f"{self.unit.item.id}-{self.left}-{self.right}"


def units_of(items: Iterable[Item], pairs: PairPolicy, seed: int) -> list[Unit]:
    """The pairs to judge, in the order of the items. Candidates of the same text never meet.

    Args:
        items: with two or more candidates each.
        pairs: `all`; `chain`: neighbors of a drawn order of the different texts; `one`: one pair drawn of all.
        seed: of the draws.
    """
    units: list[Unit] = []
    for item in items:
        distinct = [i for i, text in enumerate(item.candidates) if text not in item.candidates[:i]]
        drawn = permutation(seed, f"label/pairs/{item.id}", 0, len(distinct)).tolist()
        order = [distinct[k] for k in drawn]
        found = combinations(distinct, 2) if pairs == "all" else list(pairwise(order))[: 1 if pairs == "one" else None]
        units += [Unit(item, (min(pair), max(pair))) for pair in found]
    return units


def shared_out(units: Sequence[Unit], annotators: Sequence[str], overlap: int, seed: int) -> dict[str, frozenset[str]]:
    """Annotator → ids of the items that are theirs. Each item goes, with all its pairs, to `overlap` annotators.

    The first is one of those who have the fewest pairs so far; the others are those who met the chosen least often, among
    the annotators who are not ahead by more than the largest item so far. So loads stay even, and everyone can be compared
    with everyone. Draws decide among equals. Nothing depends on later items.

    Raises:
        ValueError: fewer annotators than `overlap`.
    """
    if not 1 <= overlap <= len(annotators):
        raise ValueError(f"overlap {overlap} among {len(annotators)} annotators")
    sizes: dict[str, int] = {}
    for unit in units:
        sizes[unit.item.id] = sizes.get(unit.item.id, 0) + 1
    ahead = 0
    load = [0] * len(annotators)
    met = [[0] * len(annotators) for _ in annotators]
    given: list[set[str]] = [set() for _ in annotators]
    for item, size in sizes.items():
        ahead = max(ahead, size)
        drawn = permutation(seed, f"label/share/{item}", 0, len(annotators)).tolist()
        left = sorted(range(len(annotators)), key=drawn.__getitem__)
        least = min(load)
        chosen: list[int] = []
        while len(chosen) < overlap:
            best = min(
                left, key=lambda k: (load[k] > least + ahead, sum(met[k][c] for c in chosen), load[k])
            )  # min keeps to the drawn order among equals
            left.remove(best)
            chosen.append(best)
        for k in chosen:
            load[k] += size
            given[k].add(item)
            for c in chosen:
                met[k][c] += 1
    return {name: frozenset(ids) for name, ids in zip(annotators, given, strict=True)}


def open_folder(config: LabelConfig, items: Mapping[str, Item]) -> Journal:
    """The journal of `out_dir`, made or continued.

    Raises:
        RunFolderError: a folder of something else, or one that was begun with settings that would change pairs or
            positions, or that another process writes.
        DataError: it holds judgements of other items.
    """
    out = config.out_dir
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"out_dir {out} is a file; judgements need a folder. Choose another out_dir.")
    if out.exists() and any(out.iterdir()) and not (out / JUDGEMENTS).is_file():
        raise RunFolderError(
            f"out_dir {out} is not empty and holds no judgements (there is no {JUDGEMENTS} in it). Choose another out_dir."
        )
    _check_settings(config)
    journal = Journal(out / JUDGEMENTS)
    try:
        check_items(judgements_of(journal), items, journal.path)
        write_atomically(out / CONFIG, dump_yaml(config))
    except BaseException:
        journal.close()
        raise
    return journal


def _check_settings(config: LabelConfig) -> None:
    """Reject other pairs, positions or shares than those the work was begun with."""
    path = config.out_dir / CONFIG
    if not path.is_file():
        return
    before, _ = read_mapping(path)
    now = config.model_dump(mode="json")
    fixed = ["seed", "pairs", "overlap", *(["annotators"] if config.overlap is not None else [])]
    for key in fixed:
        if before.get(key) != now[key]:
            raise RunFolderError(
                f"out_dir {config.out_dir} was begun with {key} {before.get(key)!r}, and now it is {now[key]!r}: other pairs "
                f"would be shown, or in other places. Set {key} back, or choose another out_dir."
            )


def judgements_of(journal: Journal) -> list[Judgement]:
    """What a journal holds, the oldest first."""
    return [parse_judgement(entry, f"{journal.path}:{n}") for n, entry in enumerate(journal.entries, start=1)]


def tokens_of(out_dir: Path) -> dict[str, str]:
    """The secrets of the page's addresses, `annotator` and `organizer`; drawn at the first start and kept (only the user may
    read them), so that addresses stay good over a restart.

    Raises:
        RunFolderError: the file is there and is not what was written.
    """
    path = out_dir / TOKENS
    if path.is_file():
        try:
            tokens = json.loads(path.read_text(encoding="utf-8"))
            found = {role: tokens[role] for role in ("annotator", "organizer")}
        except (ValueError, LookupError, TypeError):
            found = {}
        if not all(isinstance(token, str) and len(token) >= 32 for token in found.values()) or not found:
            raise RunFolderError(f"{path} holds no tokens; remove it, and new addresses are made")
        return found
    tokens = {role: secrets.token_urlsafe(24) for role in ("annotator", "organizer")}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(tokens) + "\n", encoding="utf-8")
    temporary.replace(path)
    return tokens


class LabelTask:
    """The state of the work. One a server; its methods are not to be called from two threads at once."""

    def __init__(
        self,
        config: LabelConfig,
        items: Sequence[Item],
        judgements: Iterable[Judgement],
        append: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Args:
        config: pairs, shares, criteria, seed.
        items: what is judged.
        judgements: what was said before, the oldest first.
        append: puts an entry on disk before it returns (`Journal.append`); None: nothing will be judged.
        """
        self.config = config
        self.items = {item.id: item for item in items}
        self._append = append
        self._failure: RunFolderError | None = None
        units = units_of(items, config.pairs, config.seed)
        self._mine = (
            None if config.overlap is None else shared_out(units, config.annotators, config.overlap, config.seed)
        )
        first = {item.id: derived_seed(config.seed, f"label/order/{item.id}", 0) for item in items}
        self.units = sorted(units, key=lambda unit: first[unit.item.id])
        """In the order in which they are shown."""
        self._assigned: dict[str, list[Unit]] = {}
        self._held: dict[str, dict[UnitKey, Judgement]] = {}
        self._withdrawn: dict[str, dict[UnitKey, Judgement]] = {}
        self.judgements: list[Judgement] = []
        """Everything that was said, the oldest first."""
        for judgement in judgements:
            self._take(judgement)

    def annotator(self, name: str) -> str:
        """The annotator of that name, as it is written in the configuration or was written before.

        Raises:
            DataError: the configuration names annotators, and this is none of them.
        """
        known = self.config.annotators or tuple(self._held)
        for other in known:
            if other.casefold() == name.casefold():
                return other
        if self.config.annotators:
            raise DataError(
                f"{name!r} is none of the annotators ({', '.join(self.config.annotators)}); choose one of them"
            )
        return name

    @property
    def annotators(self) -> list[str]:
        """Those of the configuration, then others who have judged."""
        return list(dict.fromkeys([*self.config.annotators, *self._held]))

    def assigned(self, annotator: str) -> list[Unit]:
        """Their units, in the order in which they are shown."""
        if annotator not in self._assigned:
            mine = None if self._mine is None else self._mine.get(annotator, frozenset())
            self._assigned[annotator] = [unit for unit in self.units if mine is None or unit.item.id in mine]
        return self._assigned[annotator]

    def current(self, annotator: str) -> Shown | None:
        """The first of their units that they have not judged; None where none is left."""
        held = self._held.get(annotator, {})
        for unit in self.assigned(annotator):
            if unit.key not in held:
                left, right = self._places(annotator, unit)
                return Shown(unit, left, right, self._withdrawn.get(annotator, {}).get(unit.key))
        return None

    def _places(self, annotator: str, unit: Unit) -> tuple[int, int]:
        i, j = unit.pair
        swapped = derived_seed(self.config.seed, f"label/place/{annotator}/{unit.item.id}/{i}/{j}", 0) & 1
        return (j, i) if swapped else (i, j)

    def progress(self, annotator: str) -> tuple[int, int]:
        """(judged, all) of their units; a skipped one is judged."""
        held = self._held.get(annotator, {})
        units = self.assigned(annotator)
        return sum(unit.key in held for unit in units), len(units)

    def judge(
        self,
        annotator: str,
        shown: Shown,
        choice: str,
        *,
        criteria: Mapping[str, str] | None = None,
        comment: str = "",
        seconds: float | None = None,
    ) -> Judgement:
        """Take a judgement. It is on disk when this returns.

        Raises:
            DataError: a choice, criterion or comment that cannot be.
            RunFolderError: it could not be written; then it was not taken.
        """
        criteria = dict(criteria or {})
        if choice not in CHOICES or not set(criteria) <= set(self.config.criteria):
            raise DataError(f"choice {choice!r} with criteria {criteria} is none that the page offers")
        if len(comment) > MAX_COMMENT:
            raise DataError(f"the comment has {len(comment)} characters; {MAX_COMMENT} is the most: shorten it")
        return self._write(
            {
                "item": shown.unit.item.id,
                "annotator": annotator,
                "choice": choice,
                "shown": [shown.left, shown.right],
                "criteria": criteria,
                "comment": comment.strip(),
                "seconds": None if seconds is None else round(seconds, 2),
            }
        )

    def undo(self, annotator: str) -> Judgement | None:
        """Take back the annotator's last judgement that holds, on disk; returns it, or None where there is none."""
        held = self._held.get(annotator)
        if not held:
            return None
        last = next(reversed(held.values()))
        self._write(last.entry() | {"choice": WITHDRAWN, "criteria": {}, "comment": "", "seconds": None})
        return last

    def skipped(self, annotator: str) -> int:
        """How many units the annotator skipped."""
        return sum(judgement.choice == "skip" for judgement in self._held.get(annotator, {}).values())

    def reopen_skipped(self, annotator: str) -> None:
        """Offer what the annotator skipped once more."""
        for judgement in [*self._held.get(annotator, {}).values()]:
            if judgement.choice == "skip":
                self._write(judgement.entry() | {"choice": WITHDRAWN, "seconds": None})

    def _write(self, entry: Mapping[str, object]) -> Judgement:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        judgement = parse_judgement({**entry, "time": now}, "a judgement")
        if self._append is None:
            raise RunFolderError("these judgements are only read; open the folder to add to them")
        if self._failure is not None:
            raise self._failure
        try:
            self._append(judgement.entry())
        except (OSError, RunFolderError) as error:
            # A part of the line may be there: what came after would be glued to it. A new start cuts it off.
            why = getattr(error, "strerror", error)
            self._failure = RunFolderError(
                f"a judgement could not be written ({why}), so it was not taken, and no more are until the server "
                "is started again: make room, or fix the file system"
            )
            raise self._failure from error
        self._take(judgement)
        return judgement

    def _take(self, judgement: Judgement) -> None:
        self.judgements.append(judgement)
        held = self._held.setdefault(judgement.annotator, {})
        key = judgement.item, judgement.pair
        before = held.pop(key, None)  # the last word goes to the end
        if judgement.choice != WITHDRAWN:
            held[key] = judgement
        elif before is not None:
            self._withdrawn.setdefault(judgement.annotator, {})[key] = before
