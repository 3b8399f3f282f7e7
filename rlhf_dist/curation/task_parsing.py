"""Tasks out of what a model wrote: a list of instructions, inputs and outputs under headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from rlhf_dist.curation.config.self_instruct import TaskFormat
from rlhf_dist.curation.generators import Completion


@dataclass(frozen=True)
class Task:
    """An instruction, with an input where it needs one, and its output."""

    instruction: str
    input: str
    output: str


class ParsedTasks(NamedTuple):
    """What a completion holds."""

    tasks: list[Task]
    num_malformed: int
    """Pieces that are no task: a heading is missing, doubled or out of place."""
    num_unfinished: int
    """1 where the last task was cut off at the longest length, and is skipped."""


class TaskParser:
    """Reads completions that continue from a prompt which ends in the heading of an instruction.

    Models number their headings or not, write them in bold, and begin with the heading once more or a sentence of their
    own; all that is understood. A task is an instruction, at most one input, and one output, in this order; a piece between
    two headings of instructions that is anything else costs that piece.
    """

    def __init__(self, form: TaskFormat) -> None:
        self.form = form
        names = {heading.strip().lower(): part for part, heading in form.model_dump().items() if part != "no_input"}
        either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        self._names = names
        self._heading = re.compile(
            rf"^[ \t]*[*_#>-]*[ \t]*(?:(?:task[ \t]*)?\d+[ \t]*[.):-]*[ \t]*)?[*_]*({either})s?[*_]*[ \t]*:[*_]*",
            re.IGNORECASE | re.MULTILINE,
        )
        self._rule = re.compile(r"^[ \t]*(?:#{2,}|-{3,}|\*{3,}|={3,})[ \t]*$", re.MULTILINE)
        marker = form.no_input.strip()
        self._no_input = {marker.lower(), marker.strip("<>[]()").lower(), ""}

    def parse(self, completion: Completion) -> ParsedTasks:
        """The tasks of a completion, in order."""
        pieces = self._pieces(completion.text)
        unfinished = 0
        if completion.finish_reason == "length" and pieces:
            pieces, unfinished = pieces[:-1], 1
        tasks = [task for piece in pieces if (task := self._task(piece)) is not None]
        return ParsedTasks(tasks, len(pieces) - len(tasks), unfinished)

    def _pieces(self, text: str) -> list[list[tuple[str, str]]]:
        """For each instruction the parts under its headings, as (part, text)."""
        found = list(self._heading.finditer(text))
        parts = [(self._names[heading[1].lower()], heading) for heading in found]
        ends = [heading.start() for heading in found[1:]] + [len(text)] * bool(found)
        pieces: list[list[tuple[str, str]]] = []
        before = self._clean(text[: found[0].start()] if found else text)
        # The prompt ends in a heading: what comes first belongs to it, unless the model writes the heading once more.
        if before and (not parts or parts[0][0] != "instruction"):
            pieces.append([("instruction", before)])
        for (part, heading), end in zip(parts, ends, strict=True):
            if part == "instruction" or not pieces:
                pieces.append([])
            pieces[-1].append((part, self._clean(text[heading.end() : end])))
        return pieces

    def _clean(self, text: str) -> str:
        return self._rule.sub("", text).strip().strip("*").strip()

    def _task(self, piece: list[tuple[str, str]]) -> Task | None:
        parts = [part for part, _ in piece]
        texts = dict(piece)
        if parts not in (["instruction", "input", "output"], ["instruction", "output"]):
            return None
        given = texts.get("input", "")
        given = "" if given.strip(" .").lower() in self._no_input else given
        # A model may write several lines under an instruction's heading; as the field of a record they are one text.
        return Task(texts["instruction"], given, texts["output"])
