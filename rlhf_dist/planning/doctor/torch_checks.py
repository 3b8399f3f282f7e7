"""What torch, its collectives and DeepSpeed's native code can do on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rlhf_dist.distributed.deepspeed.process_group import free_port
from rlhf_dist.planning.doctor.findings import Finding, Verdict, gib

ALL_REDUCE_S = 90
"""Longest wait for two processes that import torch and add two numbers."""


def check_torch() -> Sequence[Finding]:
    """torch's build, the GPUs it sees, and bf16."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    found = [Finding("ok", "torch", f"{torch.__version__}, {build}")]
    driver = _nvidia_smi()
    if torch.cuda.is_available():
        found += [_gpu(i) for i in range(torch.cuda.device_count())]
        if driver:
            found.append(Finding("ok", "driver", driver[0].split(",")[1].strip()))
    elif driver:
        remedy = f"install a torch that is built for CUDA and for driver {driver[0].split(',')[1].strip()}"
        if torch.version.cuda:
            remedy = "update the driver, or install a torch for an older CUDA; look at CUDA_VISIBLE_DEVICES"
        found.append(Finding("error", "GPUs", f"{len(driver)} are here, torch uses none", remedy))
    else:
        found.append(
            Finding("note", "GPUs", "none; roles run on CPUs", "device: auto or cpu; models of the quickstart's size")
        )
        found.append(_cpu_bf16(Path("/proc/cpuinfo")))
    return found


def _gpu(index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    said = f"{properties.name}, {gib(free)} of {gib(total)} free"
    if properties.major < 8:
        remedy = "precision: fp16, or fp32 (bf16 is emulated, and slow, before compute capability 8.0)"
        return Finding("warning", f"GPU {index}", f"{said}, no bf16", remedy)
    if free < 0.9 * total:
        return Finding("note", f"GPU {index}", f"{said}, bf16", "another process uses it: see nvidia-smi")
    return Finding("ok", f"GPU {index}", f"{said}, bf16")


def _cpu_bf16(cpuinfo: Path) -> Finding:
    """Whether this processor multiplies in bf16 itself."""
    try:
        flags = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        flags = ""
    if any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16")):
        return Finding("ok", "bf16 on the CPU", "by its own instructions")
    return Finding("note", "bf16 on the CPU", "emulated", "precision: fp32 is faster here")


def check_collectives() -> Sequence[Finding]:
    """The libraries through which ranks of a role talk."""
    found = []
    if dist.is_available() and dist.is_gloo_available():
        found.append(Finding("ok", "gloo", "available (ranks on CPUs)"))
    else:
        found.append(Finding("error", "gloo", "torch is built without it", "install a usual build of torch"))
    if dist.is_nccl_available():
        from torch.cuda import nccl  # no attribute of torch.cuda until it is imported

        version = nccl.version()
        shown = ".".join(map(str, version)) if isinstance(version, tuple) else str(version)
        found.append(Finding("ok", "NCCL", f"{shown} (ranks on GPUs)"))
    else:
        verdict: Verdict = "error" if torch.cuda.is_available() else "note"
        remedy = "install a torch with NCCL" if verdict == "error" else "only ranks on GPUs need it"
        found.append(Finding(verdict, "NCCL", "torch is built without it", remedy))
    return found


def check_all_reduce() -> Sequence[Finding]:
    """Two real processes add two numbers with gloo, over the interface or address that it takes on this machine."""
    program = "import sys; from rlhf_dist.planning.doctor.torch_checks import add_two; add_two(*map(int, sys.argv[1:]))"
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    remedy = (
        "unset GLOO_SOCKET_IFNAME (a run then takes the interface of the address by which Ray knows the node, or "
        "ray.network_interface), or set it to an interface of this machine"
    )
    try:
        said = [rank.communicate(timeout=ALL_REDUCE_S) for rank in ranks]
    except subprocess.TimeoutExpired:
        return [Finding("error", "gloo all-reduce", f"two processes did not meet within {ALL_REDUCE_S} s", remedy)]
    finally:
        for rank in ranks:
            rank.kill()
    if all(output.strip().endswith("sum 3") for output, _ in said):
        return [Finding("ok", "gloo all-reduce", "two processes added two numbers")]
    last = next((line for _, errors in said for line in reversed(errors.splitlines()) if line.strip()), "no output")
    return [Finding("error", "gloo all-reduce", last.strip(), remedy)]


def add_two(rank: int, port: int) -> None:
    """One of the two processes."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=ALL_REDUCE_S)
    )
    value = torch.tensor(float(rank + 1))
    dist.all_reduce(value)
    print(f"sum {value:g}", flush=True)
    dist.destroy_process_group()


def check_deepspeed() -> Sequence[Finding]:
    """Whether DeepSpeed can be imported, and whether the native code that some of `ds_configs/` need can be compiled."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # What it prints on import would be in the report.
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        import deepspeed
        from deepspeed.git_version_info import installed_ops
    built = sorted(name for name, there in installed_ops.items() if there)
    said = f"{deepspeed.__version__}, {', '.join(built) or 'no operations'} compiled at its installation"
    found = [Finding("ok", "DeepSpeed", said)]
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    ninja = shutil.which("ninja")
    found.append(_op("cpu_adam", {"a C++ compiler (g++)": compiler, "ninja": ninja}, "offload to CPU memory", built))
    if torch.version.cuda:
        nvcc = shutil.which("nvcc") or shutil.which(
            "nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
        )
        needs = {"a C++ compiler (g++)": compiler, "ninja": ninja, f"nvcc of CUDA {torch.version.cuda}": nvcc}
        found.append(_op("quantizer", needs, "zero_quantized_weights", built))
    return found


def _op(name: str, needs: dict[str, str | None], used_by: str, built: Sequence[str]) -> Finding:
    """An operation that DeepSpeed compiles when it is first needed."""
    from rlhf_dist.distributed.deepspeed.optimizer import build_lock

    lock = build_lock(name)
    label = f"operation {name}"
    if name in built:
        return Finding("ok", label, "compiled at DeepSpeed's installation")
    if lock.exists():
        remedy = f"if nothing compiles now, remove {lock}: torch would wait for it for ever"
        return Finding("warning", label, "is being compiled, or a compilation was killed", remedy)
    missing = [need for need, path in needs.items() if path is None]
    if missing:
        said = f"cannot be compiled: {', '.join(missing)} missing"
        return Finding("note", label, said, f"install what is missing where you want {used_by}")
    if lock.with_name(f"{name}.so").exists():
        return Finding("ok", label, f"compiled ({lock.parent})")
    return Finding("ok", label, "can be compiled; that takes a minute or two at its first use")


def _nvidia_smi() -> list[str]:
    """`name, driver` of every GPU that the driver knows; [] without one."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=15,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if "," in line]
