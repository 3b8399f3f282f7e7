"""Whether Ray can be used here: its tokens, its address, and (on request) whether a private one starts."""

from __future__ import annotations

import ipaddress
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_dist.planning.doctor.findings import Finding

START_S = 120
"""Longest wait for a private Ray."""
GENERATE = "ray get-auth-token --generate"


def check_token() -> Sequence[Finding]:
    """How Ray decides who may run code on a cluster, and whether the token is there and private."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode.lower() == "disabled":
        remedy = "unset RAY_AUTH_MODE, or set it to token: whoever reaches the cluster's ports can run code on it"
        return [Finding("warning", "Ray token", "RAY_AUTH_MODE=disabled: no token is asked for", remedy)]
    if mode and mode.lower() not in ("token", "k8s"):
        return [Finding("error", "Ray token", f"RAY_AUTH_MODE={mode} is unknown to Ray", "set it to token")]
    shown = f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE is not set"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return [Finding("ok", "Ray token", f"{shown}, token in RAY_AUTH_TOKEN")]
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if not file.is_file():
        if named:
            remedy = f"correct the path, or unset it and run `{GENERATE}`"
            return [Finding("error", "Ray token", f"RAY_AUTH_TOKEN_PATH={file} is no file", remedy)]
        remedy = f"a private Ray makes one itself; for a cluster run `{GENERATE}`, and carry the file to every node"
        return [Finding("note", "Ray token", f"{shown}, no token yet", remedy)]
    if not os.access(file, os.R_OK):
        return [Finding("error", "Ray token", f"{file} cannot be read", f"chown it to yourself, and chmod 600 {file}")]
    permissions = stat.S_IMODE(file.stat().st_mode)
    if permissions & 0o077:
        said = f"{file} can be read or changed by others (mode {permissions:o})"
        return [Finding("warning", "Ray token", said, f"chmod 600 {file}")]
    if not file.read_text(encoding="utf-8", errors="replace").strip():
        return [Finding("error", "Ray token", f"{file} is empty", f"remove it and run `{GENERATE}`")]
    return [Finding("ok", "Ray token", f"{shown}, token in {file} (mode {permissions:o})")]


def check_address() -> Sequence[Finding]:
    """The address under which other nodes would know this one."""
    import ray

    address = ray.util.get_node_ip_address()
    found = []
    if ipaddress.ip_address(address).is_loopback:
        remedy = "for several nodes: ray start --node-ip-address with an address that they reach"
        found.append(Finding("note", "Ray address", f"{address}, which other nodes cannot reach", remedy))
    else:
        found.append(Finding("ok", "Ray address", address))
    joined = os.environ.get("RAY_ADDRESS")
    if joined:
        remedy = "ray.address: auto joins it; ray.address: null starts a private Ray all the same"
        found.append(Finding("note", "RAY_ADDRESS", joined, remedy))
    return found


def check_private_ray() -> Sequence[Finding]:
    """Start a private Ray in a process of its own, run one task on it, and stop it."""
    program = "from rlhf_dist.planning.doctor.ray_checks import start_and_stop; start_and_stop()"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    remedy = "look at the logs in /tmp/ray/session_latest/logs; a full disk and a small /dev/shm are the usual reasons"
    try:
        output, errors = process.communicate(timeout=START_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # Ray's own processes end when their driver does
        process.wait()
        return [Finding("error", "private Ray", f"did not start within {START_S} s", remedy)]
    if process.returncode == 0 and output.strip().endswith("a task ran"):
        return [Finding("ok", "private Ray", "started, ran a task, stopped")]
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), f"exit code {process.returncode}")
    return [Finding("error", "private Ray", last.strip(), remedy)]


def start_and_stop() -> None:
    """What the other process does."""
    import ray

    from rlhf_dist.config.hosting import RayConfig
    from rlhf_dist.distributed.ray.session import RaySession

    session = RaySession(RayConfig(), "cpu")
    try:
        session._connect()
        value = ray.get(ray.remote(lambda: "a task ran").options(num_cpus=0).remote(), timeout=START_S)
    finally:
        session.close()
    print(value, flush=True)
