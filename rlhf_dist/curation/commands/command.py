"""`rlhf-dist data ACTION CONFIG`: from the name of an action to its configuration and its code.

Both are imported when the action is called, so that help and errors answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.pipeline.arguments import PROG, load_schema


@dataclass(frozen=True)
class Action:
    """One command below `rlhf-dist data`."""

    help: str
    schema: str
    """module:class of its configuration."""
    run: str
    """module:function that takes the checked configuration and does the work."""
    parses: bool = False
    """`run` takes the arguments as they are; `schema` is that of its options."""


ACTIONS: dict[str, Action] = {
    "templates": Action(
        "instruction records out of labeled sets, by Jinja templates with names for labels",
        "rlhf_dist.curation.config.templates:TemplatesConfig",
        "rlhf_dist.curation.commands.templates:run",
    ),
    "self-instruct": Action(
        "instruction records that a language model makes up after the example of seed tasks",
        "rlhf_dist.curation.config.self_instruct:SelfInstructConfig",
        "rlhf_dist.curation.commands.self_instruct:run",
    ),
    "responses": Action(
        "several responses to each prompt, of two or more models or sampling settings, to choose among",
        "rlhf_dist.curation.config.responses:ResponsesConfig",
        "rlhf_dist.curation.commands.responses:run",
    ),
    "judge": Action(
        "preferences between responses by a language model or a Python function, asked in both orders",
        "rlhf_dist.curation.config.judge:JudgeConfig",
        "rlhf_dist.curation.commands.judge:run",
    ),
    "dedup": Action(
        "remove exact and near duplicates, and records that evaluation sets contain",
        "rlhf_dist.curation.config.dedup:DedupConfig",
        "rlhf_dist.curation.commands.dedup:run",
    ),
    "mix": Action(
        "mix sets in chosen shares",
        "rlhf_dist.curation.config.mix:MixConfig",
        "rlhf_dist.curation.commands.mix:run",
    ),
    "pairs": Action(
        "preference pairs out of ratings and rankings, with margins",
        "rlhf_dist.curation.config.pairs:PairsConfig",
        "rlhf_dist.curation.commands.pairs:run",
    ),
    "inspect": Action(
        "what a trainer will see: `inspect sft CONFIG.yaml` (or reward, ppo)",
        "rlhf_dist.curation.config.inspect:InspectSettings",
        "rlhf_dist.curation.commands.inspect:run",
        parses=True,
    ),
}


def run(arguments: list[str]) -> None:
    """Run an action with its arguments; without any, or for help, list the actions."""
    prog = f"{PROG} data"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview(prog))
        return
    name, rest = arguments[0], arguments[1:]
    action = action_of(prog, name)
    if action.parses:
        resolved(action.run)(rest)
        return
    config = load_schema(resolved(action.schema), f"{PROG} data {name}", rest, f"data {name}")
    if config is not None:
        resolved(action.run)(config)


def action_of(prog: str, name: str) -> Action:
    """The action of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ACTIONS:
        close = get_close_matches(name, ACTIONS, n=1)
        guess = f"did you mean {close[0]}?" if close else f"the actions are {', '.join(ACTIONS)}."
        raise ConfigError(f"{prog} has no action '{name}'; {guess} See `{prog} --help`.")
    return ACTIONS[name]


def overview(prog: str) -> str:
    """The help text."""
    listed = "\n".join(f"  {name:<14} {action.help}" for name, action in ACTIONS.items())
    return f"usage: {prog} ACTION CONFIG.yaml [--section.key value ...]\n\nactions:\n{listed}"


def resolved(place: str) -> Any:
    """What "module:name" names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
