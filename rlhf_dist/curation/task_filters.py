"""Which made-up tasks are skipped, rule by rule."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable
from typing import NamedTuple

from rlhf_dist.curation.config.self_instruct import Rule, TaskFilters, TaskFormat
from rlhf_dist.curation.rouge import SimilarityIndex, rouge_tokens, words
from rlhf_dist.curation.task_parsing import Task

_PUNCTUATION = frozenset(string.punctuation + "«»‹›„“”‚‘’…–—¡¿、。・「」『』！？，．：；（）")

_FEWEST_RUNS = 10
"""Runs of three words below which their repetition says nothing."""


class Rejection(NamedTuple):
    """Why a task is skipped."""

    rule: Rule
    detail: str
    """What was met: a number of words, a word, the instruction that it is too similar to."""
    similarity: float | None = None
    """F of ROUGE-L, for `too_similar`."""


class TaskFilter:
    """Rules on a task by itself, then ROUGE-L against all seeds and all tasks kept so far."""

    def __init__(self, filters: TaskFilters, form: TaskFormat) -> None:
        """Nothing is kept yet."""
        self._index = SimilarityIndex(filters.max_similarity)
        self._texts: list[str] = []
        disabled = set(filters.disabled)
        self._rules: list[tuple[Rule, _Check]] = [pair for pair in _rules(filters, form) if pair[0] not in disabled]
        self._compares = "too_similar" not in filters.disabled

    def keep(self, instruction: str) -> None:
        """Count an instruction among those that later ones may not be too similar to."""
        if self._compares:
            self._index.add(rouge_tokens(instruction))
            self._texts.append(instruction)

    def rejection(self, task: Task) -> Rejection | None:
        """The first rule that the task breaks; None where it may be kept."""
        for name, rule in self._rules:
            detail = rule(task)
            if detail is not None:
                return Rejection(name, detail)
        near = self._index.nearest(rouge_tokens(task.instruction)) if self._compares else None
        if near is not None:
            return Rejection("too_similar", self._texts[near.number], round(near.similarity, 4))
        return None


_Check = Callable[[Task], "str | None"]
"""What was met, where the rule is broken."""


def _rules(filters: TaskFilters, form: TaskFormat) -> list[tuple[Rule, _Check]]:
    f = filters
    markers = [marker for marker in (form.no_input.strip(), "###") if marker]
    return [
        ("instruction_too_short", lambda task: _count(task.instruction, lambda n: n < f.min_instruction_words)),
        ("instruction_too_long", lambda task: _count(task.instruction, lambda n: n > f.max_instruction_words)),
        ("input_too_long", lambda task: _count(task.input, lambda n: n > f.max_input_words)),
        ("output_too_long", lambda task: _count(task.output, lambda n: n > f.max_output_words)),
        ("starts_with_punctuation", lambda task: _first(task.instruction, lambda c: c in _PUNCTUATION)),
        ("starts_with_non_ascii", lambda task: _first(task.instruction, lambda c: not c.isascii())),
        ("non_text_task", _has_word(f.non_text_words)),
        ("forbidden_word", _has_word(f.forbidden_words)),
        ("forbidden_start", _begins(f.forbidden_starts)),
        ("no_output", lambda task: "empty" if not task.output.strip() else None),
        ("output_repeats", lambda task: _equal(task.output, {"input": task.input, "instruction": task.instruction})),
        ("input_repeats", lambda task: _equal(task.input, {"instruction": task.instruction})),
        ("repeats_itself", lambda task: _repetition(task.output, f.max_repetition)),
        ("ends_with_colon", lambda task: _ends_with_colon(task)),
        ("marker_left", lambda task: _marker(task, markers)),
    ]


def _count(text: str, breaks: Callable[[int], bool]) -> str | None:
    number = len(words(text))
    return f"{number} words" if breaks(number) else None


def _first(text: str, breaks: Callable[[str], bool]) -> str | None:
    return text[0] if text and breaks(text[0]) else None


def _has_word(listed: Iterable[str]) -> _Check:
    listed = sorted(listed, key=len, reverse=True)
    if not listed:
        return lambda _: None
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, listed))})(?!\w)", re.IGNORECASE)

    def rule(task: Task) -> str | None:
        found = pattern.search(task.instruction)
        return found[1] if found else None

    return rule


def _begins(starts: Iterable[str]) -> _Check:
    lowered = tuple(start.lower() for start in starts)
    return lambda task: next((start for start in lowered if task.instruction.lower().startswith(start)), None)


def _equal(text: str, others: dict[str, str]) -> str | None:
    folded = " ".join(text.lower().split())
    return next((name for name, other in others.items() if folded and folded == " ".join(other.lower().split())), None)


def _repetition(text: str, largest: float) -> str | None:
    tokens = rouge_tokens(text)
    runs = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    if len(runs) < _FEWEST_RUNS:
        return None
    share = 1 - len(set(runs)) / len(runs)
    return f"{share:.0%} repeated" if share > largest else None


def _ends_with_colon(task: Task) -> str | None:
    ends = ((name, getattr(task, name).rstrip()) for name in ("input", "output"))
    return next((name for name, text in ends if text.endswith((":", "："))), None)


def _marker(task: Task, markers: list[str]) -> str | None:
    text = "\n".join((task.instruction, task.input, task.output)).lower()
    return next((marker for marker in markers if marker.lower() in text), None)
