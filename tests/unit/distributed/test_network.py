"""Addresses, interfaces and the environment of ranks."""

from __future__ import annotations

import re
import socket

import psutil
import pytest

from rlhf_dist.config.hosting import RayConfig
from rlhf_dist.core.errors import PlacementError
from rlhf_dist.distributed.deepspeed.process_group import open_rendezvous
from rlhf_dist.distributed.ray.network import (
    check_interface,
    check_rendezvous,
    interface_with,
    passed_environment,
    why_unreachable,
)


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


def test_an_address_is_reached_as_long_as_something_listens_there():
    with socket.create_server(("127.0.0.1", 0)) as there:
        address, port = there.getsockname()
        assert why_unreachable(address, port) is None
    assert why_unreachable(address, port) == "Connection refused"


def test_the_rendezvous_listens_from_when_its_port_is_known():
    port = open_rendezvous()
    assert open_rendezvous() == port
    for _ in range(20):
        assert why_unreachable("127.0.0.1", port) is None
    with pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("", port))


def test_an_address_that_does_not_answer_is_given_up():
    """A queue that is full stays silent, as a firewall does."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        assert why_unreachable(*full.getsockname(), timeout_s=0.5) == "timed out"


def test_a_configured_interface_must_be_there():
    names = list(psutil.net_if_addrs())
    check_interface(None)
    check_interface(names[0])
    check_interface(",".join(names))
    said = rf"network_interface 'lo,nosuch0' .* {re.escape(socket.gethostname())} has no nosuch0, but .*lo.*"
    with pytest.raises(PlacementError, match=said):
        check_interface("lo,nosuch0")


def test_what_a_rank_takes_over():
    config = RayConfig(env_vars={"NCCL_DEBUG": "WARN", "MINE": "1"})
    driver = {"HF_HOME": "/hf", "NCCL_DEBUG": "INFO", "PATH": "/bin", "AWS_SECRET": "x"}
    assert passed_environment(config, driver) == {"HF_HOME": "/hf"}
