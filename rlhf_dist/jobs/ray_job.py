"""`rlhf-dist submit --ray ADDRESS`: a run as a job of a Ray cluster that is already there."""

from __future__ import annotations

import sys
from argparse import Namespace, _ArgumentGroup
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_dist.config.secret_names import is_secret
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.pipeline.arguments import INTERRUPTED


def add_arguments(group: _ArgumentGroup) -> None:
    """The options that belong to `--ray`."""
    add = group.add_argument
    add(
        "--working-dir",
        type=Path,
        default=Path(),
        help="travels with the job, without results, weights and .gitignore'd",
    )
    add("--exclude", action="append", default=[], metavar="PATTERN", help="exclude more, in the syntax of .gitignore")
    add("--pip", action="append", default=[], metavar="REQUIREMENT", help="install this on every node first")
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="variable of the job; readable by others on the cluster, so no secrets",
    )
    add("--job-id", default=None, help="name of the job; Ray makes one up")
    add("--no-wait", action="store_true", help="return when the job is submitted")


def run(options: Namespace, command: str, config: Any, arguments: Sequence[str]) -> int:
    """Submit, follow, and return the job's exit code.

    Args:
        options: of `add_arguments`, and `ray` (the address) and `dry_run`.
        command: of `rlhf-dist`.
        config: as checked here.
        arguments: configuration file and overrides, as given.

    Raises:
        ConfigError: an option, or the configuration, is nothing to submit.
        SubmissionError: the cluster does not take the job.
    """
    from rlhf_dist.jobs.ray_client import EXCLUDED, Job, JobClient, check_address

    check_address(options.ray)
    job = Job(
        arguments=[command, *job_arguments(config, arguments, options.working_dir)],
        working_dir=options.working_dir.resolve(),
        excludes=[*EXCLUDED, *options.exclude],
        pip=options.pip,
        env_vars=dict(_variable(text) for text in options.env),
        job_id=options.job_id,
    )
    if options.dry_run:
        _print_job(options.ray, job)
        return 0
    client = JobClient(options.ray)
    job_id = client.submit(job)
    say = f"Job {job_id} at {options.ray}, run folder {config.run_dir}"
    print(f"{say}\n  follow: ray job logs -f {job_id}\n  stop:   ray job stop {job_id}", flush=True)
    return 0 if options.no_wait else _follow(client, job_id)


def job_arguments(config: Any, arguments: Sequence[str], working_dir: Path) -> list[str]:
    """What the job is called with: the paths as they are there, its cluster, and to continue where an earlier job ended.

    Raises:
        ConfigError: the configuration file does not travel with the job, or the run would not use the cluster.
    """
    if config.cluster == "inline":
        raise ConfigError("cluster is inline, which hosts nothing on a cluster; a job needs cluster: ray")
    path = Path(arguments[0])
    if arguments[0].startswith("-"):
        raise ConfigError("a job needs a configuration file behind its command, which travels with it; write one")
    if not path.resolve().is_relative_to(working_dir.resolve()):
        raise ConfigError(
            f"{path} is not below --working-dir {working_dir.resolve()}, which is what travels with the job; submit from "
            "the folder that holds it, or name that folder"
        )
    there = str(path.resolve().relative_to(working_dir.resolve()))
    given = {token.partition("=")[0] for token in arguments[1:]}
    added = [] if "--ray.address" in given else ["--ray.address", "auto"]
    # The job starts in a copy of the working directory, which goes with it: results do not belong there.
    added += ["--run_dir", str(config.run_dir)]
    # An evaluation is always run whole, and a pipeline always continues: they have no such key.
    resumable = "resume" in type(config).model_fields and not config.overwrite
    if resumable and "resume" not in config.model_fields_set:  # whoever says something, here or in the file, means it
        added += ["--resume", "auto"]
    return [there, *_without_run_dir(arguments[1:]), *added]


def _without_run_dir(tokens: Sequence[str]) -> list[str]:
    """The overrides without `--run_dir`, which is given anew, as an absolute path."""
    kept, skip = [], False
    for token in tokens:
        if not skip and not token.startswith("--run_dir="):
            skip = token == "--run_dir"
            if not skip:
                kept.append(token)
        else:
            skip = False
    return kept


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--env {text}: a variable is written NAME=VALUE")
    if is_secret(name):
        raise ConfigError(
            f"--env {name}: by its name it is a secret, and a job's variables are stored in plain text in Ray's API and in its "
            "logs on the nodes; put it into the environment that Ray is started in on the nodes, or into a file that they see "
            "(as `hf auth login` and `wandb login` write)"
        )
    return name, value


def _print_job(address: str, job: Any) -> None:
    from rlhf_dist.config.yaml_file import to_yaml

    print(f"# job for {address}\nentrypoint: {job.entrypoint}\nruntime_env:")
    print("".join(f"  {line}\n" for line in to_yaml(job.runtime_env).splitlines()), end="")


def _follow(client: Any, job_id: str) -> int:
    """The job's output here; Ctrl-C asks what is to become of the job."""
    while True:
        try:
            ended = client.follow(job_id, _write)
        except KeyboardInterrupt:
            if _leave(client, job_id):
                return INTERRUPTED
        else:
            if ended.status != "SUCCEEDED":
                print(f"Job {job_id} {ended.status}: {ended.message.strip()}", file=sys.stderr)
            return ended.exit_code


def _leave(client: Any, job_id: str) -> bool:
    """Whether to stop following. Where nobody can be asked, the job continues."""
    if not sys.stdin.isatty():
        print(f"\nThe job continues. Stop it with: ray job stop {job_id}", file=sys.stderr)
        return True
    try:
        answer = (
            input(f"\nJob {job_id} is running. [s]top it, [l]eave it running, or [c]ontinue to follow? ")
            .strip()
            .lower()
        )
    except (KeyboardInterrupt, EOFError):
        answer = "l"
    if answer.startswith("s"):
        client.stop(job_id)
        print(f"Job {job_id} is being stopped.")
        return True
    if answer.startswith("l"):
        print(f"The job continues. Follow it with: ray job logs -f {job_id}")
        return True
    return False


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
