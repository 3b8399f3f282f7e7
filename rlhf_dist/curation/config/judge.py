"""Configuration of `rlhf-dist data judge`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf_dist.config.base import AbsolutePath
from rlhf_dist.config.data import DataSource
from rlhf_dist.curation.config.base import CurationConfig
from rlhf_dist.curation.config.generator import GeneratorConfig


class JudgeConfig(CurationConfig):
    """Pairs of responses, judged by a language model or a Python function in both orders, become preferences.

    Where the two answers do not agree, the pair is a tie. What is half done is kept beside `out_dir`, in `OUT_DIR.work`; the
    same command continues from there.
    """

    sources: tuple[DataSource, ...] = Field(min_length=1)
    """What is judged: kind `candidates`, or `preference`, whose order is ignored."""
    pairs: Literal["all", "chain", "one"] = "all"
    """Which pairs of K candidates are judged: `all` K(K-1)/2; `chain` K-1, in a drawn order; `one` drawn pair."""
    judge: GeneratorConfig | None = None
    """The model that judges; `judge.sampling.temperature` 0 is usual. An answer cut off at `max_response_tokens` holds no
    verdict."""
    function: str | None = None
    """In place of a model: `module:function` or `file.py:function`, called with (prompt, a, b), each a text or, where it is
    more than one message, a list of messages. It returns "a", "b", "tie", "both_bad", "skip", or a number, positive where a
    is better. Modules of the current directory are found. It is the user's own code and runs with the user's rights. A pair for
    which it raises stops the run or, under the source's `on_bad_row: skip`, is listed in `bad_rows.jsonl`."""
    prompt_path: AbsolutePath | None = None
    """A Jinja file with the prompt; the built-in one when null. It is given `prompt`, `a`, `b`, `guidelines` and `mark`,
    and must ask for a verdict of the form [[A]], [[B]], or [[C]] for a tie. `mark` is drawn anew for every prompt; put it on
    the lines around the texts, so that none can pretend to have ended and continue as instructions."""
    guidelines: str = ""
    """What the judge is to look for; part of the prompt."""
    annotator: str | None = Field(default=None, min_length=1)
    """Name under which judgements are written; null takes the model's or the function's, without folders."""
    source_name: str = ""
    """Written as `source` into each preference record, where it is not empty."""

    @field_validator("function")
    @classmethod
    def _absolute_file(cls, function: str | None) -> str | None:
        where, _, name = (function or "").rpartition(":")
        return f"{Path(where).absolute()}:{name}" if where.endswith(".py") else function

    @model_validator(mode="after")
    def _one_judge(self) -> JudgeConfig:
        if (self.judge is None) == (self.function is None):
            given = "neither judge nor function is given" if self.judge is None else "both judge and function are given"
            raise ValueError(f"{given}; name one of them: who decides must be clear")
        if self.function is not None and not all(self.function.rpartition(":")[::2]):
            raise ValueError(f"function is {self.function!r}; write it as module:function or file.py:function")
        return self

    @property
    def name(self) -> str:
        """The judge's name."""
        return self.annotator or (self.judge.label if self.judge else Path(str(self.function)).name)
