"""Sources → tokenized data sets: read, validated, split and tokenized before anything is started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.data import DataSettings, DataSource, RewardData, SFTData, TrainingData, source_names
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.data.bad_rows import BadRows, Tally
from rlhf_dist.data.datasets import PreferenceDataset, PromptDataset, Ragged, SequenceDataset, Split
from rlhf_dist.data.mixing import MixtureSampler, compose
from rlhf_dist.data.reader import read_preferences, read_prompts, read_sequences
from rlhf_dist.data.records import Conversation, Messages, Preference, Text, contradictions, duplicates
from rlhf_dist.data.sampler import TRAINING_ORDER
from rlhf_dist.data.splits import hold_out
from rlhf_dist.data.spool import RecordStore
from rlhf_dist.data.tokenization import tokenize

R = TypeVar("R")

SOURCE, TASK = "source", "task"
MAX_LISTED_TASKS = 8
"""Tasks that an error message lists."""


def load_sequences(
    sources: Sequence[DataSource],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    keep_records: bool = False,
) -> SequenceDataset:
    """All records of kinds for supervised training. `keep_records`: keep them in the data set, for inspection.

    Raises:
        DataError: an invalid file or record (with its place), or none left.
    """
    bad_rows = BadRows()
    records = RecordStore(record for source in sources for record in read_sequences(source, bad_rows))
    return _tokenized_sequences(records, settings, tokenizer, bad_rows, keep_records=keep_records)


def load_preferences(
    data: RewardData,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    use_margins: bool = True,
    held_out_margins: bool = False,
    keep_records: bool = False,
) -> Split[PreferenceDataset]:
    """Training and held-out pairs and rankings; a split by `eval_fraction` keeps each prompt on one side.

    `seed` draws the pairs of kind `ratings` and the split. `use_margins` False: margins are not read. `held_out_margins`:
    whether those of `eval` are, which the held-out loss does not use. `keep_records` and errors as in `load_sequences`.
    """
    bad_rows, bad_held_out = BadRows(), BadRows()
    train = RecordStore(_named_preferences(data.train, seed, use_margins, bad_rows))
    given = RecordStore(_named_preferences(data.eval, seed, held_out_margins, bad_held_out))
    train, held_out = _split(data, train, given, seed, lambda named: named.record.subject)
    return Split(
        _tokenized_preferences(train, data, tokenizer, bad_rows, keep_records),
        None if held_out is None else _tokenized_preferences(held_out, data, tokenizer, bad_held_out, keep_records),
    )


def load_pairs(
    sources: Sequence[DataSource],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    use_margins: bool = True,
) -> PreferenceDataset:
    """All pairs and rankings of kinds for reward modeling; the arguments as in `load_preferences`."""
    bad_rows = BadRows()
    pairs = RecordStore(_named_preferences(sources, seed, use_margins, bad_rows))
    return _tokenized_preferences(pairs, settings, tokenizer, bad_rows)


def load_prompts(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    settings: DataSettings,
    keep_records: bool = False,
) -> PromptDataset:
    """Prompts to generate from. One longer than `max_prompt_tokens` is skipped under `settings.on_too_long: skip`, else an
    error: prompts are never truncated. `keep_records` and errors as in `load_sequences`."""
    tally = Tally(BadRows())
    prompts = RecordStore(prompt for source in sources for prompt in read_prompts(source, tally.bad_rows))
    settings = settings.model_copy(update={"max_length_tokens": max_prompt_tokens})
    tokens = tokenize(prompts, tokenizer, settings)
    used: list[int] = []
    rows: list[int] = []
    for found in tokens.usable(prompts, tally):
        tally.num_tokens += found.num_tokens
        tally.num_truncated += any(found.cut)
        rows += found.sequences
        used.append(found.number)
    tally.check_not_empty(len(rows), f"max_prompt_tokens {max_prompt_tokens}")
    prompts = prompts.select(used)
    texts = prompts.each(lambda prompt: _readable(prompt.messages))
    return PromptDataset(
        tokens.ids.select(rows), texts, tally.report(duplicates(prompts)), prompts if keep_records else ()
    )


@dataclass(frozen=True)
class SFTSets(Split[SequenceDataset]):
    """Data sets of an SFT run.

    The groups of `train` are its sources, by name, each one's sequences together. Those of `eval` are `task/NAME` for records
    of `hold_out_tasks`, and `source/NAME` for the rest.
    """

    pretraining: SequenceDataset | None = None
    """Plain text mixed into every step."""
    eval_pretraining: SequenceDataset | None = None


@dataclass(frozen=True)
class _Named(Generic[R]):
    """A record, and the name of its source."""

    record: R
    source: str


_Sequence = _Named[Conversation | Text]


def _task(named: _Sequence) -> str:
    return named.record.task or named.source


def load_sft(data: SFTData, tokenizer: PreTrainedTokenizerBase, seed: int, keep_records: bool = False) -> SFTSets:
    """All data sets of an SFT run. `keep_records`: keep the records in the data sets, for inspection, with their tasks also
    where none is held out.

    Held out are the records of `hold_out_tasks`, and either those of `eval` or `eval_fraction` of the rest of `train`, which
    keeps the records of a prompt, text or labeled row on one side.

    Raises:
        DataError: an invalid file or record (with its place), or none left to train or evaluate on.
        ConfigError: a task in `hold_out_tasks` that no record has.
    """
    bad_rows, bad_held_out = BadRows(), BadRows()
    with_tasks = bool(data.hold_out_tasks)
    reads_tasks = True if with_tasks else None if keep_records else False
    everything = RecordStore(_named_sequences(data.train, bad_rows, reads_tasks))
    given = RecordStore(_named_sequences(data.eval, bad_held_out, reads_tasks))
    train, of_tasks = _without_tasks(everything, given, data.hold_out_tasks)
    train, held_out = _split(data, train, given, seed, lambda named: named.record.subject)
    if of_tasks:
        held_out = RecordStore(chain(held_out or (), of_tasks))
    unseen = set(data.hold_out_tasks)
    eval_groups = [
        f"{TASK}/{_task(named)}" if with_tasks and _task(named) in unseen else f"{SOURCE}/{named.source}"
        for named in held_out or ()
    ]
    pretraining = _load_pretraining(data, tokenizer, seed, keep_records)

    def tokenized(those: RecordStore[_Sequence], bad: BadRows, groups: Sequence[str]) -> SequenceDataset:
        records = those.each(lambda named: named.record)
        return _tokenized_sequences(records, data, tokenizer, bad, groups, keep_records)

    return SFTSets(
        tokenized(train, bad_rows, [named.source for named in train]),
        None if held_out is None else tokenized(held_out, bad_held_out, eval_groups),
        pretraining.train if pretraining else None,
        pretraining.eval if pretraining else None,
    )


def mixed_order(data: SFTData, train: SequenceDataset, seed: int) -> MixtureSampler | None:
    """The order of training sequences under `data.mixing`; None without.

    A source of which everything is held out has no share; its weight is ignored.

    Raises:
        ConfigError: shares that these sources cannot have.
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
    """What each source gives to an epoch: `source`, `available` sequences, `rate` (of the mixing method; absent without
    mixing), sequences `taken`, their `share` and `share_of_tokens`, `epochs` (how often each is seen), rounded."""
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


