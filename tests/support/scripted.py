"""Stand-ins for language models: what they write is decided by the test, and they record what they were asked."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from rlhf_dist.curation.generators import Completion, Request

_VERBS = ("Explain", "Compare", "Rewrite", "Summarize", "List", "Describe", "Name", "Classify")
_NOUNS = ("rivers", "tariffs", "sonnets", "enzymes", "bridges", "saints", "orchards", "engines", "harvests", "violins")
_WHOSE = ("medieval", "alpine", "coastal", "modern", "ancient", "northern", "fragile", "famous", "rural", "hidden")


class ScriptedGenerator:
    """In place of a model: answers by a function of the request."""

    def __init__(self, answer: Callable[[Request], str | Completion], delay_s: float = 0.0) -> None:
        self.answer = answer
        self.delay_s = delay_s
        self.asked: list[Request] = []
        self.closed = False

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One answer a request."""
        time.sleep(self.delay_s)
        self.asked += requests
        answers = [self.answer(request) for request in requests]
        return [Completion(a, "eos", len(a.split())) if isinstance(a, str) else a for a in answers]

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True


def made_up_tasks(request: Request) -> str | Completion:
    """Tasks of few words, which repeat each other often; now and then nonsense, a cut-off list or a failure."""
    draw = random.Random(request.key)
    kind = draw.random()
    if kind < 0.1:
        return "Sorry, I cannot help with that."
    if kind < 0.15:
        return Completion.failed("status 400: no")
    tasks = []
    for number in range(4, 4 + draw.randint(1, 5)):
        first = draw.choice(_VERBS)
        instruction = f"{first} {draw.choice(_WHOSE)} {draw.choice(_NOUNS)} for {draw.choice(_WHOSE[:4])} people."
        if draw.random() < 0.1:
            instruction = f"Draw {instruction}"
        given = "<noinput>" if draw.random() < 0.5 else f"There are {number} of them."
        tasks.append(
            f"{number}. Instruction: {instruction}\n{number}. Input:\n{given}\n{number}. Output:\nYes, {number}."
        )
    text = "\n###\n".join(tasks).removeprefix("4. Instruction:")
    return Completion(text, "length" if kind > 0.8 else "eos", len(text.split()))
