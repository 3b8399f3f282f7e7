"""Several responses to each prompt, in a random order: what people and judges choose among.

What is written has the form of `candidates.py`. A candidate's `drawn` is its place before the order was drawn (all of the first
generator, then all of the second, ...); where it is in the record says nothing about what made it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rlhf_dist.config.data import DataSource
from rlhf_dist.core.errors import DataError
from rlhf_dist.core.random import permutation
from rlhf_dist.curation.candidates import identity_of_messages, is_text, item_id
from rlhf_dist.curation.config.responses import ResponsesConfig
from rlhf_dist.curation.generators import Completion, Request
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.chat_template import Message
from rlhf_dist.data.reader import read_prompts
from rlhf_dist.data.records import Prompt


class Slot(NamedTuple):
    """A response that is wanted."""

    prompt: int
    generator: int
    response: int
    """Which of the generator's responses to the prompt."""


@dataclass(frozen=True)
class Piece:
    """Slots that one generator fills at once."""

    draw: int
    """0, then 1 for slots that are drawn anew, and so on."""
    generator: int
    slots: tuple[Slot, ...]


@dataclass
class ResponsesReport:
    """What became of everything that was asked for."""

    prompts: int = 0
    repeated_prompts: int = 0
    """Read more than once, answered once."""
    requests: int = 0
    redrawn: int = 0
    """Of the requests: draws in place of an empty or equal response."""
    by_generator: list[dict[str, Any]] = field(default_factory=list)
    """For each generator: responses kept, cut off at the longest length, and skipped as failed, empty or equal."""
    skipped_prompts: int = 0
    """With fewer than two responses."""
    records: int = 0


def read_distinct_prompts(sources: Iterable[DataSource], bad_rows: BadRows, report: ResponsesReport) -> list[Prompt]:
    """The prompts of all sources, each once; bad rows as `on_bad_row` says."""
    return distinct((prompt for source in sources for prompt in read_prompts(source, bad_rows)), report)


