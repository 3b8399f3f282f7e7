"""Jobs on a Ray cluster, through Ray's job submission API: submit, follow to the end, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenacity import (
    Retrying,
    retry_if_exception_message,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
)

from rlhf_dist.core.errors import ConfigError, SubmissionError
from rlhf_dist.core.proxies import proxy_hint

EXCLUDED = (
    ".git/",
    "/runs/",
    "/wandb/",
    "checkpoints/",
    "model/",
    "model_ema/",
    ".venv*/",
    "__pycache__/",
    "*.safetensors",
    "*.gguf",
    "*.pt",
    "*.bin",
)
"""What never travels with a job, in the syntax of .gitignore, beside what .gitignore itself names: results, weights, builds."""

_PATIENCE = 10
"""Tries in a row to reach a cluster that is lost, before following ends."""
_NEW_CLUSTER_S = 180.0
"""How long a cluster may take until it can start jobs."""


@dataclass(frozen=True)
class Job:
    """What to run on the cluster."""

    arguments: Sequence[str]
    """Of `rlhf-dist`."""
    working_dir: Path
    """Travels with the job, which starts in the copy."""
    excludes: Sequence[str] = EXCLUDED
    pip: Sequence[str] = ()
    """Requirements that every node installs first, beside those of its image."""
    env_vars: dict[str, str] = field(default_factory=dict)
    """Everybody who reaches the cluster's API or reads Ray's logs on a node can read them: no place for secrets."""
    job_id: str | None = None
    """None: Ray makes one up."""

    @property
    def entrypoint(self) -> str:
        """The command line of the driver. As a module: the package travels with the job, nodes need no installed one."""
        return shlex.join(["python", "-m", "rlhf_dist.cli.main", *self.arguments])

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's description of the job's environment. The package that submits is the one that runs, on every node."""
        package = Path(__file__).resolve().parents[1]
        env: dict[str, Any] = {
            "working_dir": str(self.working_dir),
            "py_modules": [str(package)],
            "excludes": list(self.excludes),
        }
        if self.pip:
            env["pip"] = list(self.pip)
        if self.env_vars:
            env["env_vars"] = self.env_vars
        return env


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    status: str
    """SUCCEEDED, FAILED or STOPPED."""
    exit_code: int
    message: str


def check_address(address: str) -> None:
    """Reject what is no dashboard's address: Ray would take it for another kind of address, and look for a cluster for long.

    Raises:
        ConfigError: it is not http:// or https://.
    """
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"the address of the Ray cluster is {address!r}, but must be its dashboard's, with http:// or https://, such as "
            "http://HEAD:8265; correct --ray"
        )


class JobClient:
    """A cluster that takes jobs."""

    def __init__(self, address: str) -> None:
        """`address`: of the cluster's dashboard, such as http://HEAD:8265.

        Raises:
            SubmissionError: nothing answers there, or it does not accept the token.
        """
        self.address = address
        self._shown: dict[str, int] = {}
        """Job → characters of its log that were passed on."""
        _use_token()
        # After the token is in the environment: Ray reads the mode when it is imported.
        from ray.job_submission import JobSubmissionClient

        self._client: Any = self._asked(lambda: JobSubmissionClient(address), "answer")
        for name in ("dashboard_sdk", "job.sdk"):  # they tell of every upload and web socket
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)

    def submit(self, job: Job) -> str:
        """Send the job; returns its id."""
        again = (
            Retrying(  # a cluster that has just started says "No available agent to submit job, please try again later"
                retry=retry_if_exception_message(match=r"(?s).*try again later"),
                wait=wait_exponential(max=5),
                stop=stop_after_delay(_NEW_CLUSTER_S),
                reraise=True,
            )
        )
        request = {"entrypoint": job.entrypoint, "runtime_env": job.runtime_env, "submission_id": job.job_id}
        return self._asked(lambda: again(self._client.submit_job, **request), "take the job", job.job_id)

    def stop(self, job_id: str) -> None:
        """Ask the cluster to stop the job."""
        self._asked(lambda: self._client.stop_job(job_id), "stop the job")

    def follow(self, job_id: str, write: Callable[[str], object]) -> Ended:
        """Pass the job's output on as it comes, until the job has ended.

        A connection that breaks, and a call that was interrupted, are taken up again where they broke off.

        Raises:
            SubmissionError: the cluster cannot be reached any more.
        """
        again = Retrying(
            retry=retry_if_exception_type((RuntimeError, OSError)),  # requests' and aiohttp's errors are these
            wait=wait_exponential(max=30),
            stop=stop_after_attempt(_PATIENCE),
            reraise=True,
        )
        try:
            while (ended := again(self._follow_once, job_id, write)) is None:
                time.sleep(1)
        except (RuntimeError, OSError) as error:
            raise SubmissionError(
                f"the cluster at {self.address} cannot be reached any more ({_first_line(error)}); the job {job_id} may "
                f"continue there: ray job status {job_id}"
            ) from error
        return ended

    def _follow_once(self, job_id: str, write: Callable[[str], object]) -> Ended | None:
        asyncio.run(self._tail(job_id, write))  # ends, in good order, only with the job
        info = self._client.get_job_info(job_id)
        if not info.status.is_terminal():
            return None
        succeeded = info.status == "SUCCEEDED"
        return Ended(str(info.status), 0 if succeeded else info.driver_exit_code or 1, info.message or "")

    async def _tail(self, job_id: str, write: Callable[[str], object]) -> None:
        """Write what of the log was not yet passed on; the cluster always sends all of it."""
        position = 0
        async for text in self._client.tail_job_logs(job_id):
            position += len(text)
            new = position - self._shown.get(job_id, 0)
            if new > 0:
                write(text[-new:])
                self._shown[job_id] = position

    def _asked(self, request: Callable[[], Any], what: str, job_id: str | None = None) -> Any:
        """`what`: in words, what the cluster is to do."""
        try:
            return request()
        except Exception as error:
            if "already exists" in str(error):
                message = (
                    f"the cluster at {self.address} has a job {job_id!r} already, running or ended; choose another --job-id, "
                    "or give none"
                )
            else:
                reason = f"the Ray cluster at {self.address} did not {what}: {_first_line(error)}"
                proxy = proxy_hint(self.address) if isinstance(error, OSError) else ""
                message = f"{reason.rstrip('.')}. {_remedy(error)}{proxy}"
            raise SubmissionError(message) from error


def _remedy(error: Exception) -> str:
    """What to do about a request that failed; Ray has one class for most of what a cluster answers."""
    from ray.exceptions import AuthenticationError

    if isinstance(error, AuthenticationError):
        return "Check the token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token): it must be the head node's."
    if isinstance(error, OSError):  # requests' errors are these, too
        return (
            "Check the address (the dashboard's, such as http://HEAD:8265), and that the head is up and can be reached."
        )
    if "status code 413" in str(error) or "exceeds the maximum size" in str(error):
        return (
            "The folder that travels with the job is too large: exclude what the job does not need (--exclude PATTERN, "
            ".gitignore), or give a smaller --working-dir."
        )
    return "The head node's dashboard.log says more."


def _use_token() -> None:
    """Send a token where there is one: without RAY_AUTH_MODE, Ray's client leaves it at home."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if os.environ.get("RAY_AUTH_TOKEN") or path.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _first_line(error: BaseException) -> str:
    """What an error says, in a line; of a traceback that the cluster sent, the last."""
    lines = [line for line in str(error).splitlines() if line.strip(" .")] or [type(error).__name__]
    return lines[-1 if "Traceback (most recent call last)" in lines[0] else 0].strip()[:300]
