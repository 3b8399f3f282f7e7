"""The sets of an SFT run: what is trained on, what is held out, and the plain text beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.data import DataSource, SFTData, source_names
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.data.datasets import SequenceDataset, Split
from rlhf_dist.data.loading import encode_sequences, split_records
from rlhf_dist.data.mixing import MixtureSampler, compose
from rlhf_dist.data.quarantine import Quarantine
from rlhf_dist.data.records import Conversation, Text, read_sequences
from rlhf_dist.data.sampler import TRAINING_ORDER

SOURCE, TASK = "source", "task"
MAX_LISTED = 8
"""Tasks that a refusal names."""


@dataclass(frozen=True)
class SFTSets(Split[SequenceDataset]):
    """Sets of an SFT run.

    The groups of `train` are its sets, by name, each one's sequences together. Those of `eval` are `task/NAME` for what is held
    out as a task, and `source/NAME` for the rest.
    """

    pretraining: SequenceDataset | None = None
    """Plain text beside the records of `train`."""
    eval_pretraining: SequenceDataset | None = None


@dataclass(frozen=True)
class _Named:
    """A record, and the name of its set."""

    record: Conversation | Text
    source: str

    @property
    def task(self) -> str:
        return self.record.task or self.source


def load_sft(data: SFTData, tokenizer: PreTrainedTokenizerBase, seed: int, keep_records: bool = False) -> SFTSets:
    """Everything an SFT run reads. `keep_records`: the data sets hold their records, too, for somebody who wants to look at
    them; these then have their task also where nothing is held out by it.

    Held out are the records of `hold_out_tasks`, and beside them `eval`, or `eval_fraction` of what is left of `train`: all
    records of a prompt, text or labelled row, or none.

    Raises:
        DataError: a file or record that cannot be used (with its place), or nothing left to train or evaluate on.
        ConfigError: a task that is to be held out and that no record has.
    """
    bad, bad_held_out = Quarantine(), Quarantine()
    with_tasks = bool(data.hold_out_tasks)
    reads_tasks = True if with_tasks else None if keep_records else False
    everything = list(_read(data.train, bad, reads_tasks))
    given = list(_read(data.eval, bad_held_out, reads_tasks))
    train, of_tasks = _without_tasks(everything, given, data.hold_out_tasks)
    train, held_out = split_records(data, train, given, seed, lambda named: named.record.subject)
    held_out = None if held_out is None and not of_tasks else [*(held_out or []), *of_tasks]
    unseen = set(data.hold_out_tasks)
    eval_groups = [
        f"{TASK}/{named.task}" if with_tasks and named.task in unseen else f"{SOURCE}/{named.source}"
        for named in held_out or []
    ]
    pretraining = _load_pretraining(data, tokenizer, seed, keep_records)

    def encoded(those: Sequence[_Named], quarantine: Quarantine, groups: Sequence[str]) -> SequenceDataset:
        return encode_sequences([named.record for named in those], data, tokenizer, quarantine, groups, keep_records)

    return SFTSets(
        encoded(train, bad, [named.source for named in train]),
        None if held_out is None else encoded(held_out, bad_held_out, eval_groups),
        pretraining.train if pretraining else None,
        pretraining.eval if pretraining else None,
    )


def _read(sources: Sequence[DataSource], bad: Quarantine, with_tasks: bool | None) -> Iterator[_Named]:
    """Records, those of one name together."""
    names = source_names(sources)
    for name in dict.fromkeys(names):
        for source, its_name in zip(sources, names, strict=True):
            if its_name == name:
                for record in read_sequences(source, bad, with_tasks):
                    yield _Named(record, name)


def _without_tasks(train: list[_Named], given: list[_Named], tasks: Sequence[str]) -> tuple[list[_Named], list[_Named]]:
    """What is left of `train`, and what is not."""
    if not tasks:
        return train, []
    there = Counter(named.task for named in (*train, *given))
    for task in tasks:
        if task not in there:
            near = get_close_matches(task, there, 1)
            listed = ", ".join(f"{name} ({number})" for name, number in there.most_common(MAX_LISTED))
            more = f" and {len(there) - MAX_LISTED} more" if len(there) > MAX_LISTED else ""
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"data.hold_out_tasks names {task!r}, a task that no record of data.train or data.eval has; {hint}The records' "
                f"tasks are {listed}{more}. A record's task is its field `task`, or else the name of its set."
            )
    kept = [named for named in train if named.task not in tasks]
    if not kept:
        raise DataError(
            f"data.hold_out_tasks {', '.join(map(repr, tasks))} holds out all {len(train)} records of data.train and leaves "
            "none to train on; take a task out of it, or add records of other tasks"
        )
    return kept, [named for named in train if named.task in tasks]


def _load_pretraining(
    data: SFTData, tokenizer: PreTrainedTokenizerBase, seed: int, keep_records: bool
) -> Split[SequenceDataset] | None:
    if not data.pretraining:
        return None
    bad, bad_held_out = Quarantine(), Quarantine()
    train = [record for source in data.pretraining for record in read_sequences(source, bad)]
    held_out = [record for source in data.eval_pretraining for record in read_sequences(source, bad_held_out)]
    try:
        train, held_out = split_records(data, train, held_out, seed, lambda record: record.subject)
    except DataError as error:
        raise DataError(f"data.pretraining: {error} (data.eval_pretraining names held-out text)") from error
    return Split(
        encode_sequences(train, data, tokenizer, bad, keep_records=keep_records),
        None
        if held_out is None
        else encode_sequences(held_out, data, tokenizer, bad_held_out, keep_records=keep_records),
    )


def mixed_order(data: SFTData, train: SequenceDataset, seed: int) -> MixtureSampler | None:
    """The order of training sequences under `data.mixing`; None without.

    A set of which everything is held out has no share; where weights are given, its weight counts for nothing.

    Raises:
        ConfigError: shares that these sets cannot have.
    """
    if data.mixing is None:
        return None
    settings, groups = data.mixing, train.groups
    if settings.weights is not None:
        names = dict.fromkeys(source_names(data.train))
        weights = tuple(weight for name, weight in zip(names, settings.weights, strict=True) if name in groups)
        settings = settings.model_copy(update={"weights": weights})
    try:
        composition = compose(settings, list(groups), [len(items) for items in groups.values()])
    except ConfigError as error:
        raise ConfigError(f"data.mixing: {error}") from error
    return MixtureSampler(composition, seed, TRAINING_ORDER)


def shares_of(train: SequenceDataset, order: MixtureSampler | None) -> tuple[dict[str, Any], ...]:
    """What each set gives to an epoch: `source`, `available` sequences, `rate` (what the method asks for; without mixing
    there is none), sequences `taken`, their `share` and that of their tokens, `epochs` (times that each is met), rounded."""
    sizes = {name: len(items) for name, items in train.groups.items()}
    given = {share.name: share for share in order.composition.shares} if order is not None else {}
    taken = {name: given[name].num_records if given else size for name, size in sizes.items()}
    tokens = {name: float(train.lengths[items.numpy()].mean()) * taken[name] for name, items in train.groups.items()}
    return tuple(
        {
            "source": name,
            "available": size,
            **({"rate": round(float(given[name].rate), 6)} if given else {}),
            "taken": taken[name],
            "share": round(taken[name] / sum(taken.values()), 6),
            "share_of_tokens": round(tokens[name] / sum(tokens.values()), 6),
            "epochs": round(taken[name] / size, 4),
        }
        for name, size in sizes.items()
    )
