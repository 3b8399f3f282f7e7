"""`rlhf-dist data inspect sft CONFIG`: what a trainer will see, from the configuration of the run itself.

The loaders are those of the trainers (`build.py` of the room); of the model only the tokenizer is read, so that data can be
looked at before a reward model or a GPU exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_dist.config.keys import schema_keys
from rlhf_dist.config.load import dump_yaml, load_config, overrides_help
from rlhf_dist.curation.config.inspect import InspectSettings
from rlhf_dist.pipeline.arguments import PROG, Parser, load

if TYPE_CHECKING:
    from rlhf_dist.curation.dataset_view import View
    from rlhf_dist.curation.inspection import SetReport

COMMANDS = ("sft", "reward", "ppo")
PAGE = "index.html"
_PROG = f"{PROG} data inspect"
_USAGE = f"{_PROG} {{{','.join(COMMANDS)}}} CONFIG.yaml [--out_dir DIR ...] [--section.key value ...]"


@dataclass(frozen=True)
class Loaded:
    """A run's data, as its trainer has them."""

    views: tuple[View, ...]
    tokenizer: Any
    mixing: tuple[dict[str, Any], ...] = ()
    """Shares of an epoch, where the run mixes."""
    summary: Mapping[str, str] | None = None


def run(arguments: list[str]) -> None:
    """Read a run's data and show them.

    Raises:
        ConfigError: no such command or option, a configuration that cannot be, data that the run would reject.
        DataError: the same, of a row.
        RunFolderError: out_dir may not be written.
    """
    parsed = parse(arguments)
    if parsed is None:
        return
    command, config, settings = parsed
    from rlhf_dist.curation.commands.inspect_terminal import show
    from rlhf_dist.curation.output import check_output

    if settings.out_dir is not None:
        check_output(settings.out_dir, settings.overwrite)
    summary, reports, bad = inspected(command, config, settings)
    if settings.out_dir is not None:  # before anything is shown: a reader of a pipe may leave
        _write(command, config, settings, summary, reports, bad)
    show(summary, reports)
    if settings.out_dir is not None:
        print(f"The page is {settings.out_dir / PAGE}; the numbers are in its report.json")


def parse(arguments: list[str]) -> tuple[str, Any, InspectSettings] | None:
    """(command, configuration of the run, options); None when help was asked for and printed."""
    if not arguments or any(a in ("-h", "--help") for a in arguments):
        epilog = (
            "What is looked at is the data of a run: give the configuration that you will train with, and the overrides.\n"
            f"`{PROG} sft --help` (reward, ppo) lists the keys of the configuration. `on_bad_row: error` stops at the first\n"
            "bad row, as training does; --list_bad_rows true lists all of them."
        )
        print(overrides_help(InspectSettings, prog=_PROG, usage=_USAGE, epilog=epilog), end="")
        return None
    parser = Parser(prog=_PROG, usage=_USAGE)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    command = parser.parse_args(arguments[:1]).command
    own, rest = _split(arguments[1:])
    settings = load_config(InspectSettings, None, own)
    config = load(command, f"{_PROG} {command}", rest)
    return command, _listing_bad_rows(config) if settings.list_bad_rows else config, settings


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options of the inspection, and the rest: the configuration and its overrides."""
    keys = schema_keys(InspectSettings)
    own: list[str] = []
    rest: list[str] = []
    where = rest
    for argument in arguments:
        if argument.startswith("--"):
            where = own if argument[2:].partition("=")[0] in keys else rest
        where.append(argument)
    return own, rest


def _listing_bad_rows(config: Any) -> Any:
    """The configuration with every source's bad rows skipped."""

    def skipping(value: Any) -> Any:
        return tuple(source.model_copy(update={"on_bad_row": "skip"}) for source in value)

    sections = {name: getattr(config.data, name) for name in type(config.data).model_fields}
    from rlhf_dist.config.data import DataSource

    changed = {
        name: skipping(value)
        for name, value in sections.items()
        if isinstance(value, tuple) and value and all(isinstance(item, DataSource) for item in value)
    }
    return config.model_copy(update={"data": config.data.model_copy(update=changed)})


def inspected(
    command: str, config: Any, settings: InspectSettings
) -> tuple[dict[str, str], list[SetReport], list[Any]]:
    """(what was looked at, what was found, the bad rows)."""
    from rlhf_dist.curation.inspection import bad_row_kinds, inspect_set, overlap_numbers

    loaded = {"sft": _sft, "reward": _reward, "ppo": _ppo}[command](config)
    limits = {"prompts": config.max_prompt_tokens} if command == "ppo" else {}
    reports, bad, seen = [], [], set()
    for view in loaded.views:
        limit = limits.get(view.kind, config.data.max_length_tokens)
        report = inspect_set(view, loaded.tokenizer, settings, config.seed, limit)
        numbers = report.numbers
        if view.name.startswith("held-out") and (train := _trained(loaded.views, view)) is not None:
            numbers["overlap"] = overlap_numbers(train, view)
        if view.name == "training records" and loaded.mixing:
            numbers["mixing"] = list(loaded.mixing)
        if view.dataset.report.notes:
            numbers["notes"] = dict(view.dataset.report.notes)
        if view.dataset.report.bad:
            numbers["kinds of bad rows"] = bad_row_kinds(view.dataset.report.bad)
        bad += [row for row in view.dataset.report.bad if row.reason not in seen]
        seen |= {row.reason for row in view.dataset.report.bad}
        reports.append(report)
    tokenizer = loaded.tokenizer
    summary = {
        "run": f"{command}, {config.run_dir}",
        "tokenizer": f"{tokenizer.name_or_path} ({type(tokenizer).__name__}, {len(tokenizer):,} tokens)",
        "longest sequence": f"{config.data.max_length_tokens:,} tokens; a longer one: {config.data.on_too_long}",
        "seed": str(config.seed),
        **(loaded.summary or {}),
    }
    return summary, reports, bad


