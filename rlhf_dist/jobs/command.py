"""`rlhf-dist submit`: hand a run to a cluster. The configuration is checked here first, so that a typing error does not wait
in a queue."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.jobs import ray_job
from rlhf_dist.pipeline.arguments import CONFIG_COMMANDS, PROG, Parser, load

RESUMED = ("sft", "reward", "ppo")
"""Commands that a job starts with `--resume auto`, unless told otherwise, or to overwrite; a pipeline continues by itself."""


def run(arguments: Sequence[str]) -> int:
    """Check and submit; returns the job's exit code where it is waited for. Raises what the configuration or the cluster
    rejects the run for."""
    parser, belonging = _parser()
    options = parser.parse_args(list(arguments))
    if options.command not in CONFIG_COMMANDS:
        raise ConfigError(
            f"{PROG} submit: the command is {options.command!r}, but must be {', '.join(CONFIG_COMMANDS)}."
        )
    _refuse_options(options, belonging, *(("--slurm", "--ray") if options.ray is not None else ("--ray", "--slurm")))
    if options.ray is not None:
        return _ray(options)
    _slurm(options)
    return 0


def _parser() -> tuple[Parser, dict[str, argparse._ArgumentGroup]]:
    """And the options that belong to `--ray` and to `--slurm`."""
    parser = Parser(
        prog=f"{PROG} submit",
        usage=f"{PROG} submit (--ray ADDRESS | --slurm) [options] COMMAND CONFIG.yaml [--section.key value ...]",
        description="Hand a run to a cluster. Options stand before COMMAND, overrides of the configuration behind CONFIG.",
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--ray", metavar="ADDRESS", help="dashboard of a Ray cluster, such as http://HEAD:8265")
    where.add_argument("--slurm", action="store_true", help="submit with sbatch")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and submit nothing")
    belonging = {
        "--ray": parser.add_argument_group("with --ray"),
        "--slurm": parser.add_argument_group("with --slurm (what is omitted, the site decides)"),
    }
    ray_job.add_arguments(belonging["--ray"])
    _add_slurm_options(belonging["--slurm"])
    parser.add_argument("command", metavar="COMMAND", help=", ".join(CONFIG_COMMANDS))
    parser.add_argument("arguments", metavar="CONFIG ...", nargs=argparse.REMAINDER, help="as of `rlhf-dist COMMAND`")
    return parser, belonging


def _refuse_options(
    options: argparse.Namespace, belonging: dict[str, argparse._ArgumentGroup], other: str, chosen: str
) -> None:
    """Reject options of the way that was not chosen: they would be of no effect."""
    actions = [a for a in belonging[other]._group_actions if getattr(options, a.dest) != a.default]
    if actions:
        names = ", ".join(a.option_strings[0] for a in actions)
        belong = "belongs" if len(actions) == 1 else "belong"
        raise ConfigError(f"{PROG} submit: {names} {belong} to {other}, and with {chosen} would do nothing; remove it.")


def _add_slurm_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--nodes", type=_at_least(1), default=1, metavar="N", help="nodes (default: 1)")
    add("--gpus-per-node", type=_at_least(0), metavar="G", help="GPUs of each node; device: auto wants to be told")
    add("--cpus-per-node", type=_at_least(1), metavar="C", help="CPUs of each node (default: as the roles ask)")
    add("--time", metavar="LIMIT", help="time limit, such as 24:00:00 or 2-0")
    add("--partition", metavar="NAME", help="partition (queue)")
    add("--account", metavar="NAME", help="account that pays")
    add("--qos", metavar="NAME", help="quality of service")
    add("--array", metavar="SEEDS", help="one run a seed, such as 0-4; run_dir must hold {seed}")
    add("--job-name", metavar="NAME", help="name of the job and its log (default: rlhf-COMMAND)")
    add(
        "--signal-before-end",
        type=_at_least(0),
        default=120,
        metavar="S",
        help="seconds before the time limit at which the run checkpoints and is requeued; 0: never (default: 120)",
    )
    add("--container", metavar="IMAGE", help="FILE.sif, docker://IMAGE (both Apptainer) or pyxis:IMAGE")
    add(
        "--activate",
        metavar="FILE_OR_LINE",
        help="file to source or line of shell on each node (default: this virtual environment, without --container)",
    )
    add("--interface", metavar="NAME", help="network interface between the nodes, such as ib0")
    add(
        "--sbatch-arg",
        dest="sbatch_args",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, such as --sbatch-arg=--exclude=n7; may be repeated",
    )


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is less than {lowest}")
        return value

    number.__name__ = "whole number"  # argparse: invalid whole number value: 'x'
    return number


def _ray(options: argparse.Namespace) -> int:
    config = load(options.command, f"{PROG} submit ... {options.command}", options.arguments)
    if config is None:  # --help was among the overrides, and printed
        return 0
    return ray_job.run(options, options.command, config, options.arguments)


def _slurm(options: argparse.Namespace) -> None:
    from rlhf_dist.jobs.capacity import with_room
    from rlhf_dist.jobs.slurm_job import SlurmJob, SlurmRequest, activation_of_this_environment

    fields = SlurmRequest.__dataclass_fields__
    given = {name: value for name, value in vars(options).items() if name in fields}
    given["sbatch_args"] = tuple(options.sbatch_args)
    if options.container is None and options.activate is None:
        given["activate"] = activation_of_this_environment()
    if options.container is not None:
        _check_container(options.container)
    request = SlurmRequest(**given)
    config, path, overrides = _checked(options.command, options.arguments, request.array)
    asked, request = request, with_room(request, config)
    for name in ("gpus_per_node", "cpus_per_node"):
        if (number := getattr(request, name)) != getattr(asked, name):
            sys.stderr.write(f"--{name.replace('_', '-')} is not given; the roles ask for {number}\n")
    job = SlurmJob(request, options.command, path, overrides)
    if options.dry_run:
        print(job.render(), end="")
        return
    job_id = job.submit()
    log = job.log_name(job_id)
    print(f"Submitted job {job_id}: {options.command} {path}, {request.nodes} node{'s' if request.nodes > 1 else ''}")
    for line, what in (
        (f"tail -F {log}", "its output, once it has started"),
        (f"squeue -j {job_id}", "its state"),
        (f"scancel {job_id}", "ends it"),
    ):
        print(f"  {line:<36}  {what}")


def _check_container(image: str) -> None:
    named = image.startswith(("docker://", "pyxis:"))
    if not named and not (image.endswith(".sif") and Path(image).is_file()):
        raise ConfigError(
            f"--container is {image!r}, but must be an existing .sif file, docker://IMAGE or pyxis:IMAGE; correct it"
        )


def _checked(command: str, arguments: Sequence[str], array: str | None) -> tuple[Any, str, list[str]]:
    """The configuration, its path and the overrides, once the schema has nothing to say against what the job will run."""
    prog = f"{PROG} submit ... {command}"
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"{prog} needs a configuration file behind {command}. See `{PROG} submit --help`.")
    path, overrides = arguments[0], list(arguments[1:])

    def checked(*extra: str) -> Any:
        config = load(command, prog, [path, "--ray.address", "auto", *overrides, *extra])
        if config is None:  # --help was among the overrides, and printed
            raise SystemExit(0)
        return config

    config = checked()
    if command in RESUMED and "resume" not in config.model_fields_set and not config.overwrite:
        config = checked("--resume", "auto")
    if config.cluster != "ray":
        raise ConfigError(
            "cluster is 'inline', but a job hosts its models on Ray; set cluster: ray, or pass --cluster ray."
        )
    if array is not None:
        if any(a.partition("=")[0] == "--seed" for a in overrides):
            raise ConfigError("--array gives each run its seed, so --seed has nothing to say; remove one of them.")
        if checked("--seed", "1").run_dir == checked("--seed", "2").run_dir:
            raise ConfigError(
                f"run_dir is {config.run_dir}, to which all runs of --array {array} would write; put {{seed}} into it, such "
                "as --run_dir runs/ppo-{seed}."
            )
    return config, path, overrides
