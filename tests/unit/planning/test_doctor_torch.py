"""What the doctor says of torch, collectives and DeepSpeed's native code."""

from __future__ import annotations

import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch

from rlhf_dist.distributed.deepspeed import optimizer
from rlhf_dist.planning.doctor import torch_checks as doctor
from rlhf_dist.planning.doctor.findings import Finding

GIB = 2**30


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A GPU of the given properties, in place of torch's answers about CUDA."""

    def make(major: int, free: int, total: int = 80 * GIB) -> None:
        properties = types.SimpleNamespace(name="H100", major=major, total_memory=total)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
        monkeypatch.setattr(doctor, "_nvidia_smi", lambda: ["H100, 550.54"])

    return make


@pytest.mark.parametrize(
    ("major", "free", "verdict"), [(9, 79 * GIB, "ok"), (9, 20 * GIB, "note"), (7, 79 * GIB, "warning")]
)
def test_gpus(gpu, major: int, free: int, verdict: str):
    gpu(major, free)
    found = by_name(doctor.check_torch())
    assert found["GPU 0"].verdict == verdict
    assert ("precision: fp16, or fp32" in found["GPU 0"].remedy) == (major < 8)
    assert found["driver"].found == "550.54"


def test_gpus_that_torch_does_not_use_are_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: ["H100, 550.54", "H100, 550.54"])
    found = by_name(doctor.check_torch())["GPUs"]
    assert (found.verdict, found.found) == ("error", "2 are here, torch uses none")


def test_a_machine_without_gpus_is_no_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_smi", list)
    assert by_name(doctor.check_torch())["GPUs"].verdict == "note"
    assert {finding.verdict for finding in doctor.check_collectives()} <= {"ok", "note"}


def test_gloo_and_nccl_that_are_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.dist, "is_gloo_available", lambda: False)
    monkeypatch.setattr(doctor.dist, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert {name: f.verdict for name, f in by_name(doctor.check_collectives()).items()} == {
        "gloo": "error",
        "NCCL": "error",
    }


@pytest.mark.parametrize(("flags", "verdict"), [("flags : sse avx512_bf16", "ok"), ("flags : sse avx2", "note")])
def test_bf16_of_the_processor(tmp_path: Path, flags: str, verdict: str):
    (tmp_path / "cpuinfo").write_text(flags, encoding="utf-8")
    assert doctor._cpu_bf16(tmp_path / "cpuinfo").verdict == verdict
    assert doctor._cpu_bf16(tmp_path / "none").verdict == "note"


def test_the_drivers_own_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._nvidia_smi() == []
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H100, 550.54'\n", encoding="utf-8")
    command.chmod(0o755)
    assert doctor._nvidia_smi() == ["NVIDIA H100, 550.54"]
    command.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n", encoding="utf-8")
    assert doctor._nvidia_smi() == []


def test_operations_of_deepspeed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    assert "can be compiled" in by_name(doctor.check_deepspeed())["operation cpu_adam"].found
    lock = optimizer.build_lock("cpu_adam")
    lock.with_name("cpu_adam.so").touch()
    assert by_name(doctor.check_deepspeed())["operation cpu_adam"].found == f"compiled ({lock.parent})"
    lock.touch()
    stuck = by_name(doctor.check_deepspeed())["operation cpu_adam"]
    assert (stuck.verdict, str(lock) in stuck.remedy) == ("warning", True)
    lock.unlink()
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == "ninja" else f"/usr/bin/{name}")
    missing = by_name(doctor.check_deepspeed())["operation cpu_adam"]
    assert (missing.verdict, missing.found) == ("note", "cannot be compiled: ninja missing")


def test_an_interface_that_is_not_there_fails_the_all_reduce(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere7")
    (found,) = doctor.check_all_reduce()
    assert (found.verdict, "GLOO_SOCKET_IFNAME" in found.remedy) == ("error", True)
    assert "nowhere7" in found.found
    assert "ray.network_interface" in found.remedy


def test_processes_that_never_meet_are_ended(monkeypatch: pytest.MonkeyPatch):
    started = []
    real = subprocess.Popen

    def sleeping(command, **options):
        started.append(real([command[0], "-c", "import time; time.sleep(120)"], **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", sleeping)
    monkeypatch.setattr(doctor, "ALL_REDUCE_S", 0.5)
    (found,) = doctor.check_all_reduce()
    assert (found.verdict, "did not meet within 0.5 s" in found.found) == ("error", True)
    assert all(process.wait(timeout=10) != 0 for process in started)
