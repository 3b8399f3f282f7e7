"""Tokenized data sets in memory: what a step draws its rows from. `loading.py` makes them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.core.batches import PreferenceBatch, PromptBatch, TokenBatch, pad_rows
from rlhf_dist.data.fitting import Encoded, FittedResponses
from rlhf_dist.data.records import Conversation, Preference, Prompt, Text
from rlhf_dist.data.store import DataReport, Ragged

T = TypeVar("T")
Indices = Sequence[int] | Tensor


class SequenceDataset:
    """Sequences with their targets; an item is a conversation, or a chunk of a plain text."""

    def __init__(
        self,
        rows: Sequence[Encoded],
        report: DataReport,
        groups: Sequence[str] = (),
        records: Sequence[Conversation | Text] = (),
    ) -> None:
        """`groups`: which group each row belongs to, such as the set it comes from; none: all to one group `""`. `records`:
        what each row was made of, where somebody wants to look at them."""
        self.records = tuple(records)
        self._ids = Ragged([ids for ids, _ in rows])
        self._masks = Ragged([mask for _, mask in rows], dtype=np.bool_)
        self.report = report
        self.groups: dict[str, Tensor] = _members(groups or [""] * len(rows))
        """Group → its items, rising; the groups in the order of their first items."""

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def lengths(self) -> np.ndarray:
        """[len] int64 tokens of each item."""
        return self._ids.lengths

    @property
    def longest(self) -> np.ndarray:
        """[len] int64 tokens of each item's longest sequence: its only one."""
        return self._ids.lengths

    def batch(self, indices: Indices) -> TokenBatch:
        """The items `indices`, in that order."""
        ids = self._ids.pick(indices)
        masks = self._masks.pick(indices)
        return TokenBatch(pad_rows(ids), _lengths(ids), pad_rows(masks, False, torch.bool))


class PreferenceDataset:
    """Prompts with ranked responses; an item is a pair or a longer ranking."""

    def __init__(
        self,
        records: Sequence[FittedResponses],
        preferences: Sequence[Preference],
        report: DataReport,
        sources: Sequence[str] = (),
        keep_records: bool = False,
    ) -> None:
        """`records`: the sequences of each of `preferences`; `sources`: the name of the set that each comes from;
        `keep_records`: keep `preferences`, for somebody who wants to look at them."""
        self._preferences = tuple(preferences) if keep_records else ()
        self._ids = Ragged([ids for record in records for ids in record.sequences])
        self._response_tokens = Ragged([record.response_tokens for record in records])
        self._cut = Ragged([record.cut for record in records], dtype=np.bool_)
        self._sources = tuple(sources) or ("",) * len(records)
        sizes = [len(record.sequences) for record in records]
        self._starts = np.concatenate(([0], np.cumsum(sizes)))
        self._rows = np.arange(len(sizes))
        """Items → records."""
        self._ranks = Ragged([preference.ranks for preference in preferences])
        self._ratings = Ragged(
            [preference.ratings or [0.0] * size for preference, size in zip(preferences, sizes, strict=True)],
            np.float32,
        )
        self._rated = np.array([preference.ratings is not None for preference in preferences])
        self.most_responses = max(sizes, default=0)
        """Of one prompt."""
        self.num_with_margins = sum(p.ratings is not None and p.ratings[0] > p.ratings[-1] for p in preferences)
        """Items with a margin above 0."""
        self.report = report

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def lengths(self) -> np.ndarray:
        """[len] int64 tokens of each item, all its responses."""
        return np.add.reduceat(self._ids.lengths, self._starts[:-1])[self._rows]

    def keeping(self, items: Indices) -> PreferenceDataset:
        """The same set with the items `items` only."""
        kept = copy.copy(self)
        kept._rows = self._rows[np.asarray(items, dtype=np.int64)]
        return kept

    @property
    def longest(self) -> np.ndarray:
        """[len] int64 tokens of each item's longest sequence."""
        return np.maximum.reduceat(self._ids.lengths, self._starts[:-1])[self._rows]

    def batch(self, indices: Indices) -> PreferenceBatch:
        """The items `indices`, in that order."""
        records = self._rows_of(indices)
        spans = [range(self._starts[i], self._starts[i + 1]) for i in records]
        ratings = [row.tolist() for row in self._ratings.pick(records)]
        ranks = [row.tolist() for row in self._ranks.pick(records)]
        rated = [bool(self._rated[i]) for i in records]
        return PreferenceBatch.of([self._ids.pick(span) for span in spans], ranks, ratings, rated)

    @property
    def records(self) -> list[Preference]:
        """What each item was made of, with the responses that are left; [] where it was not kept."""
        return [self._preferences[row] for row in self._rows] if self._preferences else []

    def response_tokens(self, indices: Indices) -> Tensor:
        """[len(indices), K] int64 tokens of each response of the items `indices`, its end included; 0 where there is none."""
        return pad_rows(self._response_tokens.pick(self._rows_of(indices))).long()

    def was_cut(self, indices: Indices) -> Tensor:
        """[len(indices), K] bool: which responses of the items `indices` were cut at the longest length."""
        return pad_rows(self._cut.pick(self._rows_of(indices)), False, torch.bool)

    @property
    def sources(self) -> list[str]:
        """The name of the set that each item comes from."""
        return [self._sources[row] for row in self._rows]

    def _rows_of(self, indices: Indices) -> list[int]:
        return [int(self._rows[int(i)]) for i in indices]


class PromptDataset:
    """Prompts, encoded up to where the assistant begins."""

    def __init__(
        self, rows: Sequence[list[int]], texts: Sequence[str], report: DataReport, records: Sequence[Prompt] = ()
    ) -> None:
        """`records`: what each row was made of, where somebody wants to look at them."""
        self.records = tuple(records)
        self._ids = Ragged(rows)
        self._texts = tuple(texts)
        self.report = report

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def lengths(self) -> np.ndarray:
        """[len] int64 tokens of each prompt."""
        return self._ids.lengths

    def text(self, index: int) -> str:
        """The prompt for a reader: the user's message, or the turns with their roles."""
        return self._texts[index]

    def batch(self, indices: Indices, sample_ids: Indices | None = None) -> PromptBatch:
        """The prompts `indices`, in that order; `sample_ids` (default: `indices`) must be unique."""
        ids = self._ids.pick(indices)
        samples = torch.as_tensor(indices if sample_ids is None else sample_ids, dtype=torch.long)
        if len(samples) != len(ids) or len(torch.unique(samples)) != len(ids):
            raise ValueError(f"{len(ids)} prompts need as many unique sample ids; got {samples.tolist()}")
        return PromptBatch(pad_rows(ids), _lengths(ids), samples)


@dataclass(frozen=True)
class Split(Generic[T]):
    """What is trained on and what is held out."""

    train: T
    eval: T | None


def _members(groups: Sequence[str]) -> dict[str, Tensor]:
    items: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        items.setdefault(group, []).append(i)
    return {group: torch.tensor(members, dtype=torch.long) for group, members in items.items()}


def _lengths(rows: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.long)
