"""Two hosts on one machine: network namespaces with addresses of their own, joined by a cable (a veth pair).

What reaches the other only through a loopback address, or by the name of the machine, fails between them as it does between two
machines. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Host:
    """A network namespace."""

    name: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """`arguments` as a command that runs there."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def processes(self) -> list[psutil.Process]:
        """All that run there."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        processes = []
        for pid in found.stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                processes.append(psutil.Process(int(pid)))
        return processes

    def die(self) -> None:
        """End all processes at once, as a power failure does."""
        while found := self.processes():
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(found, timeout=10)


def why_not() -> str | None:
    """Why this machine cannot have hosts, or None."""
    if shutil.which("ip") is None:
        return "iproute2 (the command ip) is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"rd-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"this machine allows no network namespaces ({made.stderr.strip()})"
    subprocess.run(["ip", "netns", "delete", name], check=False)
    return None


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nothing else; on leaving, their processes and they are gone."""
    number = os.getpid()
    hosts = Host(f"rd-a-{number}", "10.77.0.1"), Host(f"rd-b-{number}", "10.77.0.2")
    cables = f"rda{number}", f"rdb{number}"
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for host, cable in zip(hosts, cables, strict=True):
            _ip("link", "set", cable, "netns", host.name)
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", cable)
            _ip("-n", host.name, "link", "set", cable, "up")
        yield hosts
    finally:
        for host in hosts:
            host.die()
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def ray_on(hosts: Sequence[Host], port: int = 6399, cpus: int = 6) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray cluster with its head on the first host, one node a host, with a token of its own. Yields the head's address and
    the environment that reaches it."""
    with tempfile.TemporaryDirectory(prefix="rd", dir="/tmp") as folder:  # short: Ray puts sockets below it
        token = Path(folder) / "token"
        token.write_text("f" * 64)
        token.chmod(0o600)
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        environment.pop("RAY_ADDRESS", None)
        address = f"{hosts[0].address}:{port}"
        nodes: list[subprocess.Popen[Any]] = []
        try:
            for index, host in enumerate(hosts):
                role = [f"--address={address}"] if index else ["--head", f"--port={port}", "--include-dashboard=false"]
                nodes.append(_start_node(host, Path(folder) / str(index), role, cpus, environment))
                _wait_for_nodes(hosts[0], address, len(nodes), nodes, Path(folder), environment)
            yield address, environment
        finally:
            for host in hosts:
                host.die()
            for node in nodes:
                node.wait()


def _start_node(
    host: Host, folder: Path, role: list[str], cpus: int, environment: Mapping[str, str]
) -> subprocess.Popen[Any]:
    options = [f"--node-ip-address={host.address}", f"--num-cpus={cpus}", f"--temp-dir={folder}", "--block"]
    options += ["--disable-usage-stats", f"--object-store-memory={128 * 2**20}"]
    with Path(f"{folder}.log").open("wb") as log:
        return subprocess.Popen(
            host.command("ray", "start", *role, *options), env=environment, stdout=log, stderr=subprocess.STDOUT
        )


_COUNT = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="CRITICAL")
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]))
"""


def _wait_for_nodes(
    head: Host,
    address: str,
    number: int,
    nodes: Sequence[subprocess.Popen[Any]],
    folder: Path,
    environment: Mapping[str, str],
    timeout_s: float = 180,
) -> None:
    """Until the cluster has `number` nodes; a node that ended, or is late, is an error with all logs."""
    deadline = time.monotonic() + timeout_s
    count = head.command(sys.executable, "-c", _COUNT, address, str(number))
    while True:
        ended = any(node.poll() is not None for node in nodes)
        if ended or time.monotonic() > deadline:
            logs = "\n".join(f"{log}:\n{log.read_text()}" for log in sorted(folder.glob("*.log")))
            raise RuntimeError(f"the cluster did not come to {number} nodes within {timeout_s:g} s\n{logs}")
        # A driver that connects while the head is still starting may wait for ever: each try has a limit.
        with contextlib.suppress(subprocess.TimeoutExpired):
            if subprocess.run(count, env=environment, capture_output=True, check=False, timeout=30).returncode == 0:
                return
