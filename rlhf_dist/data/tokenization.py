"""Records → token ids and loss masks at `max_length_tokens`, with `Dataset.map` and its cache on disk.

    records ─ contents (JSON) ─▶ Dataset.from_generator ─ map(batched, num_proc) ─▶ Arrow file, memory-mapped

Both steps are cached below `HF_DATASETS_CACHE` by content: the key has what is tokenized (never where it was read), the
tokenizer, its chat template, the length limit, and the code. A second run with the same data tokenizes nothing.
"""

from __future__ import annotations

import bisect
import datetime
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import datasets
import jinja2
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.data import DataSettings, SFTData
from rlhf_dist.core.cpus import usable_cpus
from rlhf_dist.core.errors import DataError, TooLongError
from rlhf_dist.data import chat_template, encoding, lengths, rendering, special_tokens, template_checks
from rlhf_dist.data.bad_rows import Tally
from rlhf_dist.data.chat_template import Message
from rlhf_dist.data.datasets import Ragged
from rlhf_dist.data.encoding import Encoded, encode_prompt, encode_rendered, encode_text
from rlhf_dist.data.lengths import all_targets, fit, fit_prompt, fit_text, longest_response, prompt_room
from rlhf_dist.data.records import Conversation, Preference, Prompt, Record, Text, arranged
from rlhf_dist.data.rendering import Rendered, render_conversation
from rlhf_dist.data.spool import cache_dir, full_cache_named

MIN_RECORDS_PER_PROCESS = 5_000
"""Fewer are tokenized faster than a process starts."""
_BATCH_SIZE, _BATCH_CHARS = 256, 2**19
"""Records, and on average characters, that a process tokenizes at a time, at most: a character may take 200 bytes meanwhile."""

_FEATURES = datasets.Features(
    {
        "ids": datasets.List(datasets.List(datasets.Value("int32"))),
        "masks": datasets.List(datasets.List(datasets.Value("uint8"))),
        "kept": datasets.List(datasets.Value("int32")),
        "cut": datasets.List(datasets.Value("uint8")),
        "response_tokens": datasets.List(datasets.Value("int32")),
        "error": datasets.Value("string"),
        "is_too_long": datasets.Value("bool"),
        "notes": datasets.List(datasets.Value("string")),
    }
)


@dataclass
class _Tokenized:
    """What becomes of one record: a row of the Arrow file."""

    ids: list[list[int]] = field(default_factory=list)
    """Its sequences: one, the chunks of a text, or the distinct responses of a preference. Empty: too long under `skip`."""
    masks: list[list[bool]] = field(default_factory=list)
    """Loss mask of each."""
    kept: list[int] = field(default_factory=list)
    """Preferences: position of each sequence's response among all of the record's."""
    cut: list[bool] = field(default_factory=list)
    """Whether each sequence was truncated."""
    response_tokens: list[int] = field(default_factory=list)
    """Tokens of each sequence's response, its end included."""
    error: str | None = None
    """Why the record is invalid."""
    is_too_long: bool = False
    """Whether `error` is `on_too_long: error`."""
    notes: list[str] = field(default_factory=list)
    """How it differs from what a response follows in use; kept, so that a run that tokenizes nothing says it too."""

    def add(
        self, ids: list[int], mask: list[bool], cut: bool = False, response_tokens: int = 0, response: int = 0
    ) -> None:
        """Add a sequence."""
        self.ids.append(ids)
        self.masks.append(mask)
        self.cut.append(cut)
        self.response_tokens.append(response_tokens)
        self.kept.append(response)


@dataclass(frozen=True)
class Usable:
    """A record that was tokenized, and its sequences in `Tokens`."""

    number: int
    """Among the records that were given."""
    sequences: range
    kept: list[int]
    cut: list[bool]
    response_tokens: list[int]
    num_tokens: int


