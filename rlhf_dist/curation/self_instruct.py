"""Instruction records that a language model makes up after the example of seed tasks.

Self-Instruct (Wang et al. 2022, arXiv:2212.10560), with the one-step generation of Alpaca (Taori et al. 2023). A request shows
some seed tasks and asks for new ones; completions are read, filtered, and compared by ROUGE-L with the seeds and all that
was kept. Everything but the completions themselves follows from them: a run that continues reads its journal and is where it
was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from rlhf_dist.config.data import DataSource
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.core.random import permutation
from rlhf_dist.curation.config.self_instruct import SelfInstructConfig
from rlhf_dist.curation.generators import Completion, Generator, Request, check_some_answered
from rlhf_dist.curation.prompts import PromptTemplate
from rlhf_dist.curation.resumable import Work
from rlhf_dist.curation.rouge import nearest_of, rouge_tokens, words
from rlhf_dist.curation.task_filters import TaskFilter
from rlhf_dist.curation.task_parsing import Task, TaskParser
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.fields import Fields
from rlhf_dist.data.kinds import InstructionKind
from rlhf_dist.data.reader import read_fields

PROMPT = "self_instruct.jinja"
_NEAREST_SAMPLE = 500
"""Kept instructions whose nearest neighbor the report tells."""


@dataclass
class SelfInstructReport:
    """What became of everything that was asked for."""

    requests: int = 0
    failed_requests: int = 0
    """Without a completion: rejected by the server, or too long for the model."""
    without_tasks: int = 0
    """Completions in which no task was found."""
    malformed: int = 0
    """Pieces of completions that are no task."""
    unfinished: int = 0
    """Tasks cut off at the longest length."""
    parsed: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """By rule."""
    surplus: int = 0
    """Parsed when the wanted number was reached, and not looked at."""
    kept: int = 0
    response_tokens: int = 0
    """Tokens written, where the generator says."""

    def as_dict(self) -> dict[str, Any]:
        """For report.json; parsed = rejected + surplus + kept."""
        return asdict(self) | {"rejected": dict(self.rejected.most_common())}


def seed_tasks(rows: Iterable[Mapping[str, Any]]) -> list[Task]:
    """Seed tasks of instruction records (`instruction`, `output`, optional `input`), such as a `datasets.Dataset`.

    Raises:
        DataError: a field is missing or empty; with the row's number.
    """
    return [_seed(Fields(f"seed {number}", row, {})) for number, row in enumerate(rows, start=1)]


def read_seeds(sources: Iterable[DataSource], bad_rows: BadRows) -> list[Task]:
    """Seed tasks of sources of kind `instruction`; bad rows as `on_bad_row` says."""
    seeds = []
    for source in sources:
        for row in read_fields(source, bad_rows):
            with bad_rows.guard(source.on_bad_row, row.values):
                seeds.append(_seed(row))
    return seeds


def _seed(row: Fields) -> Task:
    completion = row.get("instruction") is None and row.get("completion") is not None
    record = InstructionKind().sequence(row, "")
    *asked, answer = [message for message in record.messages if message["role"] != "system"]
    if len(asked) + 1 < len(record.messages):
        row.note("system messages of seeds, which are not used")
    if record.tools:
        row.note("tools of seeds, which are not used")
    if len(asked) > 1:
        field = "prompt" if completion else "history"
        raise row.error(field, f"has {len(asked)} turns", "give seeds of one instruction and its output")
    if completion:
        return Task(asked[0]["content"].strip(), "", answer["content"].strip())
    return Task(row.text("instruction").strip(), row.optional_text("input").strip(), row.text("output").strip())


class SelfInstruct:
    """The state of a run: what is kept and what was rejected so far. No model is needed to restore it."""

    def __init__(self, settings: SelfInstructConfig, seeds: Sequence[Task], prompt: PromptTemplate) -> None:
        """At the beginning.

        Raises:
            ConfigError: too few seeds are short enough to be shown.
        """
        self.settings = settings
        self.seeds = list(seeds)
        self.prompt = prompt
        self.report = SelfInstructReport()
        self.records: list[dict[str, Any]] = []
        self.rejections: list[dict[str, Any]] = []
        """Rejected tasks with the rule that they broke."""
        longest = settings.max_example_words
        sizes = [len(words(f"{task.instruction} {task.input} {task.output}")) for task in seeds]
        self.shown = [i for i, size in enumerate(sizes) if longest is None or size <= longest]
        """Numbers of the seeds that may be shown as examples."""
        if len(self.shown) < settings.seed_examples:
            raise ConfigError(
                f"seed_examples is {settings.seed_examples}, but only {len(self.shown)} of {len(seeds)} seeds can be shown"
                f"{f' (max_example_words is {longest})' if longest else ''}; lower seed_examples, or give more seeds"
            )
        self._parser = TaskParser(settings.format)
        self._filter = TaskFilter(settings.filters, settings.format)
        for seed in seeds:
            self._filter.keep(seed.instruction)

    @property
    def finished(self) -> bool:
        """As many records as wanted, or as many requests as allowed."""
        return self.report.kept >= self.settings.num_records or self.report.requests >= self.settings.max_requests

    def next_requests(self) -> list[Request]:
        """The next round: a full batch of the generator, or what `max_requests` leaves of it."""
        start = self.report.requests
        end = min(start + self.settings.generator.batch_size, self.settings.max_requests)
        return [self._request(number) for number in range(start, end)]

    def absorb(self, completions: Iterable[Completion]) -> None:
        """Parse, filter and keep what the next requests, in their order, gave."""
        for completion in completions:
            number = self.report.requests
            self.report.requests += 1
            self.report.response_tokens += completion.response_tokens
            if completion.finish_reason == "error":
                self.report.failed_requests += 1
                continue
            found = self._parser.parse(completion)
            self.report.malformed += found.num_malformed
            self.report.unfinished += found.num_unfinished
            self.report.parsed += len(found.tasks)
            self.report.without_tasks += not found.tasks
            for place, task in enumerate(found.tasks):
                self._consider(task, number, place)

    def nearest(self) -> dict[str, Any]:
        """How alike the kept instructions are: ROUGE-L of up to 500 of them to the nearest other or seed."""
        texts = [record["instruction"] for record in self.records] + [seed.instruction for seed in self.seeds]
        order = permutation(self.settings.seed, "self-instruct/nearest", 0, len(self.records)).tolist()
        asked = order[:_NEAREST_SAMPLE]
        near = nearest_of([rouge_tokens(text) for text in texts], asked) if asked else []
        if not near:
            return {}
        values = [n.similarity for n in near]
        closest = sorted(zip(asked, near, strict=True), key=lambda pair: -pair[1].similarity)[:5]
        return {
            "sampled": len(asked),
            "mean": round(fmean(values), 4),
            "median": round(median(values), 4),
            "max": round(max(values), 4),
            "closest": [
                {"instruction": texts[i], "to": texts[n.number], "similarity": round(n.similarity, 4)}
                for i, n in closest
            ],
        }

    def _consider(self, task: Task, request: int, place: int) -> None:
        if self.report.kept >= self.settings.num_records:
            self.report.surplus += 1
            return
        rejection = self._filter.rejection(task)
        if rejection is not None:
            self.report.rejected[rejection.rule] += 1
            why: dict[str, Any] = {"rule": rejection.rule, "detail": rejection.detail}
            if rejection.similarity is not None:
                why["similarity"] = rejection.similarity
            self.rejections.append({**asdict(task), **why, "request": request, "place": place})
            return
        self._filter.keep(task.instruction)
        self.report.kept += 1
        provenance = {
            "method": "self-instruct",
            "model": self.settings.generator.label,
            "prompt_sha256": self.prompt.sha256,
            "request": request,
            "place": place,
            "seeds": self._drawn_seeds(request),
        }
        self.records.append({**asdict(task), "source": self.settings.name, "provenance": provenance})

    def _drawn_seeds(self, request: int) -> list[int]:
        """Numbers of the seeds that a request shows."""
        order = permutation(self.settings.seed, "self-instruct/seeds", request, len(self.shown))
        return [self.shown[i] for i in order[: self.settings.seed_examples].tolist()]

    def _request(self, number: int) -> Request:
        settings = self.settings
        examples: list[Any] = [self.seeds[i] for i in self._drawn_seeds(number)]
        if settings.kept_examples and len(self.records) >= settings.kept_examples:
            order = permutation(settings.seed, "self-instruct/kept", number, len(self.records))
            examples += [_task_of(self.records[i]) for i in order[: settings.kept_examples].tolist()]
            mixed = permutation(settings.seed, "self-instruct/order", number, len(examples))
            examples = [examples[i] for i in mixed.tolist()]
        text = self.prompt.render(
            {
                "examples": [asdict(example) for example in examples],
                "num_tasks": len(examples) + settings.tasks_per_request,
                "first": len(examples) + 1,
                "format": settings.format.model_dump(),
                "filters": settings.filters.model_dump(),
            }
        )
        prompt = text if settings.ask == "text" else ({"role": "user", "content": text},)
        return Request(prompt, settings.generator.sampling, number)


def run_rounds(state: SelfInstruct, generator: Generator, work: Work) -> Iterator[SelfInstructReport]:
    """Ask until enough is kept or the cap is reached; yields the report after every round. Each round is on disk before it
    counts.

    Raises:
        ModelError: no request of a round was answered, or the generator cannot continue.
    """
    while not state.finished:
        completions = generator.generate(state.next_requests())
        check_some_answered(
            completions, state.settings.generator.label, state.report.requests > state.report.failed_requests
        )
        work.add({"completions": [completion.as_row() for completion in completions]})
        state.absorb(completions)
        yield state.report


def restore(state: SelfInstruct, work: Work) -> None:
    """Bring the state to where an earlier call stopped."""
    for entry in work.done:
        state.absorb(Completion(**row) for row in entry["completions"])


def _task_of(record: Mapping[str, Any]) -> Task:
    return Task(record["instruction"], record["input"], record["output"])