def _trained(views: tuple[View, ...], held_out: View) -> View | None:
    """What is trained on of the kind that is held out: the set of the same name but for its first word."""
    what = held_out.name.removeprefix("held-out ")
    return next((view for view in views if view.name in (f"training {what}", what)), None)


def _views(tokenizer: Any, *sets: tuple[str, Any, Any]) -> tuple[View, ...]:
    from rlhf_dist.curation.dataset_view import View

    return tuple(View(name, data, sources, tokenizer) for name, data, sources in sets if data is not None)


def _sft(config: Any) -> Loaded:
    from rlhf_dist.data.loading import load_sft, mixed_order, shares_of
    from rlhf_dist.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model.model_path, config.data.template_path)
    data = load_sft(config.data, tokenizer, config.seed, keep_records=True)
    order = mixed_order(config.data, data.train, config.seed)
    views = _views(
        tokenizer,
        ("training records", data.train, config.data.train),
        ("held-out records", data.eval, (*config.data.eval, *config.data.train)),
        ("pretraining text", data.pretraining, config.data.pretraining),
        ("held-out pretraining text", data.eval_pretraining, (*config.data.eval_pretraining, *config.data.pretraining)),
    )
    return Loaded(views, tokenizer, shares_of(data.train, order) if order is not None else ())


def _reward(config: Any) -> Loaded:
    from rlhf_dist.data.tokenizer import load_tokenizer
    from rlhf_dist.reward.build import load_data
    from rlhf_dist.reward.low_margin import LowMargin

    tokenizer = load_tokenizer(config.model.model_path, config.data.template_path)
    data, summary = load_data(config, tokenizer, keep_records=True), {}
    if config.reward.low_margin is not None:
        data, summary = LowMargin(config.reward.low_margin.below, config.reward.low_margin.weight).apply(data)
    sources = config.data.train
    sets = (("training pairs", data.train, sources), ("held-out pairs", data.eval, (*config.data.eval, *sources)))
    return Loaded(_views(tokenizer, *sets), tokenizer, summary=summary)


def _ppo(config: Any) -> Loaded:
    from rlhf_dist.data.tokenizer import load_tokenizer
    from rlhf_dist.ppo.build import load_data

    tokenizer = load_tokenizer(config.policy.model_path, config.data.template_path)
    data = load_data(config, tokenizer, keep_records=True)
    views = _views(
        tokenizer,
        ("prompts", data["prompts"], config.data.prompts),
        ("held-out prompts", data["eval_prompts"], config.data.eval_prompts),
        ("PTX text", data["ptx"], config.data.ptx),
    )
    summary = {"longest prompt": f"{config.max_prompt_tokens:,} tokens, beside a response"}
    return Loaded(views, tokenizer, summary=summary)


def _write(
    command: str,
    config: Any,
    settings: InspectSettings,
    summary: dict[str, str],
    reports: list[SetReport],
    bad: list[Any],
) -> None:
    from rlhf_dist.curation.inspection_page import render_page
    from rlhf_dist.curation.output import written
    from rlhf_dist.data.bad_rows import BadRows
    from rlhf_dist.run.run_folder import write_atomically

    out_dir = settings.out_dir or Path()
    title = f"Data of {command} run {config.run_dir.name}"
    with written(out_dir, settings.overwrite, dump_yaml(config)) as folder:
        write_atomically(folder.path / PAGE, render_page(title, summary, reports))
        folder.write_bad_rows(BadRows(bad))
        sets = [{"name": r.name, "kind": r.kind} | r.numbers | {"examples": _examples(r)} for r in reports]
        folder.write_report(
            {"command": command, "summary": summary, "options": settings.model_dump(mode="json"), "sets": sets}
        )


def _examples(report: SetReport) -> list[dict[str, Any]]:
    from rlhf_dist.curation.token_spans import as_json

    return [
        {
            "why": example.why,
            "location": example.location,
            "source": example.source,
            "task": example.task,
            "oddities": list(example.oddities),
            "margin": example.margin,
            "sequences": [
                {
                    "label": sequence.label,
                    "tokens": sequence.num_tokens,
                    "targets": sequence.num_targets,
                    "cut": sequence.cut,
                    "rating": sequence.rating,
                    "pieces": as_json(sequence.pieces),
                }
                for sequence in example.sequences
            ],
        }
        for example in report.examples
    ]