def _named_sequences(sources: Sequence[DataSource], bad_rows: BadRows, with_tasks: bool | None) -> Iterator[_Sequence]:
    """Records, those of one name together."""
    names = source_names(sources)
    for name in dict.fromkeys(names):
        for source, its_name in zip(sources, names, strict=True):
            if its_name == name:
                for record in read_sequences(source, bad_rows, with_tasks):
                    yield _Named(record, name)


def _named_preferences(
    sources: Sequence[DataSource], seed: int, use_margins: bool, bad_rows: BadRows
) -> Iterator[_Named[Preference]]:
    """Pairs and rankings, each with the name of its source."""
    for source, name in zip(sources, source_names(sources), strict=True):
        for record in read_preferences(source, seed, use_margins, bad_rows):
            yield _Named(record, name)


def _split(
    settings: TrainingData,
    train: RecordStore[R],
    held_out: RecordStore[R],
    seed: int,
    subject: Callable[[R], Hashable],
) -> tuple[RecordStore[R], RecordStore[R] | None]:
    """Records to train on and held-out records: `held_out` if there are any, else `eval_fraction` of `train`, or None.
    Records are split, not chunks: no text is on both sides."""
    if held_out:
        return train, held_out
    if settings.eval_fraction == 0:
        return train, None
    # By their hashes, as in `duplicates`: the prompts themselves would fill the memory.
    kept, drawn = hold_out([hash(subject(record)) for record in train], settings.eval_fraction, seed)
    return train.select(kept), train.select(drawn)


