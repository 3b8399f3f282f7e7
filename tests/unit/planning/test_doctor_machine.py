"""The doctor's checks of packages, disk, limits, network and Slurm, in environments that are made for each verdict."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import socket
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from rlhf_dist.planning.doctor import environment as doctor
from rlhf_dist.planning.doctor import machine
from rlhf_dist.planning.doctor.findings import Finding

Usage = namedtuple("Usage", "total used free")
GIB = 2**30


def one(findings, name: str) -> Finding:
    """The finding of that name."""
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def script(folder: Path, name: str, text: str) -> None:
    """A command on a PATH of its own."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    file.chmod(0o755)


# -- packages ------------------------------------------------------------------------------------------------------------


def test_packages_are_held_against_the_ranges_of_this_one(monkeypatch: pytest.MonkeyPatch):
    versions = {"rlhf-dist": "0.1.0", "torch": "2.13.0+cpu", "ray": "1.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    wanted = ["torch<2.14,>=2.6", "ray[default]<3,>=2.50", "wandb>=0.19", 'pytest>=8; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
    monkeypatch.setattr(importlib.metadata, "version", version)
    found = doctor.check_packages()
    assert [(f.name, f.verdict) for f in found] == [
        ("rlhf-dist", "ok"),
        ("torch", "ok"),
        ("ray", "error"),
        ("wandb", "error"),
    ]
    assert "1.0, outside <3,>=2.50" in one(found, "ray").found
    assert one(found, "ray").remedy == "pip install 'ray[default]<3,>=2.50'"
    assert one(found, "wandb").found == "is not installed"


def test_every_requirement_of_this_installation_is_looked_at():
    found = {finding.name: finding for finding in doctor.check_packages()}
    assert {"torch", "deepspeed", "ray", "transformers", "pydantic"} <= found.keys()
    assert found["deepspeed"].found.startswith(importlib.metadata.version("deepspeed"))


def test_without_an_installation_there_are_no_ranges(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "DISTRIBUTION", "a-package-that-nobody-has-installed")
    (found,) = doctor.check_packages()
    assert (found.verdict, "pip install -e ." in found.remedy) == ("warning", True)


def test_a_helper_built_for_another_torch_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name, text in (
        ("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')"),
        ("torchaudio", ""),
    ):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1" if name in ("torchvision", "torchaudio") else None)
    found = doctor.check_vllm()
    assert one(found, "torchvision").verdict == "error"
    assert "pip uninstall torchvision" in one(found, "torchvision").remedy
    assert one(found, "torchaudio").verdict == "ok"
    assert one(found, "vLLM").verdict == "note"


# -- commands, clock, hub ------------------------------------------------------------------------------------------------


def test_a_command_that_hangs_fails_or_is_missing_says_nothing(tmp_path: Path):
    script(tmp_path, "fails", "echo half; exit 3")
    assert doctor.command_output(str(tmp_path / "fails")) is None
    assert doctor.command_output(str(tmp_path / "none")) is None
    assert doctor.command_output(sys.executable, "-c", "import time; time.sleep(60)", timeout_s=0.3) is None
    assert doctor.command_output("echo", " fine ") == "fine"


def test_a_clock_before_the_installation_is_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.time, "time", lambda: 86400.0)
    (found,) = doctor.check_clock()
    assert (found.verdict, found.found[:10]) == ("warning", "1970-01-02")


@pytest.mark.parametrize(("said", "verdict"), [("no", "note"), ("yes", "ok"), (None, "ok")])
def test_clocks_that_drift_are_noted(monkeypatch: pytest.MonkeyPatch, said: str | None, verdict: str):
    monkeypatch.setattr(doctor, "command_output", lambda *_: said)
    (found,) = doctor.check_clock()
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"hub": "ok"}),
        ({"HF_HUB_OFFLINE": "1"}, {"hub": "note"}),
        ({"http_proxy": "http://proxy:1"}, {"hub": "ok", "proxy": "warning"}),
        ({"http_proxy": "http://proxy:1", "no_proxy": "10.0.0.0/8"}, {"hub": "ok"}),
    ],
)
def test_hub(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: dict[str, str]):
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert {finding.name: finding.verdict for finding in doctor.check_hub()} == expected


def test_a_token_of_the_hub_is_never_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "a token" in doctor.check_hub()[0].found
    assert "hf_secret" not in str(doctor.check_hub())


# -- disk and memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "verdict"),
    [
        (Usage(1000 * GIB, 500 * GIB, 500 * GIB), "ok"),
        (Usage(1000 * GIB, 995 * GIB, 5 * GIB), "warning"),
        (Usage(1000 * GIB, 1000 * GIB, GIB // 2), "error"),
    ],
)
def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, usage: Usage, verdict: str):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "made" / "yet"))
    found = machine.check_disk()
    for name in ("disk of the current folder", "disk of Ray's files", "disk of the hub's cache"):
        assert one(found, name).verdict == verdict