def distinct(prompts: Iterable[Prompt], report: ResponsesReport) -> list[Prompt]:
    """Each prompt once, the first of equal ones."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        if found.setdefault(_canonical(prompt), prompt) is not prompt:
            report.repeated_prompts += 1
    report.prompts = len(found)
    return list(found.values())


def prompts_of_rows(rows: Iterable[Mapping[str, Any]]) -> list[Prompt]:
    """Prompts of rows with a column `prompt` (a text or a chat), such as a `datasets.Dataset`.

    Raises:
        DataError: a row without one; with its number.
    """
    prompts = []
    for number, row in enumerate(rows, start=1):
        value = row.get("prompt")
        messages = ({"role": "user", "content": value},) if isinstance(value, str) else tuple(value or ())
        if not messages or not str(messages[-1].get("content", "")).strip():
            raise DataError(f"row {number}: no prompt in column 'prompt'; fill it, or remove the row")
        prompts.append(Prompt(messages, f"row {number}", tools=tuple(row.get("tools") or ())))
    return prompts


class Responses:
    """The state of the work: which slots are filled. No model is needed to restore it."""

    def __init__(
        self, settings: ResponsesConfig, prompts: Sequence[Prompt], report: ResponsesReport | None = None
    ) -> None:
        """Nothing is filled yet."""
        self.settings = settings
        self.prompts = list(prompts)
        self.report = report or ResponsesReport(prompts=len(prompts))
        self._hashes = [hashlib.sha256(_canonical(prompt).encode()) for prompt in prompts]
        self._filled: dict[Slot, Completion] = {}

    @property
    def num_slots(self) -> int:
        """Responses that are wanted."""
        return len(self.prompts) * sum(generator.num_responses for generator in self.settings.generators)

    def pieces(self) -> Iterator[Piece]:
        """What is to be done, in order; every piece must be absorbed before the next is asked for."""
        for draw in range(self.settings.max_redraws + 1):
            missing = self._wanting(draw)
            for number, generator in enumerate(self.settings.generators):
                slots = [slot for slot in missing if slot.generator == number]
                for start in range(0, len(slots), generator.batch_size):
                    yield Piece(draw, number, tuple(slots[start : start + generator.batch_size]))

    def requests(self, piece: Piece) -> list[Request]:
        """What the piece's generator is asked."""
        sampling = self.settings.generators[piece.generator].sampling
        prompts = [self.prompts[slot.prompt] for slot in piece.slots]
        return [
            Request(prompt.messages, sampling, self._key(slot, piece.draw), prompt.tools)
            for prompt, slot in zip(prompts, piece.slots, strict=True)
        ]

    def absorb(self, piece: Piece, completions: Sequence[Completion]) -> None:
        """Fill the slots of a piece."""
        self.report.requests += len(piece.slots)
        self.report.redrawn += len(piece.slots) if piece.draw else 0
        self._filled.update(zip(piece.slots, completions, strict=True))

    def has_answered(self, generator: int) -> bool:
        """Whether a generator has answered any request."""
        return any(s.generator == generator and c.finish_reason != "error" for s, c in self._filled.items())

    def records(self) -> Iterator[dict[str, Any]]:
        """A record for each prompt with two or more responses; the report is complete when all have been taken."""
        outcome = [Counter[str]() for _ in self.settings.generators]
        self.skipped: list[dict[str, Any]] = []
        for number, prompt in enumerate(self.prompts):
            kept = self._kept(number, outcome)
            if len(kept) < 2:
                texts = [self._text(slot) for slot in self._slots(number)]
                self.skipped.append({"prompt": _prompt(prompt), "responses": texts, "row": prompt.location})
                continue
            yield self._record(number, kept)
        self.report.skipped_prompts = len(self.skipped)
        self.report.records = len(self.prompts) - len(self.skipped)
        self.report.by_generator = [
            {"generator": settings.label, "sampling": settings.sampling.model_dump(mode="json"), **counts}
            for settings, counts in zip(self.settings.generators, outcome, strict=True)
        ]

    def _record(self, number: int, kept: list[Slot]) -> dict[str, Any]:
        drawn = [self._slots(number).index(slot) for slot in kept]
        seed = int.from_bytes(self._hashes[number].digest()[:8], "little") >> 1
        order = permutation(self.settings.seed, "responses/order", seed, len(kept)).tolist()
        candidates = []
        for place in order:
            slot = kept[place]
            generator, completion = self.settings.generators[slot.generator], self._filled[slot]
            candidates.append(
                {
                    "text": self._text(slot),
                    "model": generator.label,
                    "sampling": generator.sampling.model_dump(mode="json"),
                    "finish_reason": completion.finish_reason,
                    "drawn": drawn[place],
                }
            )
        prompt, tools = _prompt(self.prompts[number]), self.prompts[number].tools
        return {
            "id": item_id(prompt, [candidate["text"] for candidate in candidates], tools),
            "prompt": prompt,
            **({"tools": list(tools)} if tools else {}),
            "candidates": candidates,
            "provenance": {"row": self.prompts[number].location},
        }

    def _kept(self, number: int, outcome: list[Counter[str]]) -> list[Slot]:
        """The responses to a prompt that may are in its record; counts what happens to each."""
        kept: list[Slot] = []
        seen: set[str] = set()
        for slot in self._slots(number):
            completion, text = self._filled[slot], self._text(slot)
            if completion.finish_reason == "error" or not text:
                outcome[slot.generator]["failed" if completion.finish_reason == "error" else "empty"] += 1
            elif text in seen and self.settings.duplicates == "drop":
                outcome[slot.generator]["equal"] += 1
            else:
                outcome[slot.generator]["kept"] += 1
                outcome[slot.generator]["cut_off"] += completion.finish_reason == "length"
                kept.append(slot)
            seen.add(text)
        return kept if len(seen - {""}) > 1 else []

    def _wanting(self, draw: int) -> list[Slot]:
        """Slots to fill: all, then those of no use whose generator may answer differently."""
        if draw == 0:
            return [slot for number in range(len(self.prompts)) for slot in self._slots(number)]
        wanting = []
        for number in range(len(self.prompts)):
            seen: set[str] = set()
            for slot in self._slots(number):
                text = self._text(slot)
                again = not text or text in seen
                if again and self.settings.generators[slot.generator].sampling.temperature > 0:
                    wanting.append(slot)
                seen.add(text)
        return wanting

    def _slots(self, number: int) -> list[Slot]:
        generators = enumerate(self.settings.generators)
        return [Slot(number, g, k) for g, settings in generators for k in range(settings.num_responses)]

    def _text(self, slot: Slot) -> str:
        return self._filled[slot].text.strip()

    def _key(self, slot: Slot, draw: int) -> int:
        """Of the prompt's text, not of its place: other prompts before it change nothing."""
        state = self._hashes[slot.prompt].copy()
        state.update(f"/{slot.generator}/{slot.response}/{draw}".encode())
        return int.from_bytes(state.digest()[:8], "little") >> 1


def _canonical(prompt: Prompt) -> str:
    """What makes prompts differ. Tools are at the end where there are some, for what is drawn for a prompt depends on it."""
    tools = [json.dumps(prompt.tools, sort_keys=True, default=str)] if prompt.tools else []
    return json.dumps([*identity_of_messages(prompt.messages), *tools])


def _prompt(prompt: Prompt) -> str | list[Message]:
    """As short as it can be told."""
    if is_text(prompt.messages, "user"):
        return prompt.messages[0]["content"]
    return [dict(message) for message in prompt.messages]
