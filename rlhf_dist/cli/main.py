"""`rlhf-dist COMMAND ...`.

Arguments are parsed and configurations are checked before anything heavy is imported: help and errors answer at once.
Each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_dist import __version__
from rlhf_dist.core.errors import ConfigError, RlhfDistError
from rlhf_dist.pipeline.arguments import CONFIG_COMMANDS, INTERRUPTED, PROG, Parser, load, schema_of

OTHER_COMMANDS = {
    "quickstart": "the whole job on CPUs, with embedded data and a small model: pretraining, SFT, reward model, PPO",
    "data": "make data, mix it, look at it: templates, self-instruct, deduplication, responses, labels by a model, ...",
    "label": "a page on which people choose between responses; what they said as preference records, and how far they agree",
    "chat": "talk to a saved model",
    "submit": "run a command as a job of a Ray cluster or of Slurm",
    "doctor": "what works on this machine, what does not, what to do",
    "validate": "check a configuration, its files and models without starting anything",
    "plan": "memory, placement and time of a run on paper, from the models' configs alone",
    "schema": "print a command's configuration as a JSON schema, for editors",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, an error class's `exit_code`, or 130 after Ctrl-C."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except RlhfDistError as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (`| head`) left. Its file descriptor is replaced, or Python would complain at exit.
        sys.stdout = None  # pyright: ignore[reportAttributeAccessIssue]
        return 0


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"{PROG} {__version__}")
        return 0
    command, arguments = argv[0], argv[1:]
    if command in CONFIG_COMMANDS:
        _run_config_command(command, arguments)
        return 0
    if command in OTHER_COMMANDS:
        commands: dict[str, Callable[[list[str]], int | None]] = {
            "quickstart": _quickstart,
            "data": _data,
            "label": _label,
            "chat": _chat,
            "submit": _submit,
            "doctor": _doctor,
            "validate": _validate,
            "plan": _plan,
            "schema": _schema,
        }
        return commands[command](arguments) or 0
    from difflib import get_close_matches

    names = [*CONFIG_COMMANDS, *OTHER_COMMANDS]
    close = get_close_matches(command, names, n=1)
    guess = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(names)}."
    raise ConfigError(f"{PROG} has no command '{command}'; {guess} See `{PROG} --help`.")


def _overview() -> str:
    def lines(commands: dict[str, str]) -> str:
        return "\n".join(f"  {name:<11} {text}" for name, text in commands.items())

    return f"""\
usage: {PROG} COMMAND ...
       {PROG} [--help | --version]

Distributed RLHF: instruction tuning, reward modeling and PPO on Ray and DeepSpeed.

commands with a configuration ({PROG} COMMAND CONFIG.yaml [--section.key value ...]):
{lines(CONFIG_COMMANDS)}

other commands:
{lines(OTHER_COMMANDS)}

`{PROG} COMMAND --help` shows a command's options, with type, default and meaning."""


def _run_config_command(command: str, arguments: list[str]) -> None:
    config = load(command, f"{PROG} {command}", arguments)
    if config is not None:
        from rlhf_dist.run import preemption

        with preemption.listening():
            if command == "pipeline":
                from rlhf_dist.pipeline import command as pipeline

                pipeline.run(config)
                return
            from rlhf_dist.pipeline.commands import COMMANDS

            summary = COMMANDS[command].run(config)
        if command == "eval":
            _show_eval(summary)


def _show_eval(summary: Mapping[str, Any]) -> None:
    """The result on the terminal; it is in summary.json as well."""
    from rlhf_dist.run.console import format_number, print_table

    rows = [
        (part, name, format_number(value))
        for part, numbers in summary.items()
        if isinstance(numbers, Mapping)
        for name, value in numbers.items()
    ]
    print_table("eval: on held-out records", rows, header=("", "measure", "value"))


def _validate(arguments: list[str]) -> None:
    prog = f"{PROG} validate"
    command, rest = _kind(prog, "check a configuration without starting anything", arguments)
    config = load(command, f"{prog} {command}", rest)
    if config is not None:
        from rlhf_dist.run.console import print_table

        if command == "pipeline":
            from rlhf_dist.pipeline.command import validate as validate_pipeline

            found = validate_pipeline(config)
        else:
            from rlhf_dist.pipeline.commands import validate

            found = validate(command, config)
        print_table(f"{command}: the configuration can be run", [(str(k), str(v)) for k, v in found.items()])