def test_ray_writes_nothing_to_a_disk_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000 * GIB, 970 * GIB, 30 * GIB))
    found = machine.check_disk()
    assert one(found, "disk of Ray's files").verdict == "warning"
    assert "RAY_TMPDIR" in one(found, "disk of Ray's files").remedy
    assert one(found, "disk of the current folder").verdict == "ok"


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert machine.check_shared_memory(tmp_path / "none", 10 * GIB).verdict == "warning"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(GIB // 16, 0, GIB // 16))
    small = machine.check_shared_memory(tmp_path, 10 * GIB)
    assert (small.verdict, "3.0 GiB" in small.found, "--shm-size" in small.remedy) == ("warning", True, True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(5 * GIB, 0, GIB))
    assert machine.check_shared_memory(tmp_path, 10 * GIB).verdict == "ok"
    assert machine.memory_bytes() > GIB // 2


# -- limits --------------------------------------------------------------------------------------------------------------


def limits(monkeypatch: pytest.MonkeyPatch, **values: tuple[int, int]) -> dict[str, Finding]:
    given = {
        resource.RLIMIT_NOFILE: values.get("nofile", (65536, 65536)),
        resource.RLIMIT_MEMLOCK: values.get("memlock", (2**23, 2**23)),
        resource.RLIMIT_CORE: values.get("core", (0, -1)),
    }
    monkeypatch.setattr(machine.resource, "getrlimit", given.__getitem__)
    return {finding.name: finding for finding in machine.check_limits()}


def test_limits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_has_infiniband", lambda: False)
    found = limits(monkeypatch)
    assert {name: finding.verdict for name, finding in found.items()} == {
        "open files": "ok",
        "locked memory": "ok",
        "core dumps": "ok",
    }
    low = limits(monkeypatch, nofile=(1024, 4096), core=(-1, -1))
    assert (low["open files"].verdict, low["core dumps"].verdict) == ("warning", "note")
    assert "administrator" in low["open files"].remedy
    assert limits(monkeypatch, nofile=(1024, -1))["open files"].remedy == "ulimit -n 65536"
    assert limits(monkeypatch, nofile=(-1, -1))["open files"].verdict == "ok"


def test_rdma_wants_to_lock_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_has_infiniband", lambda: True)
    assert limits(monkeypatch)["locked memory"].verdict == "warning"
    assert limits(monkeypatch, memlock=(-1, -1))["locked memory"].verdict == "ok"


# -- network -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("addresses", "interface", "verdict"),
    [
        (["10.1.2.3"], "", "ok"),
        (["127.0.1.1"], "", "note"),
        (["127.0.1.1", "10.1.2.3"], "", "ok"),
        (["127.0.1.1"], "eth0", "ok"),
        (None, "", "warning"),
        (None, "eth0", "note"),
    ],
)
def test_host_name(monkeypatch: pytest.MonkeyPatch, addresses: list[str] | None, interface: str, verdict: str):
    def resolve(name: str, port: None) -> list:
        if addresses is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, 0, 0, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    found = machine.check_host_name()
    assert found.verdict == verdict
    # A run gives gloo the interface of the address by which Ray knows the node, whatever the name means.
    assert verdict == "ok" or "--node-ip-address" in found.remedy
    assert "GLOO_SOCKET_IFNAME" not in found.remedy


@pytest.mark.parametrize(
    ("variable", "value", "verdict"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", "ok"),
        ("NCCL_SOCKET_IFNAME", "=eth", "error"),
        ("NCCL_SOCKET_IFNAME", "=eth0,ib0", "ok"),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", "ok"),
        ("NCCL_SOCKET_IFNAME", "^lo,eth", "error"),
        ("NCCL_SOCKET_IFNAME", "ib", "error"),
        ("GLOO_SOCKET_IFNAME", "eth0", "ok"),
        ("GLOO_SOCKET_IFNAME", "eth", "error"),
    ],
)
def test_interfaces(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, verdict: str):
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    found = machine.check_interfaces(["lo", "eth0"])
    assert one(found, variable).verdict == verdict
    assert verdict == "ok" or "set it to one of lo, eth0" in one(found, variable).remedy
    assert one(found, "interfaces").verdict == "ok"


def test_a_machine_without_a_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    (found,) = machine.check_interfaces(["lo"])
    assert found.verdict == "warning"


# -- Slurm ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with nothing of Slurm, and no job."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_no_slurm(slurm: Path):
    (found,) = doctor.check_slurm()
    assert (found.name, found.verdict) == ("Slurm", "note")


@pytest.mark.parametrize(("sinfo", "verdict"), [("echo '2 idle'", "ok"), ("exit 1", "warning")])
def test_a_controller_that_answers_or_does_not(slurm: Path, sinfo: str, verdict: str):
    for name in ("sbatch", "srun", "scontrol"):
        script(slurm, name, "exit 0")
    script(slurm, "sinfo", sinfo)
    (found,) = doctor.check_slurm()
    assert (found.name, found.verdict) == ("Slurm controller", verdict)


def test_inside_a_job(slurm: Path, monkeypatch: pytest.MonkeyPatch):
    job = {"ID": "7", "NUM_NODES": "2", "NODELIST": "n[1-2]"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    found = doctor.check_slurm()
    assert one(found, "Slurm commands").verdict == "warning"
    assert one(found, "Slurm job").found == "job 7, 2 nodes (n[1-2]), 8 GPUs on this one"
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")
    assert one(doctor.check_slurm(), "Slurm job").verdict == "warning"
