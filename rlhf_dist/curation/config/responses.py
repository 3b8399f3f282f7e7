"""Configuration of `rlhf-dist data responses`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_dist.config.base import Count, PositiveInt
from rlhf_dist.config.data import DataSource
from rlhf_dist.curation.config.base import CurationConfig
from rlhf_dist.curation.config.generator import GeneratorConfig

PROMPT_KINDS = ("prompt", "instruction", "messages", "preference")


class ResponseGenerator(GeneratorConfig):
    """A language model, and how often it answers each prompt."""

    num_responses: PositiveInt = 1
    """Responses to each prompt."""

    @model_validator(mode="after")
    def _draws_differ(self) -> ResponseGenerator:
        if self.num_responses > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"num_responses is {self.num_responses} at temperature 0, where all are the same; raise sampling.temperature, "
                "or set num_responses to 1"
            )
        return self


class ResponsesConfig(CurationConfig):
    """Prompts, each answered by several models or under several sampling settings, for people or judges to choose among.

    What is half done is kept beside `out_dir`, in `OUT_DIR.work`; the same command continues from there.
    """

    prompts: tuple[DataSource, ...] = Field(min_length=1)
    """Kind `prompt`, or `instruction`, `messages` and `preference`, of which the prompt is taken. A prompt that comes twice is
    answered once."""
    generators: tuple[ResponseGenerator, ...] = Field(min_length=1)
    """Two or more, or one that answers more than once. One local model at a time is in memory."""
    max_redraws: Count = 1
    """How often a response is drawn anew that is empty or equals another one to its prompt (not at temperature 0)."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What becomes of responses to a prompt that are still equal: `drop` leaves the later ones out, and the prompt where fewer
    than two are left."""

    @model_validator(mode="after")
    def _a_choice(self) -> ResponsesConfig:
        if sum(generator.num_responses for generator in self.generators) < 2:
            raise ValueError(
                "generators give one response to a prompt, and a choice needs two; add a generator, or raise num_responses"
            )
        for source in self.prompts:
            if source.kind not in PROMPT_KINDS:
                raise ValueError(
                    f"prompts: {source.path} has kind {source.kind!r}, which holds no prompts; use one of "
                    f"{', '.join(PROMPT_KINDS)}"
                )
        return self
