"""Where the records of a run come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from rlhf_dist.config.base import (
    AbsolutePath,
    DataContent,
    Decides,
    Fraction,
    NonNegative,
    PositiveInt,
    Result,
    Schema,
    sha256_of,
)
from rlhf_dist.config.interpolation import parse_interpolation
from rlhf_dist.config.mixing import MixingSettings
from rlhf_dist.config.templates import TemplateSettings

RecordKind = Literal["instruction", "messages", "text", "preference", "ratings", "prompt", "candidates"]
BadRowPolicy = Literal["error", "skip"]
SourceName = Annotated[str, StringConstraints(pattern=r"^[^/\s]([^/]*[^/\s])?$")]
"""Part of a metric's name, where a slash would begin another part."""
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz")


def data_suffix(path: PurePath) -> str:
    """The ending that tells a file's format, before that of its compression: `.jsonl` of `train.jsonl.gz`."""
    suffix = path.suffix.lower()
    return PurePath(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


class DataSource(Schema):
    """One set of records: files, a `datasets` directory, or a hub name."""

    path: str
    """A .json, .jsonl, .csv, .tsv, .parquet or .txt file, also compressed (.gz, .bz2, .xz); a pattern (`data/*.jsonl`) or a
    directory of such files, which are read one after the other; a directory written by `Dataset.save_to_disk`; a hub name."""
    kind: RecordKind
    """What a record holds: `instruction` (instruction, input, output, optional demonstration), `messages` (a chat),
    `text` (plain text), `preference` (prompt, chosen, rejected, optional
    margin; or prompt, responses, optional ratings, for a ranking), `ratings` (response, rating, optional prompt; pairs are
    made from them), `prompt` (prompt), `candidates` (prompt, candidates: responses that nobody has judged yet). All but `text`
    take `system`, the system message."""
    name: SourceName | None = None
    """What tables and metrics call the set, without a slash; null takes the name of the file or directory, numbered where
    another set has it already (`reviews`, `reviews-2`). Sources that are given the same name count as one."""
    split: str = "train"
    """Split to read, for hub names, `datasets` directories, and directories whose files are named by splits."""
    subset: str | None = None
    """Hub names only: the configuration of the data set (the `name` of `load_dataset`)."""
    data_dir: str | None = None
    """Hub names only: the folder of the repository, such as harmless-base of Anthropic/hh-rlhf."""
    revision: str | None = None
    """Hub names only: a branch, tag or commit."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Maps a field of the record to a column of the file, e.g. {instruction: question, output: answer}; with `templates`, a
    name that a template uses to a column."""
    templates: TemplateSettings | None = None
    """Kind `instruction` only: rows of any columns become instruction records by these templates."""
    columns: tuple[str, ...] | None = None
    """Column names of a .csv/.tsv/.txt file that has no header row."""
    delimiter: str | None = None
    """Column separator of a .csv/.tsv/.txt file; by the file's ending when null (comma, or tab for .tsv and .txt)."""
    on_bad_row: BadRowPolicy = "error"
    """What a row does that cannot be read or used (broken JSON, a missing, empty or non-string field, a chosen equal to its
    rejected, a prompt that leaves no room for a response, ...): `error` stops before anything is started, `skip` leaves the row
    out, counts it, and lists it with its place and the reason."""
    limit: PositiveInt | None = None
    """Use the first `limit` records only."""
    min_margin: NonNegative = 0.5
    """`ratings` only: two responses make a pair when their ratings differ by at least this much."""

    @model_validator(mode="after")
    def _templates_make_instructions(self) -> DataSource:
        if self.templates is not None and self.kind != "instruction":
            raise ValueError(
                f"{self.path}: templates make instruction records, and kind is {self.kind!r}; set kind to instruction, or "
                "remove templates"
            )
        return self


def source_names(sources: Sequence[DataSource]) -> list[str]:
    """What each source is called: its `name`, else what its path ends in, made unlike all others.

    A reference to a set of a pipeline (`${data.reviews.train}`) is called as the set is (`reviews.train`).
    """
    names: list[str | None] = [source.name for source in sources]
    taken = set(names)
    for i, source in enumerate(sources):
        if names[i] is None:
            found, path = parse_interpolation(source.path), PurePath(source.path)
            stem = path.name.removesuffix(path.suffix) if path.suffix.lower() in COMPRESSED else path.name
            stem = PurePath(stem).stem if data_suffix(path) in DATA_SUFFIXES else path.name
            stem = path.parent.name if set(stem) & set("*?[") else stem
            stem = found.output if found else stem or source.kind
            number, name = 2, stem
            while name in taken:
                name, number = f"{stem}-{number}", number + 1
            names[i] = name
            taken.add(name)
    return [str(name) for name in names]


class DataSettings(Schema):
    """What all trainers' data sections share."""

    max_length_tokens: DataContent[PositiveInt] = 1024
    """Longest sequence (prompt and response) in tokens. A longer record is handled as `on_too_long` says."""
    on_too_long: DataContent[Literal["error", "skip", "truncate", "truncate_left"]] = "truncate"
    """What happens to a record longer than `max_length_tokens`: `truncate` cuts the end of its response (a prompt is never
    cut), `truncate_left` first drops the oldest turns of its dialogue (a system message stays), then cuts the beginning of the
    user message that is left, `skip` leaves it out (of a ranking, that response), `error` stops before anything is started,
    whatever `on_bad_row` says. What was cut or skipped is counted."""
    system: DataContent[Literal["keep", "merge_into_user"]] = "keep"
    """`merge_into_user` puts a system message before the next user message's text, for models without a system turn."""
    same_role_turns: DataContent[Literal["keep", "merge"]] = "keep"
    """`merge` joins messages of one role that follow each other, for chat templates whose roles must alternate."""
    template_path: Annotated[AbsolutePath | None, Decides(by=sha256_of)] = None
    """A Jinja chat template, used in place of the tokenizer's own and saved with the model; null takes the tokenizer's own, or
    the built-in instruction template where it has none."""


class TrainingData(DataSettings):
    """What the supervised trainers' data sections share."""

    eval_fraction: DataContent[Fraction] = 0.0
    """Share of the records of `train` held out for evaluation when `eval` names no sets; drawn by the run's seed. No
    prompt, plain text, or row that templates made records of is on both sides."""


class SFTData(TrainingData):
    """Data of an SFT run."""

    train_on: DataContent[Literal["all", "last"]] = "all"
    """Which assistant turns of a conversation are learnt from: `all` (of messages with a `weight`, those of weight 1), or the
    `last` of them only. Templates of reasoning models render the last turn as the model is used, earlier ones without
    reasoning."""
    train: DataContent[tuple[DataSource, ...]] = Field(min_length=1)
    """Sets to train on: kinds `instruction`, `messages` and `text`."""
    eval: DataContent[tuple[DataSource, ...]] = ()
    """Held-out sets of the same kinds. With several, or with `hold_out_tasks`, the loss is also reported for each of them."""
    mixing: Result[MixingSettings | None] = None
    """In what shares the sets of `train` are drawn, and how many records an epoch then has; what is counted are sequences,
    after everything that is held out or skipped. null: all records of all sets, each once an epoch."""
    hold_out_tasks: DataContent[tuple[str, ...]] = ()
    """Tasks of which nothing is trained on: all their records in `train` are held out, and the loss is reported for each task.
    A record's task is its field `task`, or else the name of its set."""
    pretraining: DataContent[tuple[DataSource, ...]] = ()
    """Plain text (kind `text`) mixed into every step as `sft.pretraining_ratio` says, so that the model does not forget what it
    learned from such text."""
    eval_pretraining: DataContent[tuple[DataSource, ...]] = ()
    """Held-out plain text, whose loss is reported apart. Where it names none, `eval_fraction` of `pretraining`."""

    @model_validator(mode="after")
    def _pretraining_is_text(self) -> SFTData:
        for name in ("pretraining", "eval_pretraining"):
            for source in getattr(self, name):
                if source.kind != "text":
                    raise ValueError(
                        f"{name} has {source.path} of kind {source.kind!r}, and it takes plain text only; give kind text, or "
                        "move the set to train"
                    )
        if self.eval_pretraining and not self.pretraining:
            raise ValueError(
                "eval_pretraining is set, but pretraining names no text; set pretraining, or move the text to eval"
            )
        return self

    @model_validator(mode="after")
    def _demonstrations_are_not_split(self) -> SFTData:
        for source in () if self.eval or self.eval_fraction == 0 else self.train:
            if source.templates is not None and source.templates.num_demonstrations > 0:
                raise ValueError(
                    f"eval_fraction is {self.eval_fraction:g}, but {source.path} has templates.num_demonstrations "
                    f"{source.templates.num_demonstrations}, which would show held-out rows, with their answers, before "
                    "records that are trained on; name held-out sets in eval (a pipeline divides a set by parts), or set "
                    "one of the two to 0"
                )
        return self

    @model_validator(mode="after")
    def _a_weight_for_each_source(self) -> SFTData:
        names = list(dict.fromkeys(source_names(self.train)))
        weights = self.mixing.weights if self.mixing is not None else None
        if weights is not None and len(weights) != len(names):
            raise ValueError(
                f"mixing.weights holds {len(weights)} numbers for {len(names)} sets to train on ({', '.join(names)}); give "
                "each one, in this order"
            )
        return self

    @model_validator(mode="after")
    def _tasks_are_named_once(self) -> SFTData:
        twice = sorted({task for task in self.hold_out_tasks if self.hold_out_tasks.count(task) > 1})
        if twice:
            raise ValueError(f"hold_out_tasks names {', '.join(map(repr, twice))} more than once; name each task once")
        return self


class RewardData(TrainingData):
    """Data of a reward-model run."""

    train: DataContent[tuple[DataSource, ...]] = Field(min_length=1)
    """Sets to train on: kinds `preference` and `ratings`."""
    eval: DataContent[tuple[DataSource, ...]] = ()
    """Held-out sets of the same kinds."""


class PPOData(DataSettings):
    """Data of a PPO run. `max_length_tokens` bounds prompt + response and PTX sequences."""

    prompts: DataContent[tuple[DataSource, ...]] = Field(min_length=1)
    """Prompts to generate from: kind `prompt`, or `instruction`/`messages`/`preference`, of which the prompt is taken."""
    eval_prompts: DataContent[tuple[DataSource, ...]] = ()
    """Held-out prompts."""
    ptx: DataContent[tuple[DataSource, ...]] = ()
    """Text of the pretraining-mix (PTX) term: kinds `text`, `instruction` and `messages`. Needed when `ppo.ptx_coef` > 0."""
