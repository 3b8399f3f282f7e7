"""Configuration of `rlhf-dist data self-instruct`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf_dist.config.base import AbsolutePath, Count, Fraction, PositiveInt, Schema
from rlhf_dist.config.data import DataSource
from rlhf_dist.curation.config.base import CurationConfig
from rlhf_dist.curation.config.generator import GeneratorConfig

Rule = Literal[
    "instruction_too_short",
    "instruction_too_long",
    "input_too_long",
    "output_too_long",
    "starts_with_punctuation",
    "starts_with_non_ascii",
    "non_text_task",
    "forbidden_word",
    "forbidden_start",
    "no_output",
    "output_repeats",
    "input_repeats",
    "repeats_itself",
    "ends_with_colon",
    "marker_left",
    "too_similar",
]
"""Why a task is rejected; in this order, the first that applies counts."""

NON_TEXT_WORDS = (
    "image",
    "images",
    "graph",
    "graphs",
    "picture",
    "pictures",
    "file",
    "files",
    "map",
    "maps",
    "draw",
    "plot",
    "go to",
    "video",
    "audio",
    "music",
    "flowchart",
    "diagram",
)
"""Alpaca's list: what a language model cannot see, hear or make."""


class TaskFilters(Schema):
    """What is skipped. The rules are those of Self-Instruct (Wang et al. 2022) and Alpaca (Taori et al. 2023), and one against
    repetition, as Gopher's (Rae et al. 2021)."""

    min_instruction_words: Count = 3
    """Fewest words of an instruction."""
    max_instruction_words: PositiveInt = 150
    """Most words of an instruction."""
    max_input_words: PositiveInt = 100
    """Most words of an input; the prompt names this number to the model."""
    max_output_words: PositiveInt = 100
    """Most words of an output; the prompt names this number to the model."""
    non_text_words: tuple[str, ...] = NON_TEXT_WORDS
    """An instruction with one of these words (or phrases) is taken for a task beyond text."""
    forbidden_words: tuple[str, ...] = ()
    """Further words (or phrases) that no instruction may have."""
    forbidden_starts: tuple[str, ...] = ("write a program",)
    """How no instruction may begin. (Models leave it open whether the program or its result is asked for.)"""
    max_repetition: Fraction = 0.3
    """Largest share of an output's runs of three words that have stood in it before; small models get into loops. Outputs of
    fewer than 12 words are spared."""
    max_similarity: float = Field(default=0.7, gt=0, le=1)
    """Largest ROUGE-L (F) of an instruction to any seed or kept one; 1 keeps all, repetitions too."""
    disabled: tuple[Rule, ...] = ()
    """Rules that are not applied, such as `starts_with_non_ascii` for other scripts."""

    @field_validator("non_text_words", "forbidden_words", "forbidden_starts")
    @classmethod
    def _words(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if any(not word.strip() for word in words):
            raise ValueError("there is an empty word in the list, which every instruction has; remove it")
        return words


class TaskFormat(Schema):
    """How a task is written in the prompt and read from what a model writes."""

    instruction: str = "Instruction"
    """Heading of an instruction."""
    input: str = "Input"
    """Heading of an input."""
    output: str = "Output"
    """Heading of an output."""
    no_input: str = "<noinput>"
    """Stands where a task needs no input."""

    @model_validator(mode="after")
    def _three_headings(self) -> TaskFormat:
        headings = [self.instruction, self.input, self.output]
        if any(not heading.strip() for heading in headings) or len({h.strip().lower() for h in headings}) < 3:
            raise ValueError(
                f"the headings {', '.join(map(repr, headings))} cannot be told apart; give three different ones"
            )
        return self


class SelfInstructConfig(CurationConfig):
    """Instruction records that a language model makes up after the example of seed tasks.

    What is half done is kept beside `out_dir`, in `OUT_DIR.work`; the same command continues from there. So does, from a result
    in `out_dir`, the command with `overwrite` and a larger `num_records` or `max_requests`, when nothing else has changed.
    """

    seeds: tuple[DataSource, ...] = Field(min_length=1)
    """Seed tasks: kind `instruction`."""
    generator: GeneratorConfig
    num_records: PositiveInt = 1000
    """How many records are wanted."""
    max_requests: PositiveInt = 1000
    """Stop after so many requests, though fewer records have been kept."""
    prompt_path: AbsolutePath | None = None
    """A Jinja file with the prompt; the built-in one when null. It is given `examples`, `num_tasks` (examples and new ones),
    `first` (number of the first new one), `format` and `filters`."""
    ask: Literal["chat", "text"] = "chat"
    """`chat` sends the prompt as a user message; `text` lets the model write on after it, for models that follow no
    instructions."""
    seed_examples: PositiveInt = 3
    """Seed tasks shown in a request, drawn at random."""
    kept_examples: Count = 0
    """Kept tasks shown besides, once there are so many. (Self-Instruct: 6 seeds and 2 kept.)"""
    max_example_words: PositiveInt | None = None
    """Longer seeds (instruction, input and output) are not shown as examples; null shows all."""
    tasks_per_request: PositiveInt = 10
    """New tasks asked for in a request."""
    format: TaskFormat = TaskFormat()
    filters: TaskFilters = TaskFilters()
    name: str = "self-instruct"
    """The records' `source`."""

    @model_validator(mode="after")
    def _seeds_are_instructions(self) -> SelfInstructConfig:
        for source in self.seeds:
            if source.kind != "instruction":
                raise ValueError(f"seeds: {source.path} has kind {source.kind!r}; seed tasks are of kind instruction")
        return self
