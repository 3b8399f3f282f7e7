"""What this machine offers a run: disk, shared memory, limits, network. Each check returns findings and changes nothing."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rlhf_dist.planning.doctor.findings import Finding, Verdict, gib, lowest_is

LEAST_DISK, LOW_DISK = 2**30, 10 * 2**30
"""Bytes below which a run cannot work, or may fill the disk."""
RAY_DISK_LIMIT = 0.95
"""Ray writes no object to a disk that is fuller."""
RAY_STORE_SHARE = 0.3
"""Of the machine's memory, for Ray's object store."""
OPEN_FILES = 65536
"""Descriptors that a node's Ray, with its actors and their sockets, may need."""


def check_disk() -> Sequence[Finding]:
    """Free space where runs, Ray and the hub write, and shared memory."""
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    places = {
        "disk of the current folder": Path.cwd(),
        "disk of Ray's files": Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()),
        "disk of the hub's cache": Path(hub),
    }
    found = [_disk(name, path) for name, path in places.items()]
    if not os.access(Path.cwd(), os.W_OK):
        remedy = "run_dir must be a path that can be written to"
        found.append(Finding("warning", "current folder", f"{Path.cwd()} cannot be written to", remedy))
    return [*found, check_shared_memory(Path("/dev/shm"), memory_bytes())]


def _disk(name: str, path: Path) -> Finding:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    usage = shutil.disk_usage(existing)
    verdict: Verdict = lowest_is(LOW_DISK, usage.free, "warning" if usage.free >= LEAST_DISK else "error")
    remedy = "" if verdict == "ok" else "free some, or set a folder elsewhere (run_dir, RAY_TMPDIR, HF_HOME)"
    if verdict == "ok" and "Ray" in name and 1 - usage.free / usage.total > RAY_DISK_LIMIT:
        verdict, remedy = "warning", "Ray writes no objects to a disk over 95 % full: set RAY_TMPDIR to another"
    return Finding(verdict, name, f"{gib(usage.free)} of {gib(usage.total)} free at {path}", remedy)


def check_shared_memory(path: Path, memory: int) -> Finding:
    """Ray's object store takes 30 % of `memory` (bytes) there."""
    if not path.is_dir():
        remedy = "mount a tmpfs there; without it Ray keeps objects on disk, many times slower"
        return Finding("warning", "shared memory", f"there is no {path}", remedy)
    total, wanted = shutil.disk_usage(path).total, RAY_STORE_SHARE * memory
    verdict = lowest_is(wanted, total, "warning")
    raise_it = (
        "raise it (containers: --shm-size, or --ipc=host), or start Ray with a smaller --object-store-memory: else it "
        "keeps objects under /tmp, many times slower"
    )
    remedy = "" if verdict == "ok" else raise_it
    return Finding(verdict, "shared memory", f"{gib(total)} at {path}; Ray wants {gib(wanted)} of it", remedy)


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_limits() -> Sequence[Finding]:
    """Limits of the shell, which all processes of a run inherit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    enough = soft == unlimited or soft >= OPEN_FILES
    raisable = hard == unlimited or hard >= OPEN_FILES
    remedy = f"ulimit -n {OPEN_FILES}" + ("" if raisable else " (by an administrator: the hard limit is lower)")
    found = [Finding("ok" if enough else "warning", "open files", _limit(soft), "" if enough else remedy)]
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = _limit(locked, of_bytes=True)
    if locked == unlimited or not _has_infiniband():
        found.append(Finding("ok", "locked memory", shown))
    else:
        remedy = "ulimit -l unlimited: RDMA (NCCL over InfiniBand) and pin_memory lock memory"
        found.append(Finding("warning", "locked memory", f"{shown}, and there is InfiniBand", remedy))
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    shown = _limit(core, of_bytes=True)
    remedy = "ulimit -c 0, unless you want them: a crashed rank would write all of its memory to disk"
    found.append(Finding("ok" if core == 0 else "note", "core dumps", shown, "" if core == 0 else remedy))
    return found


def _limit(value: int, *, of_bytes: bool = False) -> str:
    if value == resource.RLIM_INFINITY:
        return "unlimited"
    return f"{value / 2**20:.3g} MiB" if of_bytes else str(value)


def _has_infiniband() -> bool:
    folder = Path("/sys/class/infiniband")
    return folder.is_dir() and any(folder.iterdir())


def check_network() -> Sequence[Finding]:
    """The machine's name, and the interfaces that the collectives were told to use."""
    return [check_host_name(), *check_interfaces([name for _, name in socket.if_nameindex()])]


def check_host_name() -> Finding:
    """What the host's name means. A run gives gloo and NCCL the interface of the address by which Ray knows the node, so that
    it matters only where Ray took that address from the name."""
    name = socket.gethostname()
    remedy = (
        "look whether Ray knows this node by an address that other nodes reach (ray list nodes); if not, start it with "
        "--node-ip-address ADDRESS, or add the name to /etc/hosts with such an address"
    )
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError as error:
        verdict: Verdict = "note" if os.environ.get("GLOO_SOCKET_IFNAME") else "warning"
        return Finding(verdict, "host name", f"{name} means nothing here ({error.strerror or error})", remedy)
    loopback = all(address.startswith("127.") or address == "::1" for address in addresses)
    if loopback and not os.environ.get("GLOO_SOCKET_IFNAME"):
        said = f"{name} is {', '.join(addresses)}, which other nodes cannot reach"
        return Finding("note", "host name", said, f"for runs over several nodes: {remedy}")
    return Finding("ok", "host name", f"{name} is {', '.join(addresses)}")


def check_interfaces(existing: Sequence[str]) -> Sequence[Finding]:
    """GLOO_SOCKET_IFNAME names interfaces; NCCL_SOCKET_IFNAME prefixes of them, whole names after `=`, others after `^`."""
    others = [name for name in existing if name != "lo"]
    verdict: Verdict = "ok" if others else "warning"
    remedy = "" if others else "without a network only one machine can take part"
    found = [Finding(verdict, "interfaces", ", ".join(existing) or "none", remedy)]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = os.environ.get(variable)
        if not value:
            continue
        exact = variable == "GLOO_SOCKET_IFNAME" or value.startswith(("=", "^="))
        wanted = value.lstrip("^=").split(",")
        matched = [name for name in existing if any(name == w if exact else name.startswith(w) for w in wanted)]
        chosen = [name for name in existing if name not in matched] if value.startswith("^") else matched
        if chosen:
            found.append(Finding("ok", variable, f"{value}: {', '.join(chosen)}"))
        else:
            remedy = f"set it to one of {', '.join(existing)}, or unset it"
            found.append(Finding("error", variable, f"{value}: there is no such interface here", remedy))
    return found
