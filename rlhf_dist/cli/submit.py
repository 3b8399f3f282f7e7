"""`rlhf-dist submit`: a run as a job of a Ray cluster or of Slurm."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rlhf_dist.cli import submit_ray
from rlhf_dist.cli.main import CONFIG_COMMANDS, PROG, Parser, load


def run(arguments: Sequence[str]) -> int:
    """Submit a job; returns its exit code, or 0 where it is not waited for."""
    prog = f"{PROG} submit"
    parser = Parser(
        prog=prog,
        usage=f"{prog} --ray ADDRESS [options] COMMAND CONFIG.yaml [--section.key value ...]",
        description="Run a command as a job. Its configuration is checked here first.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--ray", metavar="ADDRESS", help="dashboard of a Ray cluster, such as http://HEAD:8265")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    submit_ray.add_arguments(parser.add_argument_group("with --ray"))
    parser.add_argument("command", choices=list(CONFIG_COMMANDS), metavar="COMMAND", help=", ".join(CONFIG_COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="CONFIG", help="configuration and overrides")
    options = parser.parse_args(arguments)
    config = load(options.command, f"{prog} {options.command}", options.arguments)
    if config is None:  # help of the command was asked for
        return 0
    return submit_ray.run(options, options.command, config, options.arguments)