@dataclass(frozen=True)
class Tokens:
    """The sequences of all records, memory-mapped."""

    ids: Ragged
    """int32 token ids of each sequence."""
    masks: Ragged
    """bool loss mask of each sequence."""
    rows: datasets.Dataset

    def usable(self, records: Sequence[Record], tally: Tally) -> Iterator[Usable]:
        """The records that have sequences, in order; counts valid records, skipped and bad ones, and notes, in `tally`.

        Raises:
            DataError: a record that is invalid under `on_bad_row: error`, or too long under `on_too_long: error`.
        """
        start, num_tokens = 0, self.ids.lengths
        for number, (record, row) in enumerate(zip(records, self._columns(), strict=True)):
            if row["error"] is not None:
                error = (TooLongError if row["is_too_long"] else DataError)(f"{record.location}: {row['error']}")
                policy = "error" if row["is_too_long"] else record.on_bad_row
                tally.bad_rows.add(policy, error, asdict(record))
                continue
            tally.num_records += 1
            sequences = range(start, start := start + len(row["cut"]))
            if not sequences:
                tally.skip(record.location)
                continue
            tally.bad_rows.notes.update(row["notes"])
            yield Usable(
                number,
                sequences,
                row["kept"],
                list(map(bool, row["cut"])),
                row["response_tokens"],
                int(num_tokens[sequences.start : sequences.stop].sum()),
            )

    def _columns(self) -> Iterator[dict[str, Any]]:
        """What is not tokens, record by record."""
        rows = self.rows.select_columns(
            ["kept", "cut", "response_tokens", "error", "is_too_long", "notes"]
        ).with_format("arrow")
        for table in rows.iter(batch_size=4096):
            yield from cast(Any, table).to_pylist()


