"""One sbatch file for one run, and its submission. What the job does is in `slurm/run.sh`; slurm/README.md explains it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_dist import __version__
from rlhf_dist.core.errors import ConfigError, PlacementError

_TEMPLATE = Path(__file__).with_name("slurm_job.sbatch.jinja")
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
_PLAIN = re.compile(r"[^\s'\"\\`$]+")
"""What stands behind `#SBATCH --option=` without quotes of any kind."""


@dataclass(frozen=True)
class SlurmRequest:
    """What is asked of Slurm. None leaves it to the site's default."""

    nodes: int = 1
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    array: str | None = None
    """Seeds, in sbatch's words: 0-4, or 1,3,5%2."""
    job_name: str | None = None
    signal_before_end: int = 120
    """Seconds before the time limit at which the run is told to checkpoint; 0: never."""
    container: str | None = None
    activate: str | None = None
    interface: str | None = None
    sbatch_args: tuple[str, ...] = ()
    """Further options of sbatch, as they stand behind #SBATCH."""

    def __post_init__(self) -> None:
        for name in ("time", "partition", "account", "qos", "job_name"):
            value = getattr(self, name)
            if value is not None and not _PLAIN.fullmatch(value):
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {value!r}, but must be without spaces, quotes, $ and \\."
                )
        if self.array is not None and not _ARRAY.fullmatch(self.array):
            raise ConfigError(f"--array is {self.array!r}, but must be a list of seeds such as 0-4 or 1,3,5%2.")
        for argument in self.sbatch_args:
            if not argument.startswith("-") or "\n" in argument:
                raise ConfigError(
                    f"--sbatch-arg is {argument!r}, but must be one option of sbatch, such as --sbatch-arg=--exclude=n7."
                )

    def options(self, command: str) -> list[str]:
        """What stands behind #SBATCH, line by line."""
        given = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": self.cpus_per_node,
            "gpus-per-node": self.gpus_per_node,
            "array": self.array,
            "signal": f"B:USR1@{self.signal_before_end}" if self.signal_before_end else None,
        }
        # Tasks of an array have job ids of their own, which say less than the array's id and the seed.
        log = "%x-%A_%a.log" if self.array else "%x-%j.log"
        return [
            f"--job-name={self.job_name or f'rlhf-{command}'}",
            f"--output={log}",
            "--open-mode=append",
            *(f"--{name}={value}" for name, value in given.items() if value is not None),
            "--requeue",
            *self.sbatch_args,
        ]


@dataclass(frozen=True)
class SlurmJob:
    """A run and what it asks of Slurm."""

    request: SlurmRequest
    command: str
    config: str
    overrides: Sequence[str] = ()
    parts: Path = field(default_factory=lambda: slurm_parts())
    """The folder of run.sh, on storage that all nodes see."""

    def render(self) -> str:
        """The sbatch file."""
        import jinja2

        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        )
        environment.filters["quote"] = lambda value: shlex.quote(str(value))
        variables = {
            "RLHF_DIST_CONTAINER": self.request.container,
            "RLHF_DIST_ACTIVATE": self.request.activate,
            "RLHF_DIST_INTERFACE": self.request.interface,
        }
        return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
            version=__version__,
            command=self.command,
            config=self.config,
            overrides=self.overrides,
            options=self.request.options(self.command),
            variables={name: value for name, value in variables.items() if value},
            parts=str(self.parts),
        )

    def submit(self) -> str:
        """Hand it to sbatch; returns the job's id.

        Raises:
            ConfigError: there is no sbatch here.
            PlacementError: Slurm rejected it, with Slurm's words.
        """
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "there is no sbatch here; submit from a login node of the cluster, or see the file with --dry-run"
            )
        done = subprocess.run(
            ["sbatch", "--parsable"], input=self.render(), capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise PlacementError(
                f"Slurm rejected the job: {done.stderr.strip() or f'sbatch ended with {done.returncode}'}"
            )
        return done.stdout.strip().partition(";")[0]

    def log_name(self, job_id: str) -> str:
        """Where the job's output goes, relative to where it was submitted; of an array, a pattern."""
        name = self.request.job_name or f"rlhf-{self.command}"
        return f"{name}-{job_id}_*.log" if self.request.array else f"{name}-{job_id}.log"


def slurm_parts(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder with run.sh: $RLHF_DIST_SLURM_DIR, or `slurm/` of the checkout that the package is in, or of this directory.

    Raises:
        ConfigError: there is none.
    """
    named = environment.get("RLHF_DIST_SLURM_DIR")
    checkout = Path(__file__).resolve().parents[2]
    for folder in [Path(named)] if named else [checkout / "slurm", Path("slurm")]:
        if (folder / "run.sh").is_file():
            return folder.absolute()
    raise ConfigError(
        f"there is no {named or 'slurm'}/run.sh; set RLHF_DIST_SLURM_DIR to the slurm folder of a checkout that all nodes see"
    )


def activation_of_this_environment() -> str | None:
    """The script that activates the virtual environment that runs this; None where it is none."""
    script = Path(sys.prefix) / "bin" / "activate"
    return str(script) if sys.prefix != sys.base_prefix and script.is_file() else None
