"""What a node of a Slurm job starts Ray with, and the wait for all nodes. Whole jobs: tests/integration/test_slurm.py."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil
import pytest

from rlhf_dist.core.errors import PlacementError
from rlhf_dist.distributed.ray.network import free_port, reachable_address
from rlhf_dist.distributed.ray.slurm_node import exit_code_of, ray_command, temp_dir
from rlhf_dist.distributed.ray.wait_for_nodes import wait_for_nodes

JOB = {"SLURM_JOB_ID": "4711", "SLURMD_NODENAME": "gpu-n17", "SLURM_NODEID": "3", "SLURM_CPUS_ON_NODE": "96"}


def test_the_address_is_one_of_this_machine_and_no_loopback():
    address = reachable_address()
    assert not address.startswith("127.")
    assert address in [a.address for found in psutil.net_if_addrs().values() for a in found]


def test_the_address_towards_a_host_and_of_an_interface():
    assert reachable_address(towards=reachable_address()) == reachable_address()
    assert reachable_address(interface="lo") == "127.0.0.1"  # who names it gets it
    with pytest.raises(PlacementError, match="no interface 'ib7' with an IPv4 address, but lo"):
        reachable_address(interface="ib7")


def test_jobs_with_different_numbers_search_a_port_from_different_places():
    first = free_port(4711)
    assert free_port(4712) != first
    with socket.socket() as taken:
        taken.bind(("", first))
        assert free_port(4711) != first


def test_the_folder_is_the_jobs_and_the_nodes_own():
    assert temp_dir(JOB) == Path("/tmp/rlhf-4711-gpu-n17")
    assert temp_dir(JOB | {"SLURMD_NODENAME": "a-very-long-name-of-a-node.example"}) == Path("/tmp/rlhf-4711-3")
    with pytest.raises(PlacementError, match="40 bytes at most; set RLHF_DIST_RAY_TMPDIR"):
        temp_dir(JOB | {"RLHF_DIST_RAY_TMPDIR": "/scratch/users/somebody/with/a/deep/folder"})


def test_the_line_of_the_head():
    line = ray_command("head", "/state/address", Path("/tmp/r"), JOB | {"SLURM_GPUS_ON_NODE": "8"})
    for option in ("--head", "--block", "--port=0", "--num-cpus=96", "--num-gpus=8", "--labels=slurm-node=gpu-n17"):
        assert option in line
    assert f"--node-ip-address={reachable_address()}" in line
    assert not [word for word in line if word.startswith("--address")]


def test_the_line_of_a_worker():
    environment = JOB | {"RLHF_DIST_RAY_ARGUMENTS": "--object-store-memory=100 --resources='{\"a\": 1}'"}
    line = ray_command("worker", f"{reachable_address()}:6379", Path("/tmp/r"), environment)
    assert f"--address={reachable_address()}:6379" in line
    assert "--num-gpus=0" in line
    assert line[-2:] == ["--object-store-memory=100", '--resources={"a": 1}']
    assert "--head" not in line
    assert not [word for word in line if word.startswith("--port")]


@pytest.mark.parametrize(("role", "head"), [("head", "/state/address"), ("worker", "192.0.2.7:6379")])
def test_no_port_is_one_that_another_job_on_the_node_would_take_as_well(role: str, head: str):
    """Ray would have its workers listen on 10002 to 19999 and each node's agent on 52365, whoever is there already."""
    line = ray_command(role, head, Path("/tmp/r"), JOB | {"RLHF_DIST_RAY_ARGUMENTS": "--min-worker-port=40000"})
    for option in ("min-worker-port", "max-worker-port", "dashboard-agent-listen-port"):
        assert f"--{option}=0" in line
    # A site whose firewall leaves a range open has the last word.
    assert line.index("--min-worker-port=40000") > line.index("--min-worker-port=0")


class Joining:
    """In place of Ray's list of nodes: one more of `order` is there at every look."""

    def __init__(self, *order: str) -> None:
        self.order = order
        self.looks = 0

    def __call__(self) -> set[str]:
        self.looks += 1
        return set(self.order[: self.looks])


def nobody() -> set[str]:
    return set()


def test_it_returns_when_all_are_there(capsys: pytest.CaptureFixture[str]):
    joining = Joining("b", "c", "a")
    wait_for_nodes(["a", "b"], joining, nobody, timeout_s=60, poll_s=0)
    assert {"a", "b"} <= set(joining.order[: joining.looks])
    assert capsys.readouterr().out == "all 2 nodes have joined Ray\n"


def test_the_limit_names_those_that_are_missing():
    with pytest.raises(PlacementError, match=r"1 of 3 nodes joined Ray; missing: a, c \(after 0\.1 s\)"):
        wait_for_nodes(["a", "b", "c"], Joining("b"), nobody, timeout_s=0.1, poll_s=0.01)


def test_a_node_whose_ray_has_ended_is_not_waited_for():
    with pytest.raises(PlacementError, match=r"1 of 2 nodes joined Ray; missing: a \(Ray ended on a\)"):
        wait_for_nodes(["a", "b"], Joining("b"), lambda: {"a"}, timeout_s=3600, poll_s=0)


def test_an_error_is_one_line_and_its_exit_code(capsys: pytest.CaptureFixture[str]):
    def reject() -> None:
        raise PlacementError("no room")

    assert exit_code_of(reject) == 6
    assert capsys.readouterr().err == "error: no room\n"
    assert exit_code_of(lambda: None) == 0
