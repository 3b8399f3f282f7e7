"""Instruction templates over labeled rows: what a file of templates holds, and how a source uses it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_dist.config.base import AbsolutePath, Count, PositiveInt, Schema

BuiltinTemplates = Literal[
    "classification", "pair_classification", "question_answering", "summarization", "translation", "generation"
]


class LabelBin(Schema):
    """A name for a range of numbers: from the `below` of the bin before it (or −∞) up to its own, which it excludes."""

    name: str = Field(min_length=1)
    """What templates call a value in the range."""
    below: float | None = None
    """Upper end of the range; null, in the last bin only, for +∞."""


class Labels(Schema):
    """Names for the values of a column (verbalizers). Templates see the row's as `label`, all of them as `choices`, and the
    value itself as `label_value`."""

    column: str = "label"
    """Column of the value; a dotted path reaches into nested records."""
    names: dict[str, str] = Field(default_factory=dict)
    """Value, as text → name, e.g. {"0": negative, "1": positive}. A value that is not here is rejected."""
    bins: tuple[LabelBin, ...] = ()
    """For numbers instead of `names`: ranges, rising, e.g. [{name: negative, below: -1}, {name: mixed, below: 1}, {name:
    positive}]. A number above all of them is rejected."""

    @field_validator("names", mode="before")
    @classmethod
    def _text_keys(cls, given: Any) -> Any:
        # {0: negative} is what one writes in YAML; CSV cells are text. Both are meant by the same key.
        return {_as_text(key): name for key, name in given.items()} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _one_way(self) -> Labels:
        if bool(self.names) == bool(self.bins):
            raise ValueError(
                "labels needs either names (value → name) or bins (ranges of numbers); give one of the two"
            )
        ends = [item.below for item in self.bins]
        numbers = [end for end in ends if end is not None]
        if None in ends[:-1] or sorted(set(numbers)) != numbers:
            raise ValueError(
                f"the bins end at {ends}; every bin but the last needs a `below`, larger than that of the bin before it"
            )
        return self

    @property
    def choices(self) -> tuple[str, ...]:
        """The distinct names, in the order in which they are written."""
        names = [item.name for item in self.bins] or list(self.names.values())
        return tuple(dict.fromkeys(names))


class Template(Schema):
    """One way of asking. Each text is a Jinja template over the columns of the row, `label`, `label_value`, `choices` and
    `variables`."""

    name: str = Field(min_length=1)
    """Unique in its file; is in every record made with it."""
    instruction: str
    input: str | None = None
    output: str
    when: str | None = None
    """A Jinja expression; rows for which it is false are filtered out, e.g. `label != "mixed"`. Null: every row."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Other names for the labels in this template, e.g. in its language: {negative: tiêu cực, positive: tích cực}."""


class TemplateFile(Schema):
    """A YAML file of templates for one task. Template files of promptsource are read, too."""

    task: str | None = None
    """What kind of task it is; is in every record. Null: the file's name."""
    labels: Labels | None = None
    """Names of the labels, where a source does not give its own."""
    variables: dict[str, str] = Field(default_factory=dict)
    """Names that the templates use beside the columns, with their usual values. A source may set others."""
    templates: tuple[Template, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique_names(self) -> TemplateFile:
        names = [template.name for template in self.templates]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"templates has {', '.join(twice)} more than once; give each template a name of its own")
        return self


class TemplateSettings(Schema):
    """How the rows of a source become instruction records."""

    path: AbsolutePath | None = None
    """A YAML file of templates (`rlhf-dist schema templates` describes it), or one of promptsource."""
    builtin: BuiltinTemplates | None = None
    """Templates that come with the package, instead of `path`. What columns they read: `rlhf_dist/data/templates/`."""
    names: tuple[str, ...] = ()
    """Use these templates of the file only; empty: all."""
    per_row: PositiveInt | None = 1
    """Records made of a row, each with another template, drawn by `seed`; null: one with every template."""
    labels: Labels | None = None
    """Names of the labels; null: those of the file."""
    variables: dict[str, str] = Field(default_factory=dict)
    """Names that the templates use beside the columns, e.g. {target_language: Vietnamese}."""
    task: str | None = None
    """What kind of task it is; null: what the file says."""
    num_demonstrations: Count = 0
    """Worked examples that stand before each instruction: other rows in the same template, drawn by `seed`."""
    seed: Count = 0
    """Draws templates and demonstrations."""

    @model_validator(mode="after")
    def _one_file(self) -> TemplateSettings:
        if (self.path is None) == (self.builtin is None):
            raise ValueError("templates needs either path (a YAML file) or builtin; give one of the two")
        return self


def _as_text(key: Any) -> str:
    return str(key).lower() if isinstance(key, bool) else str(key)
