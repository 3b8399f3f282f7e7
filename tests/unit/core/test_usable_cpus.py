"""How many CPUs a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf_dist.core import cpus

ALL = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("cgroups", "files", "expected"),
    [
        ("0::/\n", {}, 64),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "800000 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "850000 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 64),
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "400000 100000\n"}, 4),
        ("4:memory:/box\n3:cpu,cpuacct:/box\n", {"cpu,cpuacct/box/cpu.cfs_quota_us": "-1\n"}, 64),
        (
            "4:memory:/box\n3:cpu,cpuacct:/box\n",
            {"cpu,cpuacct/box/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/box/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        # A container sees its own folder as the root, and the host's path in /proc.
        ("3:cpu:/docker/1f\n", {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_a_quota_of_a_container_or_job_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cgroups: str, files: dict[str, str], expected: int
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "proc").write_text(cgroups)
    for name, text in files.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert cpus.usable_cpus(tmp_path / "proc", tmp_path / "fs") == expected


def test_so_does_what_the_process_is_bound_to(tmp_path: Path):
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpus.usable_cpus(tmp_path / "no proc", tmp_path) == 1
    finally:
        os.sched_setaffinity(0, before)
    assert cpus.usable_cpus() <= ALL
