"""Tokenized data sets: what a step draws its batches from. `loading.py` makes them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.core.batches import PreferenceBatch, PromptBatch, TokenBatch, pad_rows
from rlhf_dist.data.bad_rows import DataReport
from rlhf_dist.data.records import Conversation, Preference, Prompt, Text
from rlhf_dist.data.spool import RecordStore

T = TypeVar("T")
Indices = Sequence[int] | Tensor


class Ragged:
    """Rows of different lengths: views of flat arrays, in memory or memory-mapped."""

    def __init__(self, rows: Sequence[Sequence[float]], dtype: type = np.int32) -> None:
        """Rows in memory: a Python int takes 9 times the memory of an int32."""
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        """[len] int64."""
        flat = np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if rows else np.zeros(0, dtype)
        self._flats = [flat]
        self._flat_of = np.zeros(len(rows), dtype=np.int32)
        """[len] the flat array of each row."""
        self._starts = np.concatenate(([0], np.cumsum(self.lengths)))[:-1]
        """[len] where each row begins in it."""

    @classmethod
    def from_arrow(cls, column: Any, dtype: type = np.int32) -> Ragged:
        """The inner rows of an Arrow column of lists of lists of int32 or uint8 (with `dtype` bool), without a copy."""
        made = cls([], dtype)
        lengths, flat_of, starts = [made.lengths], [made._flat_of], [made._starts]
        for number, chunk in enumerate(column.chunks):
            rows = chunk.flatten()
            offsets = rows.offsets.to_numpy()
            made._flats.append(rows.values.to_numpy(zero_copy_only=True).view(dtype))
            lengths.append(np.diff(offsets).astype(np.int64))
            starts.append(offsets[:-1].astype(np.int64))
            flat_of.append(np.full(len(rows), number + 1, dtype=np.int32))
        made.lengths, made._flat_of, made._starts = map(np.concatenate, (lengths, flat_of, starts))
        return made

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        """[length] row `index`, a copy."""
        return torch.from_numpy(self._row(index).copy())

    def pick(self, indices: Indices) -> list[Tensor]:
        """The rows `indices`."""
        return [self[int(index)] for index in indices]

    def select(self, indices: Sequence[int]) -> Ragged:
        """The rows `indices` as a `Ragged`, of the same flat arrays."""
        wanted = np.asarray(indices, dtype=np.int64)
        made = copy.copy(self)
        made.lengths, made._flat_of, made._starts = self.lengths[wanted], self._flat_of[wanted], self._starts[wanted]
        return made

    def update(self, digest: Any, indices: Sequence[int] | np.ndarray | None = None) -> None:
        """Feed lengths and contents of the rows (`indices`, default: all) to a `hashlib` object."""
        wanted = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.int64)
        digest.update(self.lengths[wanted].tobytes())
        for index in wanted:
            digest.update(self._row(int(index)).tobytes())

    def _row(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = self._starts[index]
        return self._flats[self._flat_of[index]][start : start + self.lengths[index]]


class SequenceDataset:
    """Sequences with loss masks; an item is a conversation, or a chunk of a plain text."""

    def __init__(
        self,
        ids: Ragged,
        masks: Ragged,
        report: DataReport,
        groups: Sequence[str] = (),
        records: Sequence[Conversation | Text] = (),
    ) -> None:
        """
        Args:
            ids: int32 token ids of each sequence.
            masks: bool loss mask of each sequence.
            report: what became of the records.
            groups: the group of each sequence, such as the name of its source; none: all in one group `""`.
            records: the record of each sequence, for inspection.
        """
        self.records = records
        self._ids, self._masks = ids, masks
        self.report = report
        self.groups: dict[str, Tensor] = _members(groups or [""] * len(ids))
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

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of what is trained on: token ids, loss masks and group membership, not places or names."""
        digest = hashlib.sha256(b"sequences")
        self._ids.update(digest)
        self._masks.update(digest)
        for items in self.groups.values():
            digest.update(len(items).to_bytes(8, "little") + items.numpy().tobytes())
        return digest.hexdigest()

    def batch(self, indices: Indices) -> TokenBatch:
        """The items `indices`, in that order."""
        ids = self._ids.pick(indices)
        masks = self._masks.pick(indices)
        return TokenBatch(pad_rows(ids), _lengths(ids), pad_rows(masks, False, torch.bool))


