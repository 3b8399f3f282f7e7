"""Ray on one node of a Slurm job: `python -m rlhf_dist.distributed.ray.slurm_node head ADDRESS_FILE | worker HEAD_ADDRESS`.

It runs until its standard input ends, SIGTERM comes, or Ray dies, and leaves neither a process nor a file. `slurm/run.sh`
starts one on each node.

No port is fixed, so that jobs that share a node do not meet: Ray takes free ones, and the head writes down its own. The port
of Ray's client server alone has to be given, which nobody uses here and which cannot be switched off. RLHF_DIST_RAY_ARGUMENTS
has the last word, for sites whose firewall leaves a range open.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from rlhf_dist.core.errors import PlacementError, RlhfDistError
from rlhf_dist.distributed.ray.network import free_port, reachable_address

NODE_LABEL = "slurm-node"
"""Ray label of a node: Slurm's name for it."""
_LONGEST_TEMP_DIR = 40
"""Bytes. Unix sockets lie below it; their paths are 107 bytes at most, of which Ray takes up to 67."""
_STOP_S = 5.0
"""What Ray's processes get between SIGTERM and SIGKILL; Slurm's own KillWait is 30 s by default."""
_PR_SET_CHILD_SUBREAPER = 36


def temp_dir(environment: Mapping[str, str]) -> Path:
    """Ray's folder: this job's and this node's own, on the node.

    Raises:
        PlacementError: its path is too long for sockets.
    """
    parent, job = environment.get("RLHF_DIST_RAY_TMPDIR", "/tmp"), environment["SLURM_JOB_ID"]
    # The name says more; the number is shorter.
    paths = [Path(parent) / f"rlhf-{job}-{environment[name]}" for name in ("SLURMD_NODENAME", "SLURM_NODEID")]
    for path in paths:
        if len(os.fsencode(path)) <= _LONGEST_TEMP_DIR:
            return path
    raise PlacementError(
        f"Ray's folder would be {paths[-1]}, but its path may have {_LONGEST_TEMP_DIR} bytes at most; set RLHF_DIST_RAY_TMPDIR "
        "to a shorter local folder"
    )


def ray_command(role: str, head: str, folder: Path, environment: Mapping[str, str]) -> list[str]:
    """The `ray start` line. `head`: HOST:PORT, for a worker. CPUs and GPUs are those that Slurm gave the job on this node."""
    interface = environment.get("RLHF_DIST_INTERFACE") or None
    towards = head.rpartition(":")[0] if role == "worker" else None
    name = environment["SLURMD_NODENAME"]
    options = {
        "node-name": name,
        "labels": f"{NODE_LABEL}={name}",
        "node-ip-address": reachable_address(interface, towards),
        "temp-dir": str(folder),
        "num-cpus": environment["SLURM_CPUS_ON_NODE"],
        "num-gpus": environment.get("SLURM_GPUS_ON_NODE", "0"),
        # 0: a free one each. Ray's own choices are 10002 to 19999 and 52365, on every node and for every job.
        "min-worker-port": "0",
        "max-worker-port": "0",
        "dashboard-agent-listen-port": "0",
    }
    if role == "head":
        options |= {"port": "0", "include-dashboard": "false"}
        options["ray-client-server-port"] = str(free_port(int(environment["SLURM_JOB_ID"])))
    else:
        options["address"] = head
    # A module of this interpreter: its `ray` may not be the first on the PATH.
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += ["--head"] if role == "head" else []
    command += [f"--{option}={value}" for option, value in options.items()]
    return command + shlex.split(environment.get("RLHF_DIST_RAY_ARGUMENTS", ""))


def run(role: str, head: str) -> None:
    """Start Ray, wait for the end, and clean up. `head`: for a worker, the head's HOST:PORT; for the head, the file that it
    writes its own to.

    Raises:
        PlacementError: Ray did not start, or died; its last words are in the message.
    """
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped.append(number))
    # What Ray's processes leave behind when they die becomes a child of this one, and is ended with it.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    folder = temp_dir(os.environ)
    shutil.rmtree(folder, ignore_errors=True)  # left behind by an earlier start of this job that was killed
    folder.mkdir(mode=0o700)
    log = folder / "start.log"
    try:
        with log.open("wb") as output:
            ray = subprocess.Popen(
                ray_command(role, head, folder, os.environ), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        published = role == "worker"
        while not stopped and not _input_ended() and ray.poll() is None:
            published = published or _publish(folder, Path(head))
        if not stopped and ray.poll() is not None:
            last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
            name = os.environ["SLURMD_NODENAME"]
            raise PlacementError(f"Ray ended on {name} with exit code {ray.returncode}; its last words:\n{last}")
    finally:
        _end_children()
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> bool:
    """Copy the address that the head took to `target`, once it has one."""
    with contextlib.suppress(FileNotFoundError):
        address = (folder / "ray_current_cluster").read_text(encoding="utf-8").strip()
        if address:
            part = target.with_name(f"{target.name}.part")
            part.write_text(address, encoding="utf-8")
            part.rename(target)
            return True
    return False


def _input_ended(wait_s: float = 0.5) -> bool:
    """Whether standard input is at its end; waits a little for it. A signal ends the wait."""
    readable = select.select([sys.stdin], [], [], wait_s)[0]
    return bool(readable) and not os.read(sys.stdin.fileno(), 4096)


def _end_children() -> None:
    """End all descendants, the orphans that came to this process included."""
    me = psutil.Process()
    for child in me.children():  # `ray start` takes its own processes down in order
        with contextlib.suppress(psutil.Error):
            child.terminate()
    deadline = time.monotonic() + _STOP_S
    while (left := me.children(recursive=True)) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=0.2)
        _reap()
    while left := me.children(recursive=True):
        for child in left:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(left, timeout=1)
        _reap()


def _reap() -> None:
    """Collect orphans that ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def exit_code_of(action: Callable[[], None]) -> int:
    """Do it; returns the exit code of the process. What the user is to fix is told in one line, as `rlhf-dist` does."""
    try:
        action()
    except RlhfDistError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_dist.distributed.ray.slurm_node", description=__doc__)
    parser.add_argument("role", choices=["head", "worker"])
    parser.add_argument(
        "head", help="of a head, the file that its address is written to; of a worker, the head's HOST:PORT"
    )
    options = parser.parse_args(arguments)
    return exit_code_of(lambda: run(options.role, options.head))


if __name__ == "__main__":
    sys.exit(main())
