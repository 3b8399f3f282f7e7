"""A real two-node Slurm on this one machine, in a folder of its own: Debian's slurm-wlm and munge.

    python tests/support/slurm_cluster.py install       # apt-get install slurm-wlm munge; needs root
    python tests/support/slurm_cluster.py start DIR     # prints the line that makes sbatch & co. talk to it
    python tests/support/slurm_cluster.py stop DIR

Everything is the cluster's own: munge key and socket, ports, state, logs. A Slurm that the machine runs for other ends is not
touched. The nodes n1 and n2 (partition `main`) and n3 (partition `spare`) are three slurmd processes that claim more CPUs
than the machine has, so that jobs on two nodes run on two cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

NODES = ("n1", "n2")
SPARE = "n3"
CPUS_PER_NODE = 16
KILL_WAIT_S = 20
"""What a job has between SIGTERM and SIGKILL."""
DAEMONS = ("munged", "slurmctld", "slurmd")

_CONF = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
# Heterogeneous jobs are started by the backfill scheduler only.
SchedulerParameters=bf_interval=1
# The machine has fewer CPUs than its nodes claim.
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
ReturnToService=2
KillWait={kill_wait}
SlurmctldTimeout=30
# Long: a node whose slurmd was ended stays "up" for the test that gets it allocated.
SlurmdTimeout=600
MessageTimeout=20
MinJobAge=3600
NodeName=n1 NodeHostname={host} NodeAddr={address} Port={ports[1]} CPUs={cpus} Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr={address} Port={ports[2]} CPUs={cpus} Gres=gpu:2
NodeName=n3 NodeHostname={host} NodeAddr={address} Port={ports[3]} CPUs={cpus}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=spare Nodes=n1,n2,n3 MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> list[str]:
    """What this machine lacks to run it, in words; empty where it can."""
    absent = [name for name in (*DAEMONS, "sbatch") if _which(name) is None]
    return [*(f"{name} is not installed" for name in absent), *(["it needs root"] if os.geteuid() != 0 else [])]


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def install() -> None:
    """Install Debian's packages, where they are missing. The services that come with them are not needed."""
    if not missing():
        return
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for arguments in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        subprocess.run(["apt-get", *arguments], check=True, env=environment)


class SlurmCluster:
    """The daemons of one cluster, and the commands that talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pids_path = folder / "pids.json"
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        # A test that runs inside somebody's Slurm job must not pass that job on.
        for name in [n for n in self.environment if n.startswith(("SLURM_", "SBATCH_", "SRUN_")) and n != "SLURM_CONF"]:
            del self.environment[name]

    def start(self) -> None:
        """Start munged, slurmctld and the three slurmd; returns when all nodes are idle."""
        reasons = missing()
        if reasons:
            raise RuntimeError(f"cannot run a Slurm here: {'; '.join(reasons)}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # munged rejects a socket in a folder that others cannot enter
        (self.folder / "state").mkdir(exist_ok=True)
        host, address = socket.gethostname().partition(".")[0], "127.0.0.1"
        conf = _CONF.format(
            folder=self.folder,
            host=host,
            address=address,
            ports=_free_ports(4),
            cpus=CPUS_PER_NODE,
            kill_wait=KILL_WAIT_S,
        )
        (self.folder / "slurm.conf").write_text(conf, encoding="utf-8")
        # Not GPUs, but Slurm hands them out and says how many a job has.
        devices = [f"NodeName=n[1-2] Name=gpu File={device}\n" for device in ("/dev/null", "/dev/zero")]
        (self.folder / "gres.conf").write_text("".join(devices), encoding="utf-8")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {"socket": "munge.socket", "key-file": key.name, "pid-file": "munged.pid", "log-file": "munged.log"}
        files["seed-file"] = "munged.seed"
        self._spawn("munged", "--foreground", *(f"--{name}={self.folder / file}" for name, file in files.items()))
        _wait_until((self.folder / "munge.socket").exists, 20, "munged")
        self._spawn("slurmctld", "-D")
        for node in (*NODES, SPARE):
            self.start_node(node)
        self.wait_idle(*NODES, SPARE)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self._spawn("slurmd", "-D", "-N", node, name=f"slurmd-{node}")

    def end_node(self, node: str) -> None:
        """Its slurmd dies, unseen by the controller: the node is still given to jobs."""
        _end([self._pids().pop(f"slurmd-{node}")], signal.SIGKILL)

    def revive_node(self, node: str) -> None:
        """Bring a node back after `end_node`."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        self.start_node(node)
        self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        self.wait_idle(node)

    def wait_idle(self, *nodes: str, timeout_s: float = 60) -> None:
        """Until the nodes have nothing to do."""

        def idle() -> bool:
            # `-N`: one line a node, not a line a state.
            lines = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).split("\n")
            states = dict(line.split() for line in lines if line.strip())
            return all(states.get(node) == "idle" for node in nodes)

        _wait_until(idle, timeout_s, f"idle nodes {', '.join(nodes)}")

    def run(self, *command: str, check: bool = True) -> str:
        """A command against this cluster; its standard output. Slurm's commands die of SIGPIPE where a busy slurmctld closes a
        connection; a question is asked again."""
        tries = 5 if command[0] in ("scontrol", "sinfo", "squeue", "sacct") and "requeue" not in command else 1
        for _ in range(tries):
            done = subprocess.run(
                command, env=self.environment, capture_output=True, text=True, timeout=120, check=False, cwd=self.folder
            )
            if done.returncode != -signal.SIGPIPE:
                break
            time.sleep(1)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def stop(self) -> None:
        """Cancel all jobs, then end the daemons and whatever steps outlived them."""
        if not self._pids_path.exists():
            return
        self.run("scancel", "--user=root", check=False)
        with contextlib.suppress(TimeoutError):
            _wait_until(lambda: not self.run("squeue", "-h", check=False).strip(), KILL_WAIT_S + 20, "an empty queue")
        _end(list(self._pids().values()), signal.SIGTERM)
        _end([p.pid for p in psutil.process_iter(["name"]) if p.info["name"] == "slurmstepd" and self._owns(p)])
        self._pids_path.unlink()

    def _owns(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
        return False

    def _spawn(self, program: str, *arguments: str, name: str | None = None) -> None:
        path = _which(program)
        assert path is not None
        with (self.folder / f"{name or program}.out").open("ab") as output:
            process = subprocess.Popen(
                [path, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        pids = (self._pids() if self._pids_path.exists() else {}) | {name or program: process.pid}
        self._pids_path.write_text(json.dumps(pids), encoding="utf-8")

    def _pids(self) -> dict[str, int]:
        return json.loads(self._pids_path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def running(folder: Path) -> Iterator[SlurmCluster]:
    """A cluster for the length of a block."""
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def _wait_until(true: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.2)


def _end(pids: list[int], first: signal.Signals = signal.SIGTERM) -> None:
    """Signal processes by id, kill those that stay, and collect the children among them."""
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            process.send_signal(first)
            processes.append(process)
    for process in psutil.wait_procs(processes, timeout=15)[1]:
        process.kill()
    psutil.wait_procs(processes, timeout=5)


def main(arguments: list[str]) -> None:
    """See the module's text."""
    if arguments == ["install"]:
        install()
    elif len(arguments) == 2 and arguments[0] in ("start", "stop"):
        cluster = SlurmCluster(Path(arguments[1]).absolute())
        getattr(cluster, arguments[0])()
        if arguments[0] == "start":
            print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
