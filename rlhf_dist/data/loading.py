"""From sources to tokenized data sets: read, checked and encoded once, before anything is started."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.data import DataSettings, DataSource, RewardData, TrainingData, source_names
from rlhf_dist.core.errors import DataError, TooLongError
from rlhf_dist.data.datasets import PreferenceDataset, PromptDataset, SequenceDataset, Split
from rlhf_dist.data.duplicates import contradictions, duplicates
from rlhf_dist.data.encoding import Message, encode_conversation, encode_prompt, encode_text
from rlhf_dist.data.fitting import Encoded, FittedResponses, fit, fit_responses, fit_text
from rlhf_dist.data.quarantine import Quarantine
from rlhf_dist.data.records import (
    Conversation,
    Preference,
    Prompt,
    Text,
    read_preferences,
    read_prompts,
    read_sequences,
    turns_of,
)
from rlhf_dist.data.splitting import hold_out
from rlhf_dist.data.store import Tally

R = TypeVar("R")


def load_sequences(
    sources: Sequence[DataSource],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    keep_records: bool = False,
) -> SequenceDataset:
    """All records of kinds `instruction`, `messages` and `text`. `keep_records`: the data set holds them, too.

    Raises:
        DataError: a file or record that cannot be used (with its place), or nothing left.
    """
    bad = Quarantine()
    records = [record for source in sources for record in read_sequences(source, bad)]
    return encode_sequences(records, settings, tokenizer, bad, keep_records=keep_records)


def load_preferences(
    data: RewardData,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    use_margins: bool = True,
    held_out_margins: bool = False,
    keep_records: bool = False,
) -> Split[PreferenceDataset]:
    """Training and held-out pairs and rankings; no prompt is on both sides of a split by `eval_fraction`.

    `seed` draws the pairs of `ratings` and the split. `use_margins` False: margins are not read. `held_out_margins`: whether
    those of `eval` are, which the held-out loss is without. `keep_records` and errors as in `load_sequences`.
    """
    bad, bad_held_out = Quarantine(), Quarantine()
    train = _named_preferences(data.train, seed, use_margins, bad)
    held_out = _named_preferences(data.eval, seed, held_out_margins, bad_held_out)
    train, held_out = split_records(data, train, held_out, seed, lambda record: _prompt_of(record[0]))
    return Split(
        _encode_preferences(train, data, tokenizer, bad, keep_records),
        None if held_out is None else _encode_preferences(held_out, data, tokenizer, bad_held_out, keep_records),
    )


def load_pairs(
    sources: Sequence[DataSource],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    use_margins: bool = True,
) -> PreferenceDataset:
    """All pairs and rankings of kinds `preference` and `ratings`; the arguments as in `load_preferences`."""
    bad = Quarantine()
    return _encode_preferences(_named_preferences(sources, seed, use_margins, bad), settings, tokenizer, bad)


def load_prompts(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    on_too_long: Literal["error", "skip", "truncate"] = "error",
    keep_records: bool = False,
) -> PromptDataset:
    """Prompts to generate from. A longer one than `max_prompt_tokens` is left out under `skip`, else refused: prompts
    are never cut. `keep_records` and errors as in `load_sequences`."""
    bad = Quarantine()
    prompts = [prompt for source in sources for prompt in read_prompts(source, bad)]
    rows, texts, used, tally = [], [], [], Tally(bad)
    for prompt in prompts:
        with _guarded(prompt, bad):
            ids = encode_prompt(tokenizer, prompt.messages)
            if len(ids) > max_prompt_tokens and on_too_long != "skip":
                raise (TooLongError if on_too_long == "error" else DataError)(
                    f"the prompt has {len(ids)} tokens, more than the {max_prompt_tokens} that data.max_length_tokens "
                    "leaves beside rollout.max_response_tokens; raise the first, lower the second, shorten the prompt, "
                    "or set on_too_long to skip"
                )
            tally.num_records += 1
            if len(ids) > max_prompt_tokens:
                tally.skip(prompt.location)
                continue
            tally.num_tokens += len(ids)
            rows.append(ids)
            texts.append(_readable(prompt.messages))
            used.append(prompt)
    _refuse_empty(rows, tally, f"max_prompt_tokens {max_prompt_tokens}")
    return PromptDataset(rows, texts, tally.report(duplicates(used)), used if keep_records else ())


def split_records(
    settings: TrainingData,
    train: list[R],
    held_out: list[R],
    seed: int,
    together: Callable[[R], Hashable] | None = None,
) -> tuple[list[R], list[R] | None]:
    """Records to train on, and held out: `held_out` if there are any, else `eval_fraction` of `train`, or None. Records are
    split, not chunks: no text is on both sides."""
    if held_out:
        return train, held_out
    if settings.eval_fraction == 0:
        return train, None
    return hold_out(train, settings.eval_fraction, seed, together)


def _named_preferences(
    sources: Sequence[DataSource], seed: int, use_margins: bool, bad: Quarantine
) -> list[tuple[Preference, str]]:
    """Pairs and rankings, each with the name of its source."""
    return [
        (record, name)
        for source, name in zip(sources, source_names(sources), strict=True)
        for record in read_preferences(source, seed, use_margins, bad)
    ]


def _prompt_of(preference: Preference) -> Hashable:
    """What a split keeps on one side: records of one prompt. Plain texts have none, and each record stands alone."""
    if not preference.prompt:
        return preference.location
    return turns_of(preference.prompt)


def encode_sequences(
    records: Sequence[Conversation | Text],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    bad: Quarantine,
    groups: Sequence[str] = (),
    keep_records: bool = False,
) -> SequenceDataset:
    """Records as sequences with targets. `groups`: of each record, as in `SequenceDataset`. `keep_records` and errors as in
    `load_sequences`."""
    rows: list[Encoded] = []
    of_row: list[str] = []
    used: list[Conversation | Text] = []
    kept_records: list[Conversation | Text] = []
    tally = Tally(bad)
    for number, record in enumerate(records):
        with _guarded(record, bad):
            if isinstance(record, Text):
                kept = fit_text(encode_text(tokenizer, record.text), settings)
            else:
                kept = fit(encode_conversation(tokenizer, record.messages), settings, tally)
            tally.num_records += 1
            if not kept:
                tally.skip(record.location)
            tally.num_tokens += sum(len(ids) for ids, _ in kept)
            rows += kept
            of_row += [groups[number] if groups else ""] * len(kept)
            used += [record] if kept else []
            kept_records += [record] * len(kept) if keep_records else []
    _refuse_empty(rows, tally, f"max_length_tokens {settings.max_length_tokens}")
    return SequenceDataset(rows, tally.report(duplicates(used)), of_row, kept_records)


def _encode_preferences(
    preferences: Sequence[tuple[Preference, str]],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    bad: Quarantine,
    keep_records: bool = False,
) -> PreferenceDataset:
    records: list[FittedResponses] = []
    used: list[Preference] = []
    sources: list[str] = []
    tally = Tally(bad)
    for preference, source in preferences:
        with _guarded(preference, bad):
            record = fit_responses(tokenizer, preference, settings)
            tally.num_records += 1
            left = preference.of(record.kept)
            if not any(left.ranks):
                tally.skip(preference.location)
                continue
            tally.drop(preference.num_repeated + len(preference.responses) - len(record.kept), preference.location)
            tally.num_truncated += any(record.cut)
            tally.num_tokens += sum(map(len, record.sequences))
            records.append(record)
            used.append(left)
            sources.append(source)
    _refuse_empty(records, tally, f"max_length_tokens {settings.max_length_tokens}")
    report = tally.report(duplicates(used), contradictions(used))
    return PreferenceDataset(records, used, report, sources, keep_records)


def _refuse_empty(rows: Sequence[object], tally: Tally, limit: str) -> None:
    if not rows:
        report = tally.report()
        bad = f"; {len(report.bad)} bad, the first since {report.bad[0].reason}" if report.bad else ""
        raise DataError(
            f"none of {report.num_records} records is left ({report.num_skipped} skipped under {limit}, first "
            f"{', '.join(report.skipped[:3]) or 'none'}{bad}); a set needs at least one: raise the limit, or give other data"
        )


@contextmanager
def _guarded(record: Conversation | Text | Preference | Prompt, bad: Quarantine) -> Iterator[None]:
    """The block encodes a record; what is wrong with it gets its place, and goes where its source's `on_bad_row` says."""
    try:
        yield
    except DataError as err:
        policy = "error" if isinstance(err, TooLongError) else record.on_bad_row
        bad.add(policy, DataError(f"{record.location}: {err}"), asdict(record))


def _readable(messages: tuple[Message, ...]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
