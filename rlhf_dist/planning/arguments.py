"""Arguments of `rlhf-dist plan`. Imports nothing heavy: help and errors answer at once."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.pipeline.arguments import Parser


def parse(prog: str, about: str, commands: Sequence[str], arguments: Sequence[str]) -> argparse.Namespace | None:
    """The options, with `command` (None: to be recognized), `config` and `overrides`; None when help was asked for and printed.

    Raises:
        ConfigError: the arguments are not those of the command.
    """
    parser = _parser(prog, about, commands)
    if any(a in ("-h", "--help") for a in arguments):
        parser.print_help()
        return None
    words = list(arguments)
    command = words.pop(0) if words and words[0] in commands else None
    if not words:
        raise ConfigError(f"{prog} needs a configuration file. See `{prog} --help`.")
    if words[0].startswith("-"):
        raise ConfigError(f"{prog}: the configuration file comes before the options. See `{prog} --help`.")
    known = {option for action in parser._actions for option in action.option_strings}
    own: list[str] = []
    overrides: list[str] = []
    target = overrides
    for word in words[1:]:
        if word.startswith("--"):
            target = own if word.partition("=")[0] in known else overrides
        target.append(word)
    options = parser.parse_args(own)
    options.command, options.config, options.overrides = command, Path(words[0]), overrides
    return options


def _parser(prog: str, about: str, commands: Sequence[str]) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} [{{{','.join(commands)}}}] CONFIG.yaml [options] [--section.key value ...]",
        description=f"{about} Needs no weights, no data and no GPU, and starts nothing. Exit code: 0 if the run fits, 6 if "
        "not. Other options than these override keys of the configuration, as everywhere.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpus", type=_positive, help="GPUs of a node; default: those of this machine, or what the placement asks for")
    add("--nodes", type=_positive, help="nodes of --gpus each (with --gpus, default 1)")
    add(
        "--gpu-type",
        help="b200, h200, h100, a100-80gb, a100-40gb, l40s, a10g, v100-32gb: memory and rates by its datasheet",
    )
    add("--gpu-memory", help="of one GPU, such as 80GB (10^9 bytes) or 80GiB, in place of the type's")
    add("--cpu-memory", help="host memory of a node (default: this machine's, or 250GB for each GPU)")
    add("--format", choices=["table", "markdown", "json"], default="table", help="of the output (default: table)")
    add(
        "--rates",
        type=Path,
        help="JSON of rates and efficiencies, or the folder of a real run, whose times calibrate them",
    )
    add(
        "--measured-on",
        metavar="TYPE[:NODESxGPUS]",
        help="where the run of --rates was, such as h100 or h100:2x8 (default: nodes of 8, as many as it asked for)",
    )
    add("--scale", default="", help="also on these numbers of GPUs, such as 8,64,512,4096")
    add("--suggest", action="store_true", help="look for placements, too, where the run fits as it is")
    add(
        "--mean-prompt-tokens",
        type=_tokens,
        help="expected length of prompts, for the times, and that of the run of --rates (default: the longest)",
    )
    add(
        "--mean-response-tokens",
        type=_tokens,
        help="expected length of responses, for the times (default: the longest)",
    )
    return parser


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _tokens(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{number:g} is not a positive number")
    return number
