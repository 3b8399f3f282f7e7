"""Pairs of candidates, judged by a model or a function in both orders.

Models favor a position (Zheng et al. 2023, "Judging LLM-as-a-judge", section 3.4), so that each pair is asked about twice,
with the responses exchanged. Only answers that agree count as a preference; what differs is a tie. What is written are
judgements as people's are (`judgements.py`), under the judge's name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from rlhf_dist.core.random import derived_seed
from rlhf_dist.curation.candidates import Item, Messages, shown_text, shown_tools
from rlhf_dist.curation.config.generator import Sampling
from rlhf_dist.curation.generators import Completion, Generator, Request, check_some_answered
from rlhf_dist.curation.judgements import Judgement
from rlhf_dist.curation.labeling import Unit
from rlhf_dist.curation.prompts import PromptTemplate

PROMPT = "judge.jinja"
UNREADABLE = "unreadable"
"""The answer holds no verdict."""
FAILED = "failed"
"""There was no answer."""

_VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
_CHOICES = {"a": "a", "b": "b", "c": "tie", "tie": "tie"}


class Answer(NamedTuple):
    """What a judge said about one order of a pair."""

    choice: str
    """One of `judgements.CHOICES`, `UNREADABLE` or `FAILED`."""
    text: str
    """As it was said."""


class Judge(Protocol):
    """Anything that compares."""

    def judge(self, shown: Sequence[tuple[Item, int, int]]) -> list[Answer]:
        """One answer for each (item, candidate shown as A, candidate shown as B)."""
        ...


class ModelJudge:
    """A language model that is shown both responses."""

    def __init__(
        self, generator: Generator, name: str, sampling: Sampling, prompt: PromptTemplate, guidelines: str, seed: int
    ) -> None:
        self.generator = generator
        self.name = name
        self.sampling = sampling
        self.prompt = prompt
        self.guidelines = guidelines
        self.seed = seed
        self._answered = False

    def judge(self, shown: Sequence[tuple[Item, int, int]]) -> list[Answer]:
        """Ask about each.

        Raises:
            ModelError: none of the first requests was answered.
        """
        requests = [
            Request(
                ({"role": "user", "content": judge_prompt(self.prompt, item, a, b, self.guidelines, self.seed)},),
                self.sampling,
                _key(item, a, b),
            )
            for item, a, b in shown
        ]
        completions = self.generator.generate(requests)
        check_some_answered(completions, self.name, self._answered)
        self._answered = True
        return [read_answer(completion) for completion in completions]


@dataclass
class JudgeReport:
    """What became of the pairs."""

    items: int = 0
    pairs: int = 0
    preferred: int = 0
    """Both answers prefer the same response."""
    ties: int = 0
    """Both answers are ties."""
    both_bad: int = 0
    skipped: int = 0
    inconsistent: int = 0
    """The answers differ; written as ties."""
    unreadable: int = 0
    """Pairs with an answer that holds no verdict, or was cut off; no judgement is written."""
    failed: int = 0
    """Pairs without both answers; no judgement is written."""

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        return asdict(self)


class Judging:
    """What a judge has said so far. The judge is not needed to restore it."""

    def __init__(self, units: Sequence[Unit], annotator: str) -> None:
        """Nothing is judged yet."""
        self.units = list(units)
        self.annotator = annotator
        self.report = JudgeReport(items=len({unit.item.id for unit in units}), pairs=len(units))
        self.judgements: list[Judgement] = []
        """One a pair that could be judged."""
        self.single: list[Judgement] = []
        """Two a pair, one an order: what position bias is measured on."""
        self.num_asked = 0
        """Pairs that were asked about."""
        self.failures: list[tuple[Unit, str]] = []
        """Pairs without both answers, and why."""

    @property
    def finished(self) -> bool:
        """Whether every pair has been asked about."""
        return self.num_asked >= len(self.units)

    def next_shown(self, num_pairs: int) -> list[tuple[Item, int, int]]:
        """Up to `num_pairs` next pairs, each in both orders."""
        units = self.units[self.num_asked : self.num_asked + num_pairs]
        orders = [(unit.item, unit.pair, unit.pair[::-1]) for unit in units]
        return [(item, a, b) for item, *both in orders for a, b in both]

    def absorb(self, answers: Sequence[Answer]) -> None:
        """Take the answers to what `next_shown` gave."""
        for first, second in zip(answers[::2], answers[1::2], strict=True):
            unit = self.units[self.num_asked]
            self.num_asked += 1
            self._take(unit, first, second)

    def _take(self, unit: Unit, first: Answer, second: Answer) -> None:
        answers = (first.choice, second.choice)
        for wrong in (FAILED, UNREADABLE):
            if wrong in answers:
                setattr(self.report, wrong, getattr(self.report, wrong) + 1)
                if wrong == FAILED:
                    self.failures.append((unit, (first if first.choice == FAILED else second).text))
                return
        i, j = unit.pair
        orders = [
            Judgement(unit.item.id, self.annotator, first.choice, (i, j)),
            Judgement(unit.item.id, self.annotator, second.choice, (j, i)),
        ]
        self.single += orders
        choice, comment, outcome = _agreed(*orders)
        setattr(self.report, outcome, getattr(self.report, outcome) + 1)
        self.judgements.append(Judgement(unit.item.id, self.annotator, choice, (i, j), comment=comment))


def run_pieces(state: Judging, judge: Judge, num_pairs: int) -> Iterator[list[Answer]]:
    """Ask until every pair is judged; yields the answers of each piece, to be kept, before it absorbs them."""
    while not state.finished:
        answers = judge.judge(state.next_shown(num_pairs))
        yield answers
        state.absorb(answers)


def judge_prompt(prompt: PromptTemplate, item: Item, a: int, b: int, guidelines: str, seed: int) -> str:
    """What a model is asked about one order of a pair."""
    # By the id, a hash of the texts themselves: no text can foresee the mark of its own fence.
    mark = f"{derived_seed(seed, f'judge/mark/{item.id}', 0) & 0xFFFFFFFF:08x}"
    tools = f"Tools:\n{shown_tools(item.tools)}\n\n" if item.tools else ""
    texts = (
        tools + _shown(item.prompt, "user"),
        _shown(item.candidates[a], "assistant"),
        _shown(item.candidates[b], "assistant"),
    )
    return prompt.render(dict(zip(("prompt", "a", "b"), texts, strict=True)) | {"guidelines": guidelines, "mark": mark})


def read_answer(completion: Completion) -> Answer:
    """The last verdict in a text, which may reason about others before; a bare letter is one too.

    What was cut off at the longest length holds none: its last word was not said.
    """
    if completion.finish_reason == "error":
        return Answer(FAILED, completion.error)
    if completion.finish_reason == "length":
        return Answer(UNREADABLE, completion.text)
    found = _VERDICT.findall(completion.text)
    word = found[-1] if found else completion.text.strip().strip(".*[]\"'")
    return Answer(_CHOICES.get(word.lower(), UNREADABLE), completion.text)


def _agreed(first: Judgement, second: Judgement) -> tuple[str, str, str]:
    """(choice for the order of `first`, comment, field of the report)."""
    if "skip" in (first.choice, second.choice):
        return "skip", "", "skipped"
    if first.preferred is not None and first.preferred == second.preferred:
        return first.choice, "", "preferred"
    if first.choice == second.choice and first.preferred is None:
        return first.choice, "", "ties" if first.choice == "tie" else "both_bad"
    return "tie", f"inconsistent: {first.choice}, and {second.choice} with the responses exchanged", "inconsistent"


def _key(item: Item, a: int, b: int) -> int:
    digest = hashlib.sha256(f"judge/{item.id}/{a}/{b}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _shown(messages: Messages, role: str) -> str:
    """A text; with the roles' names where it is more than one message, or one of another role."""
    if len(messages) == 1 and messages[0]["role"] == role:
        return shown_text(messages[0])
    return "\n\n".join(f"{message['role'].capitalize()}: {shown_text(message)}" for message in messages)