class PreferenceDataset:
    """Prompts with ranked responses; an item is a pair or a longer ranking."""

    def __init__(
        self,
        ids: Ragged,
        preferences: RecordStore[Preference],
        report: DataReport,
        response_tokens: Ragged,
        cut: Ragged,
        sources: Sequence[str] = (),
        keep_records: bool = False,
    ) -> None:
        """
        Args:
            ids: int32 token ids of each response with its prompt, preference after preference.
            preferences: each with as many responses as it has sequences.
            report: what became of the records.
            response_tokens: [K] of each preference, tokens of each response, its end included.
            cut: [K] of each preference, whether each response was truncated.
            sources: the name of each preference's source.
            keep_records: keep `preferences`, for inspection.
        """
        self._preferences = preferences if keep_records else None
        self._ids, self._response_tokens, self._cut = ids, response_tokens, cut
        self._sources = tuple(sources) or ("",) * len(preferences)
        ranks, ratings = [], []
        for preference in preferences:
            ranks.append(preference.ranks)
            ratings.append(preference.ratings)
        sizes = list(map(len, ranks))
        self._starts = np.concatenate(([0], np.cumsum(sizes)))
        self._rows = np.arange(len(sizes))
        """Items → records."""
        self._ranks = Ragged(ranks)
        self._ratings = Ragged([its or [0.0] * size for its, size in zip(ratings, sizes, strict=True)], np.float32)
        self._rated = np.array([its is not None for its in ratings])
        self.most_responses = max(sizes, default=0)
        """Most responses to one prompt."""
        self.num_with_margins = sum(its is not None and its[0] > its[-1] for its in ratings)
        """Items with a margin above 0."""
        self.report = report

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def lengths(self) -> np.ndarray:
        """[len] int64 tokens of each item, all its responses."""
        return np.add.reduceat(self._ids.lengths, self._starts[:-1])[self._rows]

    def keeping(self, items: Indices) -> PreferenceDataset:
        """The same data set with the items `items` only."""
        kept = copy.copy(self)
        kept.__dict__.pop("fingerprint", None)
        kept._rows = self._rows[np.asarray(items, dtype=np.int64)]
        return kept

    @property
    def longest(self) -> np.ndarray:
        """[len] int64 tokens of each item's longest sequence."""
        return np.maximum.reduceat(self._ids.lengths, self._starts[:-1])[self._rows]

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of what is trained on: token ids, ranks and ratings, not places or names."""
        digest = hashlib.sha256(b"preferences")
        sequences = [row for i in self._rows for row in range(self._starts[i], self._starts[i + 1])]
        self._ids.update(digest, sequences)
        for column in (self._ranks, self._ratings, self._response_tokens):
            column.update(digest, self._rows)
        digest.update(self._rated[self._rows].tobytes())
        return digest.hexdigest()

    def batch(self, indices: Indices) -> PreferenceBatch:
        """The items `indices`, in that order."""
        records = self._rows_of(indices)
        spans = [range(self._starts[i], self._starts[i + 1]) for i in records]
        ratings = [row.tolist() for row in self._ratings.pick(records)]
        ranks = [row.tolist() for row in self._ranks.pick(records)]
        rated = [bool(self._rated[i]) for i in records]
        return PreferenceBatch.of([self._ids.pick(span) for span in spans], ranks, ratings, rated)

    @property
    def records(self) -> Sequence[Preference]:
        """The record of each item, with the responses that are used; none unless they were kept."""
        return [] if self._preferences is None else self._preferences.select(self._rows)

    def response_tokens(self, indices: Indices) -> Tensor:
        """[len(indices), K] int64 tokens of each response of the items `indices`, its end included; 0 is padding."""
        return pad_rows(self._response_tokens.pick(self._rows_of(indices))).long()

    def was_cut(self, indices: Indices) -> Tensor:
        """[len(indices), K] bool: which responses of the items `indices` were truncated."""
        return pad_rows(self._cut.pick(self._rows_of(indices)), False, torch.bool)

    @property
    def sources(self) -> list[str]:
        """The name of each item's source."""
        return [self._sources[row] for row in self._rows]

    def _rows_of(self, indices: Indices) -> list[int]:
        return [int(self._rows[int(i)]) for i in indices]


class PromptDataset:
    """Prompts, tokenized up to where the assistant's response begins."""

    def __init__(self, ids: Ragged, texts: Sequence[str], report: DataReport, records: Sequence[Prompt] = ()) -> None:
        """
        Args:
            ids: int32 token ids of each prompt.
            texts: each prompt for a reader.
            report: what became of the records.
            records: the record of each prompt, for inspection.
        """
        self.records = records
        self._ids = ids
        self._texts = texts
        self.report = report

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def lengths(self) -> np.ndarray:
        """[len] int64 tokens of each prompt."""
        return self._ids.lengths

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the token ids of all prompts."""
        digest = hashlib.sha256(b"prompts")
        self._ids.update(digest)
        return digest.hexdigest()

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
    """A training set and a held-out set."""

    train: T
    eval: T | None


def _members(groups: Sequence[str]) -> dict[str, Tensor]:
    items: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        items.setdefault(group, []).append(i)
    return {group: torch.tensor(members, dtype=torch.long) for group, members in items.items()}


def _lengths(rows: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.long)
