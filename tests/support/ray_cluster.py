"""A Ray cluster that asks for a token, on this machine: what `ray start --head` gives."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf_dist.distributed.deepspeed.process_group import free_port


@dataclass(frozen=True)
class Cluster:
    """A running head."""

    dashboard: str
    """Address that takes jobs."""
    environment: dict[str, str]
    """In which its token is found."""
    pid: int

    def drivers(self) -> list[psutil.Process]:
        """Running drivers of jobs."""
        found = psutil.Process(self.pid).children(recursive=True)
        return [p for p in found if "rlhf_dist.cli.main" in " ".join(_command_line(p))]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def authenticated_cluster(folder: Path, cpus: int = 4) -> Iterator[Cluster]:
    """A head with a dashboard and a token of its own; all its processes end on leaving. `folder` must have a short path."""
    token = folder / "token"
    token.write_text("e" * 64)
    token.chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    port, dashboard = free_port(), free_port()
    options = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}"]
    options += [f"--num-cpus={cpus}", f"--temp-dir={folder}", f"--object-store-memory={128 * 2**20}"]
    options += ["--disable-usage-stats", "--block", f"--ray-client-server-port={free_port()}"]
    options += [f"--dashboard-agent-listen-port={free_port()}"]  # by default one, that another Ray here may have
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *options],
            env=environment | {"RAY_AUTH_MODE": "token"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    children: list[psutil.Process] = []
    try:
        _wait_for_dashboard(f"http://127.0.0.1:{dashboard}", token.read_text(), head, folder / "head.log")
        children = psutil.Process(head.pid).children(recursive=True)
        yield Cluster(f"http://127.0.0.1:{dashboard}", environment, head.pid)
    finally:
        if head.poll() is None:
            children += psutil.Process(head.pid).children(recursive=True)
            head.kill()
        head.wait()
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(children, timeout=10)


def _wait_for_dashboard(url: str, token: str, head: subprocess.Popen[bytes], log: Path, timeout_s: float = 120) -> None:
    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(request, timeout=5).close()
            return
        if head.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the dashboard at {url} does not answer:\n{log.read_text()}")
        time.sleep(0.3)