def tokenize(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    num_proc: int | None = None,
) -> Tokens:
    """The sequences of records, cached on disk.

    Args:
        records: at least one, of one or more types.
        tokenizer: from `load_tokenizer`.
        settings: `max_length_tokens` (for prompts, their own limit) and `on_too_long`.
        num_proc: processes; None: one for each CPU that this process may use, as long as each has
            `MIN_RECORDS_PER_PROCESS` records.

    Raises:
        DataError: the disk of the cache is full.
    """
    if num_proc is None:
        num_proc = max(1, min(usable_cpus(), len(records) // MIN_RECORDS_PER_PROCESS))
    num_chars = 0

    def counted() -> Iterator[str]:
        nonlocal num_chars
        for record in records:
            yield (content := _content(record, settings))
            num_chars += len(content)

    content_digest = _digest(counted())
    batch_size = min(max(_BATCH_CHARS * len(records) // num_chars, 1), _BATCH_SIZE)
    limits = [str(settings.max_length_tokens), settings.on_too_long]
    with full_cache_named(), _progress_bars(shown=num_proc > 1):
        contents = datasets.Dataset.from_generator(
            partial(_contents, records, settings),
            features=datasets.Features({"content": datasets.Value("string")}),
            cache_dir=str(cache_dir()),
            fingerprint=content_digest,
            writer_batch_size=batch_size,
        )
        rows = cast(datasets.Dataset, contents).map(
            _tokenize_batch,
            fn_kwargs={"tokenizer": tokenizer, "settings": settings},
            batched=True,
            batch_size=batch_size,
            num_proc=num_proc if num_proc > 1 else None,
            remove_columns=["content"],
            features=_FEATURES,
            new_fingerprint=_digest([content_digest, *limits, *_tokenizer_identity(tokenizer), _code_digest()]),
            load_from_cache_file=True,
            desc="tokenizing",
        )
    return Tokens(Ragged.from_arrow(rows.data.column("ids")), Ragged.from_arrow(rows.data.column("masks"), bool), rows)


def used_prompt(record: Prompt, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> Sequence[Message]:
    """The messages of a prompt as they are tokenized: arranged, and under `truncate_left` cut at `max_length_tokens`."""
    content = json.loads(_content(record, settings))
    if settings.on_too_long == "truncate_left":
        content, _ = _without_oldest_turns(tokenizer, content, [], settings.max_length_tokens)
    return content["prompt"]


def _contents(records: Sequence[Record], settings: DataSettings) -> Iterator[dict[str, str]]:
    for record in records:
        yield {"content": _content(record, settings)}


def _content(record: Record, settings: DataSettings) -> str:
    """What of a record is tokenized, as JSON; without its place, so that a renamed file is not tokenized again."""
    if isinstance(record, Text):
        content: Any = {"text": record.text}
    elif isinstance(record, Conversation):
        messages, moved = arranged(record.messages, settings.system, settings.same_role_turns, record.targets)
        targets = record.targets
        if isinstance(settings, SFTData) and settings.train_on == "last":
            targets = targets if targets is not None else range(len(record.messages))
            targets = [i for i in targets if record.messages[i]["role"] == "assistant"][-1:]
        targets = None if targets is None else sorted({moved[i] for i in targets})
        content = {"messages": messages, "targets": targets, "tools": record.tools}
    elif isinstance(record, Preference):
        prompt, _ = arranged(record.prompt, settings.system, settings.same_role_turns)
        responses = [arranged(response, "keep", settings.same_role_turns)[0] for response in record.responses]
        content = {"prompt": prompt, "responses": responses, "tools": record.tools}
    else:
        prompt, _ = arranged(record.messages, settings.system, settings.same_role_turns)
        content = {"prompt": prompt, "tools": record.tools}
    return json.dumps(content, ensure_ascii=False)


def _tokenize_batch(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> dict[str, list[Any]]:
    """A batch of contents → columns of `_FEATURES`. All its conversations are tokenized in one call."""
    contents = [json.loads(content) for content in batch["content"]]
    rendered = [_rendered(tokenizer, content) for content in contents]
    valid = [one for of_record in rendered for one in of_record if isinstance(one, Rendered)]
    encoded = iter(encode_rendered(tokenizer, valid))
    found = []
    for content, of_record in zip(contents, rendered, strict=True):
        results = [next(encoded) if isinstance(one, Rendered) else one for one in of_record]
        if settings.on_too_long == "truncate_left":
            content, results = _without_oldest_turns(tokenizer, content, results, settings.max_length_tokens)
        try:
            found.append(_tokenized(content, results, tokenizer, settings))
            notes = [note for one in of_record if isinstance(one, Rendered) for note in one.notes]
            found[-1].notes += dict.fromkeys(notes)
        except DataError as err:
            found.append(_Tokenized(error=str(err), is_too_long=isinstance(err, TooLongError)))
    return {name: [getattr(one, name) for one in found] for name in _FEATURES}


def _rendered(tokenizer: PreTrainedTokenizerBase, content: dict[str, Any]) -> list[Rendered | DataError]:
    """The conversations of a content; [] for plain texts and prompts."""
    targets: Collection[int] | None
    if "messages" in content:
        conversations, targets = [content["messages"]], content["targets"]
    elif content.get("prompt") and "responses" in content:
        conversations = [[*content["prompt"], *response] for response in content["responses"]]
        targets = range(len(content["prompt"]), max(map(len, conversations)))
    else:
        return []
    found: list[Rendered | DataError] = []
    for messages in conversations:
        try:
            found.append(render_conversation(tokenizer, messages, targets, content.get("tools", ())))
        except DataError as err:
            found.append(err)
    return found


def _without_oldest_turns(
    tokenizer: PreTrainedTokenizerBase,
    content: dict[str, Any],
    conversations: list[Encoded | DataError],
    limit: int,
) -> tuple[dict[str, Any], list[Encoded | DataError]]:
    """The content without as many of its oldest turns as make it fit, or all but the last exchange, and its conversations."""
    name = "messages" if "messages" in content else "prompt"
    whole = content.get(name) or ()
    kept = next((i for i, message in enumerate(whole) if message["role"] != "system"), len(whole))
    starts = [i for i, message in enumerate(whole) if message["role"] == "user" and i > kept]
    wanted = [i for i, message in enumerate(whole) if message["role"] == "assistant"]
    wanted = wanted if content.get("targets") is None else content["targets"]
    for start in starts:
        if _fits(tokenizer, content, conversations, limit):
            break
        if name == "messages" and not any(i > start for i in wanted):
            break
        content = content | {name: [*whole[:kept], *whole[start:]], "cut": True}
        if name == "messages":
            content["targets"] = [i - start + kept for i in wanted if i > start]
        conversations = _encoded(tokenizer, content)
    if _fits(tokenizer, content, conversations, limit):
        return content, conversations
    return _without_beginning(tokenizer, content, conversations, limit)


def _encoded(tokenizer: PreTrainedTokenizerBase, content: dict[str, Any]) -> list[Encoded | DataError]:
    return [
        one if isinstance(one, DataError) else encode_rendered(tokenizer, [one])[0]
        for one in _rendered(tokenizer, content)
    ]


def _without_beginning(
    tokenizer: PreTrainedTokenizerBase,
    content: dict[str, Any],
    conversations: list[Encoded | DataError],
    limit: int,
) -> tuple[dict[str, Any], list[Encoded | DataError]]:
    """The content without as much of the beginning of its first user message as makes the prompt fit: what the template renders
    before it, a system message among it, stays. As it is where that does not suffice, or nothing of it can be cut."""
    name = "messages" if "messages" in content else "prompt"
    whole = content.get(name) or ()
    first = next((i for i, message in enumerate(whole) if message["role"] == "user"), None)
    if first is None:
        return content, conversations
    text = whole[first]["content"]

    def cut(num_chars: int) -> dict[str, Any]:
        shorter = whole[first] | {"content": text[num_chars:]}
        return content | {name: [*whole[:first], shorter, *whole[first + 1 :]], "cut": True}

    def fits(num_chars: int) -> bool:
        shorter = cut(num_chars)
        found = _encoded(tokenizer, shorter)
        if not found:
            return _fits(tokenizer, shorter, found, limit)
        valid = [one for one in found if not isinstance(one, DataError)]
        return all(mask.index(True) <= prompt_room(valid, limit) for _, mask in valid)

    most = len(text.rstrip()) - 1  # something of it has to be left
    num_chars = bisect.bisect_left(range(most + 1), True, key=fits)
    if num_chars > most:
        return content, conversations
    content = cut(num_chars)
    return content, _encoded(tokenizer, content)


def _fits(
    tokenizer: PreTrainedTokenizerBase,
    content: dict[str, Any],
    conversations: Sequence[Encoded | DataError],
    limit: int,
) -> bool:
    """Whether nothing of a content is too long; also where it is invalid."""
    if "text" in content or conversations or "responses" in content:
        return all(isinstance(one, DataError) or len(one[0]) <= limit for one in conversations)
    try:
        return len(encode_prompt(tokenizer, content["prompt"], content["tools"])) <= limit
    except DataError:
        return True


def _tokenized(
    content: dict[str, Any],
    conversations: Sequence[Encoded | DataError],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
) -> _Tokenized:
    """The sequences of a content at the length limit.

    Raises:
        DataError, TooLongError: the content is invalid.
    """
    found = _Tokenized()
    was_cut = content.get("cut", False)
    if "text" in content:
        for ids, mask in fit_text(encode_text(tokenizer, content["text"]), settings):
            found.add(ids, mask)
    elif "messages" in content:
        for ids, mask, cut in fit(_valid(conversations[0]), settings):
            found.add(ids, mask, cut or was_cut)
    elif "responses" in content:
        # One prompt for all responses: the longest says how much of it is cut.
        longest = longest_response([one for one in conversations if not isinstance(one, DataError)])
        for number, response in enumerate(content["responses"]):
            encoded = (
                _valid(conversations[number])
                if conversations
                else all_targets(encode_text(tokenizer, response[-1]["content"]))
            )
            for ids, mask, cut in fit(encoded, settings, longest):
                # Truncation can make two responses equal, and so can a tokenizer that folds case or accents.
                if ids not in found.ids:
                    num_tokens = len(ids) - mask.index(True) if conversations else len(ids)
                    found.add(ids, mask, cut or was_cut, num_tokens, number)
    else:
        whole = encode_prompt(tokenizer, content["prompt"], content["tools"])
        for ids in fit_prompt(whole, settings):
            found.add(ids, [False] * len(ids), was_cut or len(ids) < len(whole))
    return found


def _valid(encoded: Encoded | DataError) -> Encoded:
    if isinstance(encoded, DataError):
        raise encoded
    return encoded


def _digest(parts: Iterable[str]) -> str:
    """32 hex digits of a hash of strings and their borders."""
    found = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()[:32]


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All that decides what a tokenizer makes of a conversation. `datasets` would hash the pickled object, which changes as
    it is used."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    template = json.dumps(tokenizer.chat_template, sort_keys=True)  # a text, or several with names
    # A template that renders the date is tokenized anew each day.
    today = datetime.date.today().isoformat() if "strftime_now" in template else ""
    return [
        type(tokenizer).__name__,
        core.to_str() if core is not None else repr(tokenizer),
        template,
        json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True),
        today,
    ]


@cache
def _code_digest() -> str:
    """Of what tokenizes: this package's code, and the versions of the libraries."""
    others = (chat_template, encoding, lengths, rendering, special_tokens, template_checks)
    modules = (__file__, *(str(module.__file__) for module in others))
    code = [Path(module).read_text(encoding="utf-8") for module in modules]
    return _digest([*code, transformers.__version__, tokenizers.__version__, jinja2.__version__])


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hides the progress bars of `datasets` unless `shown`."""
    if shown or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
