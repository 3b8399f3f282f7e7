"""Data sets of trainers as they are looked at: whatever the kind, a row of numbers and a text for each item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.data import DataSource, source_names
from rlhf_dist.curation.candidates import shown_text
from rlhf_dist.data.chat_template import Message, stop_token_ids
from rlhf_dist.data.datasets import PreferenceDataset, PromptDataset, SequenceDataset
from rlhf_dist.data.records import Conversation, Preference, Prompt, Text

AnyDataset = SequenceDataset | PreferenceDataset | PromptDataset
Kind = Literal["sequences", "preferences", "prompts"]
_AT_ONCE = 256


@dataclass(frozen=True)
class Shown:
    """A sequence of an item, to be shown."""

    label: str
    ids: tuple[int, ...]
    targets: tuple[bool, ...]
    """Sequences: what the loss is taken on. Preferences: the response, whose end is scored. Prompts: nothing."""
    cut: bool = False
    rating: float | None = None


class View:
    """A data set that was loaded with `keep_records`, item by item."""

    def __init__(
        self, name: str, dataset: AnyDataset, sources: Sequence[DataSource], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """
        Args:
            name: what the set is called, such as "training records".
            dataset: not to be empty.
            sources: the sets it was read from, for the names of those it does not name itself.
            tokenizer: it was encoded with.
        """
        if len(dataset) != len(dataset.records):
            raise ValueError(f"{name}: the data set holds no records; load it with keep_records=True")
        self.name, self.dataset = name, dataset
        self.records: Sequence[Any] = dataset.records
        self.lengths = np.asarray(dataset.longest if not isinstance(dataset, PromptDataset) else dataset.lengths)
        """[items] tokens of each item's longest sequence."""
        self._names = [(source.path, name) for source, name in zip(sources, source_names(sources), strict=True)]
        self._names.sort(key=lambda item: -len(item[0]))
        self._stops = set(stop_token_ids(tokenizer))
        self.sources: list[str] = self._sources()
        """Of each item."""
        self.tokens, self.targets, self.cut = self._measured()
        """[items] each: tokens of all sequences, tokens that are targets, and whether a response was cut."""

    @property
    def kind(self) -> Kind:
        """What an item is."""
        if isinstance(self.dataset, SequenceDataset):
            return "sequences"
        return "preferences" if isinstance(self.dataset, PreferenceDataset) else "prompts"

    def __len__(self) -> int:
        return len(self.dataset)

    def task(self, item: int) -> str:
        """ "" where the record says none."""
        return getattr(self.records[item], "task", "")

    def location(self, item: int) -> str:
        """File and line of an item's record."""
        return self.records[item].location

    def text(self, item: int) -> str:
        """All that an item's record says, without a chat template's additions."""
        record = self.records[item]
        if isinstance(record, Text):
            return record.text
        if isinstance(record, Preference):
            return "\n\n".join([_said(record.prompt), *map(_said, record.responses)])
        return _said(record.messages)

    def prompt(self, item: int) -> str:
        """What comes before the (first) response; "" where nothing does."""
        record = self.records[item]
        if isinstance(record, Conversation):
            first = next(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
            return _said(record.messages[:first])
        return _said(record.prompt) if isinstance(record, Preference) else ""

    def first_items(self) -> list[int]:
        """Items without those that continue with the text of the one before."""
        found, before = [], None
        for item, record in enumerate(self.records):
            if record != before:  # places are part of records: others of the same text differ
                found.append(item)
            before = record
        return found

    def shown(self, item: int) -> list[Shown]:
        """An item's sequences: the one, or a prompt's responses from best to worst."""
        if isinstance(self.dataset, SequenceDataset):
            batch = self.dataset.batch([item])
            return [_shown("", batch.tokens[0].tolist(), batch.loss_mask[0].tolist(), cut=bool(self.cut[item]))]
        if isinstance(self.dataset, PromptDataset):
            ids = self.dataset.batch([item]).tokens[0].tolist()
            return [_shown("", ids, [False] * len(ids))]
        batch = self.dataset.batch([item])
        sizes, cut = self.dataset.response_tokens([item])[0].tolist(), self.dataset.was_cut([item])[0].tolist()
        ranks, number = batch.ranks[0].tolist(), int(batch.num_responses[0])
        shown = []
        for k in range(number):
            length = int(batch.lengths[0, k])
            label = ("chosen", "rejected")[k] if number == 2 and ranks[:2] == [0, 1] else f"rank {ranks[k] + 1}"
            ids = batch.tokens[0, k, :length].tolist()
            targets = [i >= length - sizes[k] for i in range(length)]
            rating = float(batch.ratings[0, k]) if bool(batch.rated[0]) else None
            shown.append(_shown(label, ids, targets, cut[k], rating))
        return shown

    def _sources(self) -> list[str]:
        if isinstance(self.dataset, PreferenceDataset):
            return self.dataset.sources
        found = [self._source_of(record.location) for record in self.records]
        if isinstance(self.dataset, SequenceDataset):
            # Two sources may be of one file, so what the loader says comes first.
            for group, items in self.dataset.groups.items():
                name = group.removeprefix("source/")
                for item in items.tolist() if group and not group.startswith("task/") else ():
                    found[item] = name
        return found

    def _source_of(self, location: str) -> str:
        for path, name in self._names:
            if location.startswith(path) and location[len(path) : len(path) + 1] in (":", "["):
                return name
        return ""

    def _measured(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        num = len(self)
        tokens, targets, cut = np.array(self.dataset.lengths), np.zeros(num, dtype=np.int64), np.zeros(num, dtype=bool)
        for start in range(0, num, _AT_ONCE):
            items = torch.arange(start, min(start + _AT_ONCE, num))
            here = slice(start, start + len(items))
            if isinstance(self.dataset, SequenceDataset):
                batch = self.dataset.batch(items)
                targets[here] = batch.loss_mask.sum(1).numpy()
                last = batch.tokens[torch.arange(len(items)), batch.lengths - 1].tolist()
                # A whole conversation ends with the token that ends its last turn; a text continues in the next sequence.
                cut[here] = [
                    isinstance(self.records[int(i)], Conversation) and token not in self._stops
                    for i, token in zip(items, last, strict=True)
                ]
            elif isinstance(self.dataset, PreferenceDataset):
                targets[here] = self.dataset.response_tokens(items).sum(1).numpy()
                cut[here] = self.dataset.was_cut(items).any(1).numpy()
        return tokens, targets, cut


def _shown(label: str, ids: list[int], targets: list[bool], cut: bool = False, rating: float | None = None) -> Shown:
    return Shown(label, tuple(ids), tuple(targets), cut, rating)


def _said(messages: Sequence[Message]) -> str:
    return "\n\n".join(shown_text(message) for message in messages)


def margin(record: Preference | Prompt | Conversation | Text) -> float | None:
    """Rating of the best response less that of the worst; None where the data do not say."""
    ratings = getattr(record, "ratings", None)
    return None if ratings is None else float(ratings[0] - ratings[-1])