def _without_tasks(
    train: RecordStore[_Sequence], given: RecordStore[_Sequence], tasks: Sequence[str]
) -> tuple[RecordStore[_Sequence], RecordStore[_Sequence]]:
    """The records of `train` of other tasks than `tasks`, and those of `tasks`."""
    if not tasks:
        return train, RecordStore()
    task_of = [_task(named) for named in train]
    known = Counter(chain(task_of, map(_task, given)))
    for task in tasks:
        if task not in known:
            near = get_close_matches(task, known, 1)
            listed = ", ".join(f"{name} ({number})" for name, number in known.most_common(MAX_LISTED_TASKS))
            more = f" and {len(known) - MAX_LISTED_TASKS} more" if len(known) > MAX_LISTED_TASKS else ""
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"data.hold_out_tasks names {task!r}, a task that no record of data.train or data.eval has; {hint}The records' "
                f"tasks are {listed}{more}. A record's task is its field `task`, or else the name of its source."
            )
    kept = [i for i, task in enumerate(task_of) if task not in tasks]
    if not kept:
        raise DataError(
            f"data.hold_out_tasks {', '.join(map(repr, tasks))} holds out all {len(train)} records of data.train and leaves "
            "none to train on; remove a task from it, or add records of other tasks"
        )
    return train.select(kept), train.select([i for i, task in enumerate(task_of) if task in tasks])


def _load_pretraining(
    data: SFTData, tokenizer: PreTrainedTokenizerBase, seed: int, keep_records: bool
) -> Split[SequenceDataset] | None:
    if not data.pretraining:
        return None
    bad_rows, bad_held_out = BadRows(), BadRows()
    everything = RecordStore(record for source in data.pretraining for record in read_sequences(source, bad_rows))
    given = RecordStore(record for source in data.eval_pretraining for record in read_sequences(source, bad_held_out))
    try:
        train, held_out = _split(data, everything, given, seed, lambda record: record.subject)
    except DataError as error:
        raise DataError(f"data.pretraining: {error} (data.eval_pretraining names held-out text)") from error
    return Split(
        _tokenized_sequences(train, data, tokenizer, bad_rows, keep_records=keep_records),
        None
        if held_out is None
        else _tokenized_sequences(held_out, data, tokenizer, bad_held_out, keep_records=keep_records),
    )


def _tokenized_sequences(
    records: RecordStore[Conversation | Text],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    bad_rows: BadRows,
    groups: Sequence[str] = (),
    keep_records: bool = False,
) -> SequenceDataset:
    """`groups`: of each record, as in `SequenceDataset`."""
    tally = Tally(bad_rows)
    tokens = tokenize(records, tokenizer, settings)
    rows: list[int] = []
    group_of_row: list[str] = []
    used: list[int] = []
    record_of_row: list[int] = []
    for found in tokens.usable(records, tally):
        tally.num_tokens += found.num_tokens
        tally.num_truncated += any(found.cut)
        rows += found.sequences
        group_of_row += [groups[found.number] if groups else ""] * len(found.sequences)
        used.append(found.number)
        record_of_row += [found.number] * len(found.sequences)
    tally.check_not_empty(len(rows), f"max_length_tokens {settings.max_length_tokens}")
    return SequenceDataset(
        tokens.ids.select(rows),
        tokens.masks.select(rows),
        tally.report(duplicates(records.select(used))),
        group_of_row,
        records.select(record_of_row) if keep_records else (),
    )


def _tokenized_preferences(
    preferences: RecordStore[_Named[Preference]],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    bad_rows: BadRows,
    keep_records: bool = False,
) -> PreferenceDataset:
    tally = Tally(bad_rows)
    records = preferences.each(lambda named: named.record)
    tokens = tokenize(records, tokenizer, settings)
    rows: list[int] = []
    sources: list[str] = []
    response_tokens: list[list[int]] = []
    cut: list[list[bool]] = []

    def usable() -> Iterator[Preference]:
        for found in tokens.usable(records, tally):
            named = preferences[found.number]
            preference = named.record
            left = preference.of(found.kept)
            if not any(left.ranks):  # one response, or a tie, is left: nothing to compare
                tally.skip(preference.location)
                continue
            tally.drop(preference.num_repeated + len(preference.responses) - len(found.kept), preference.location)
            tally.num_truncated += any(found.cut)
            tally.num_tokens += found.num_tokens
            rows.extend(found.sequences)
            sources.append(named.source)
            response_tokens.append(found.response_tokens)
            cut.append(found.cut)
            yield left

    used = RecordStore(usable())
    tally.check_not_empty(len(rows), f"max_length_tokens {settings.max_length_tokens}")
    return PreferenceDataset(
        tokens.ids.select(rows),
        used,
        tally.report(duplicates(used), contradictions(used)),
        Ragged(response_tokens),
        Ragged(cut, np.bool_),
        sources,
        keep_records,
    )


def _readable(messages: Messages) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
