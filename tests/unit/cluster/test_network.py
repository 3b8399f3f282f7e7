"""Addresses, interfaces and the environment of ranks."""

from __future__ import annotations

import psutil
import pytest

from rlhf_dist.cluster.network import check_rendezvous, interface_with, passed_environment
from rlhf_dist.config import RayConfig
from rlhf_dist.errors import PlacementError


def test_an_address_names_its_interface():
    found = {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family.name == "AF_INET" and not entry.address.startswith("127.")
    }
    for address, name in found.items():
        assert interface_with(address) == name


def test_loopback_and_foreign_addresses_leave_the_choice_to_the_libraries():
    assert interface_with("127.0.0.1") is None
    assert interface_with("203.0.113.7") is None  # reserved for documentation: no machine has it


def test_ranks_on_one_machine_may_meet_at_its_loopback():
    check_rendezvous("policy", ["127.0.0.1", "127.0.0.1"])
    check_rendezvous("policy", ["10.0.0.1", "10.0.0.2"])


def test_ranks_elsewhere_cannot():
    with pytest.raises(PlacementError, match=r"policy would meet at 127.0.0.1, .*10.0.0.2.*--node-ip-address"):
        check_rendezvous("policy", ["127.0.0.1", "127.0.0.1", "10.0.0.2"])


def test_what_a_rank_takes_over():
    config = RayConfig(env_vars={"NCCL_DEBUG": "WARN", "MINE": "1"})
    driver = {"HF_HOME": "/hf", "NCCL_DEBUG": "INFO", "PATH": "/bin", "AWS_SECRET": "x"}
    assert passed_environment(config, driver) == {"HF_HOME": "/hf"}
