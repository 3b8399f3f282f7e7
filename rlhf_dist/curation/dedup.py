"""Duplicates: which records of a stream are the same as an earlier one, or are in an evaluation set.

    verdicts = find_duplicates(dataset, DedupSettings(), fields=("instruction", "output"))
    dataset.select(verdicts.kept())

The stream is read once. Texts are normalized, hashed and signed in other processes where that is asked for
(`fingerprints.py`), and kept on disk; what is in memory grows by some 30 bytes a record, and by 12 for each bucket that it
shares with another (`near_duplicates.py`).

The order of the records decides, and nothing else: first those that an evaluation set contains are out, then of equal texts
all but the first, then each that is nearly the same as an earlier one that is kept.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_dist.config.data import RecordKind
from rlhf_dist.core.errors import DataError
from rlhf_dist.curation.config.dedup import DedupSettings
from rlhf_dist.curation.decontamination import EvaluationIndex, Match, matches
from rlhf_dist.curation.fingerprints import SEPARATOR, Signatures, encoded, normalized, signatures
from rlhf_dist.curation.near_duplicates import BandFiles, NearVerdicts, find_near
from rlhf_dist.curation.parallel import ordered_map
from rlhf_dist.data.fields import Fields
from rlhf_dist.data.kinds import KINDS
from rlhf_dist.data.preferences import preference_messages
from rlhf_dist.data.records import Text, turns_of
from rlhf_dist.data.spool import Spool

Reason = Literal["exact duplicate", "near-duplicate", "in an evaluation set"]

TEXT_FIELDS: dict[RecordKind, tuple[str, ...]] = {
    "instruction": ("demonstration", "instruction", "input", "output"),
    "messages": ("messages",),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected", "responses"),
    "ratings": ("prompt", "response"),
    "prompt": ("prompt",),
    "candidates": ("prompt",),
}
"""What is compared of each kind, unless fields are chosen; in whatever shape the kind recognizes (`record_texts`)."""

_CHUNK_TEXTS, _CHUNK_CHARACTERS = 2048, 1 << 21


@dataclass(frozen=True)
class Removal:
    """Why a record is not kept."""

    reason: Reason
    of: int
    """The kept record, or the evaluation record, that it is the same as."""
    similarity: float | None = None
    """Jaccard similarity of near-duplicates."""
    run: str | None = None
    """The words shared with an evaluation record."""


@dataclass
class Verdicts:
    """What becomes of each record of a stream."""

    equal_to: np.ndarray
    """[records] int64: the first record with the same normalized text; its own number where there is no earlier one."""
    near: NearVerdicts
    contaminated: dict[int, Match]
    num_empty: int
    """Records whose compared text is empty. They are kept: having nothing in common is no likeness."""
    _removed: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._removed = self.equal_to != np.arange(len(self.equal_to))
        self._removed |= self.near.of >= 0
        self._removed[list(self.contaminated)] = True

    def __len__(self) -> int:
        return len(self.equal_to)

    def kept(self) -> np.ndarray:
        """[kept] int64 numbers of the records that stay, rising."""
        return np.flatnonzero(~self._removed)

    def removal(self, record: int) -> Removal | None:
        """Why a record is removed; None where it is kept."""
        if not self._removed[record]:
            return None
        match = self.contaminated.get(record)
        if match is not None:
            return Removal("in an evaluation set", match.row, run=match.run)
        if self.equal_to[record] != record:
            first = int(self.equal_to[record])
            # The first of equal texts may itself be nearly the same as an earlier one: that one stays.
            if self.near.of[first] < 0:
                return Removal("exact duplicate", first)
            return Removal("exact duplicate", int(self.near.of[first]), float(self.near.similarity[first]))
        return Removal("near-duplicate", int(self.near.of[record]), float(self.near.similarity[record]))

    def counts(self) -> dict[str, int]:
        """Records kept, and removed for each reason."""
        num_near = int((self.near.of >= 0).sum())
        num_contaminated = len(self.contaminated)
        kept = int((~self._removed).sum())
        return {
            "read": len(self),
            "in an evaluation set": num_contaminated,
            "exact duplicate": len(self) - kept - num_near - num_contaminated,
            "near-duplicate": num_near,
            "kept": kept,
        }


def compared_text(row: Mapping[str, Any], fields: Sequence[str]) -> str:
    """The text of some fields of a record; those it lacks are empty.

    Raises:
        DataError: a field holds neither text nor a list of texts or messages.
    """
    return SEPARATOR.join(_flat(name, row.get(name)) for name in fields)


def record_texts(kind: RecordKind, row: Fields) -> tuple[str, str]:
    """The texts of a row as its kind reads it, whatever its shape: what is compared with other records, and with evaluation
    sets. The first has what else makes records differ: roles out of the usual turns, calls of tools, tools.

    Raises:
        DataError: the row is invalid.
    """
    parts, tools = _parsed(kind, row)
    texts = [part if isinstance(part, str) else _turns(part) for part in parts]
    contents = [part if isinstance(part, str) else SEPARATOR.join(turn[1] for turn in part) for part in parts]
    if tools:
        # By their hash: descriptions of tools are long, and would make short chats that share them near-duplicates.
        texts.append(
            hashlib.blake2b(json.dumps(tools, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
        )
    return SEPARATOR.join(texts), SEPARATOR.join(contents)


def _parsed(kind: RecordKind, row: Fields) -> tuple[list[Any], Sequence[Any]]:
    """(texts and turns, tools)."""
    parser = KINDS[kind]
    if kind in ("prompt", "candidates"):
        return [parser.subject(row)], ()
    if kind == "ratings":
        rated = parser.preference(row, use_margins=False)
        prompt = turns_of(rated.prompt) if rated.prompt else ""
        return [prompt if len(rated.prompt) != 1 else rated.prompt[0]["content"], rated.response], ()
    if kind == "preference":
        prompt, responses = preference_messages(row)
        return [turns_of(messages) for messages in (prompt, *responses)], row.tools()
    if kind == "instruction" and all(row.get(field) is None for field in ("output", "completion")):
        return [turns_of(parser.prompt(row))], ()  # as prompts, instructions need no output
    record = parser.sequence(row, "")
    return ([record.text], ()) if isinstance(record, Text) else ([turns_of(record.messages)], record.tools)


def _turns(turns: Sequence[Sequence[str]]) -> str:
    """Without the roles where user and assistant take turns as usual: a chat of one is an instruction to another."""
    roles = [turn[0] for turn in turns]
    usual = [("user", "assistant")[i % 2] for i in range(len(roles) + 1)]
    as_usual = roles == usual[:-1] or roles == ["assistant"]
    return SEPARATOR.join(part for turn in turns for part in turn[as_usual:])


def _flat(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and "from" in value and "value" in value:
        return f"{value['from']}{SEPARATOR}{_flat(name, value['value'])}"
    if isinstance(value, Mapping) and value.get("type") == "text":
        return _flat(name, value.get("text"))
    if isinstance(value, Mapping) and "content" in value:
        return f"{value.get('role', '')}{SEPARATOR}{_flat(name, value['content'])}"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return SEPARATOR.join(_flat(name, item) for item in value)
    if isinstance(value, (int, float)):
        return str(value)
    raise DataError(
        f"field {name!r} holds a {type(value).__name__}, which has no text to compare; leave it out of fields"
    )


@dataclass(frozen=True)
class _Prints:
    """Of a chunk of n texts."""

    texts: list[bytes]
    """Normalized; empty where there is nothing to compare."""
    digests: np.ndarray
    """[n] uint64."""
    signatures: Signatures | None
    matches: dict[int, list[Match]]


def _fingerprint(settings: DedupSettings, index: Path | None, chunk: Sequence[tuple[str, str]]) -> _Prints:
    """`chunk`: of each record the text that is compared with other records, and the one compared with evaluation sets."""
    plain = [normalized(text, settings.normalize) for text, _ in chunk]
    plain = [text if text.strip(SEPARATOR + " \t\r\n") else "" for text in plain]
    texts = [encoded(text) for text in plain]
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return _Prints(
        texts,
        np.frombuffer(digests, dtype=np.uint64),
        signatures(plain, settings.near) if settings.near is not None else None,
        matches([text for _, text in chunk], index) if index is not None else {},
    )


def find_duplicates(
    rows: Iterable[Mapping[str, Any]],
    settings: DedupSettings,
    *,
    fields: Sequence[str],
    evaluation: EvaluationIndex | None = None,
    evaluated_fields: Sequence[str] | None = None,
    scratch: Path | None = None,
    num_processes: int = 0,
) -> Verdicts:
    """Compare each record with those before it, and with evaluation sets.

    Args:
        rows: the records, such as a `datasets.Dataset`; read once.
        settings: what counts as the same. `settings.fields` is the command's; here `fields` says it.
        fields: of a record, that are compared with other records.
        evaluation: a finished index, where records of evaluation sets are to be removed.
        evaluated_fields: of a record, that are compared with evaluation sets; `fields` when None.
        scratch: folder for files while it works, some twice the size of the texts; a temporary one when None.
        num_processes: that fingerprint texts, beside this one; 0 uses this one. The verdicts are the same.

    Raises:
        DataError: a field without text.
        ConfigError: what the settings need is not installed, or cannot be met.
    """
    if isinstance(fields, str):
        raise TypeError("fields is a string; give a sequence of field names")
    with ExitStack() as stack:
        base = None if scratch is None else str(scratch)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dedup.", dir=base)))
        texts = stack.enter_context(Spool(folder / "texts"))
        bands = None if settings.near is None else stack.enter_context(BandFiles(folder, settings.near))
        digests = [np.zeros(0, dtype=np.uint64)]
        contaminated: dict[int, Match] = {}
        chunks = _chunks(rows, fields, fields if evaluated_fields is None else evaluated_fields)
        task = partial(_fingerprint, settings, None if evaluation is None else evaluation.folder)
        for prints in ordered_map(task, chunks, num_processes):
            first = len(texts)
            for text in prints.texts:
                texts.append(text)
            digests.append(prints.digests)
            if bands is not None and prints.signatures is not None:
                bands.append(prints.signatures)
            for number, candidates in prints.matches.items():
                match = evaluation.confirmed(candidates) if evaluation is not None else None
                if match is not None:
                    contaminated[first + number] = match
        return _verdicts(settings, texts, np.concatenate(digests), bands, contaminated)


def _chunks(
    rows: Iterable[Mapping[str, Any]], fields: Sequence[str], evaluated: Sequence[str]
) -> Iterator[list[tuple[str, str]]]:
    chunk: list[tuple[str, str]] = []
    characters = 0
    for row in rows:
        text = compared_text(row, fields)
        # The same object where the fields are the same, so that it goes to another process once.
        chunk.append((text, text if evaluated == fields else compared_text(row, evaluated)))
        characters += len(text)
        if len(chunk) == _CHUNK_TEXTS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _verdicts(
    settings: DedupSettings, texts: Spool, digests: np.ndarray, bands: BandFiles | None, contaminated: dict[int, Match]
) -> Verdicts:
    active = texts.lengths() > 0
    num_empty = int((~active).sum())
    active[list(contaminated)] = False
    equal_to = np.arange(len(texts), dtype=np.int64)
    if settings.exact:
        _mark_equal(texts, digests, active, equal_to)
        active &= equal_to == np.arange(len(texts))
    near = NearVerdicts.none(len(texts))
    if bands is not None:
        near = find_near(bands, active, lambda number: texts[number].decode("utf-8", "surrogatepass"))
    return Verdicts(equal_to, near, contaminated, num_empty)


def _mark_equal(texts: Spool, digests: np.ndarray, active: np.ndarray, equal_to: np.ndarray) -> None:
    """Point each active text to the first equal one; a digest that agrees by chance is told by the texts themselves."""
    numbers = np.flatnonzero(active)
    order = numbers[np.argsort(digests[numbers], kind="stable")]
    if not len(order):
        return
    ordered = digests[order]
    begins = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    sizes = np.diff(begins, append=len(order))
    for begin, size in zip(begins[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
        first, *others = order[begin : begin + size].tolist()
        wanted = texts[first]
        for number in others:
            if texts[number] == wanted:
                equal_to[number] = first