def _plan(arguments: list[str]) -> None:
    from rlhf_dist.planning.arguments import parse

    options = parse(f"{PROG} plan", f"{OTHER_COMMANDS['plan']}.", list(CONFIG_COMMANDS), arguments)
    if options is not None:
        from rlhf_dist.planning import command as plan

        plan.run(options.command, options.config, options, options.overrides)


def _data(arguments: list[str]) -> None:
    from rlhf_dist.curation.commands import command as data

    data.run(arguments)


def _label(arguments: list[str]) -> None:
    from rlhf_dist.curation.label import command as label

    label.run(arguments)


def _schema(arguments: list[str]) -> None:
    if arguments == ["templates"]:  # not a command's configuration, but a file that one names
        from rlhf_dist.config.load import json_schema
        from rlhf_dist.config.templates import TemplateFile

        print(json_schema(TemplateFile))
        return
    if arguments[:1] == ["data"] and len(arguments) == 2:
        from rlhf_dist.config.load import json_schema
        from rlhf_dist.curation.commands import command as data

        print(json_schema(data.resolved(data.action_of(f"{PROG} schema data", arguments[1]).schema)))
        return
    if arguments == ["label"]:
        from rlhf_dist.config.load import json_schema
        from rlhf_dist.curation.config.label import LabelConfig

        print(json_schema(LabelConfig))
        return
    command, rest = _kind(f"{PROG} schema", OTHER_COMMANDS["schema"], arguments)
    if rest:
        raise ConfigError(f"{PROG} schema {command}: '{rest[0]}' is one argument too many. Remove it.")
    from rlhf_dist.config.load import json_schema

    print(json_schema(schema_of(command)))


def _kind(prog: str, description: str, arguments: list[str]) -> tuple[str, list[str]]:
    parser = Parser(prog=prog, description=description, usage=f"{prog} {{{','.join(CONFIG_COMMANDS)}}} ...")
    parser.add_argument("command", choices=list(CONFIG_COMMANDS), metavar="COMMAND", help=", ".join(CONFIG_COMMANDS))
    return parser.parse_args(arguments[:1]).command, arguments[1:]


def _quickstart(arguments: list[str]) -> None:
    parser = Parser(
        prog=f"{PROG} quickstart",
        description=f"{OTHER_COMMANDS['quickstart']}. It is the CPU demonstration: GPUs are left alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run-dir", type=Path, default=Path("runs/quickstart"), help="folder of the run")
    add("--model", choices=["tiny", "smollm2"], default="tiny", help="a model made here, or a pretrained one of 135M")
    add("--seed", type=int, default=0, help="seed of every random draw")
    add("--cluster", choices=["ray", "inline"], default="ray", help="models in Ray actors, or in this process")
    add("--overwrite", action="store_true", help="remove what an earlier run left in the folder")
    options = parser.parse_args(arguments)
    from rlhf_dist.quickstart import run as quickstart

    quickstart.run(
        run_dir=options.run_dir,
        model=options.model,
        seed=options.seed,
        cluster=options.cluster,
        overwrite=options.overwrite,
    )


def _submit(arguments: list[str]) -> int:
    from rlhf_dist.jobs import command as submit

    return submit.run(arguments)


def _chat(arguments: list[str]) -> None:
    parser = Parser(
        prog=f"{PROG} chat",
        description="Talk to a saved model. /reset forgets the conversation, /exit or Ctrl-D ends it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model_dir", metavar="MODEL_DIR", help="a model directory in Hugging Face format, such as RUN_DIR/model")
    add("--temperature", type=float, default=1.0, help="softmax temperature; 0 takes the likeliest token")
    add("--max-response-tokens", type=int, default=256, help="longest reply in tokens")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto uses a GPU where there is one")
    add("--seed", type=int, default=0, help="seed of the sampling")
    options = parser.parse_args(arguments)
    from rlhf_dist.cli import chat

    chat.run(**vars(options))


def _doctor(arguments: list[str]) -> None:
    parser = Parser(
        prog=f"{PROG} doctor",
        description="What works on this machine, what does not, and what to do. Exit code 1 where something is an error.",
        allow_abbrev=False,
    )
    parser.add_argument("--deep", action="store_true", help="also let two processes meet, and start a private Ray")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the findings as JSON")
    options = parser.parse_args(arguments)
    from rlhf_dist.planning.doctor import command as doctor

    doctor.run(deep=options.deep, as_json=options.as_json)


def _print_error(error: RlhfDistError) -> None:
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, highlight=False).print(Text("error: ", style="bold red") + Text(str(error)))
    else:
        print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
