"""What ranks on several nodes need beyond Ray: an address to meet at, an interface that has it, and an environment."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import psutil

from rlhf_dist.config import RayConfig
from rlhf_dist.errors import PlacementError


def interface_with(address: str) -> str | None:
    """The network interface of this machine that has `address`; None for a loopback address, or where none has it (a
    container behind address translation), and NCCL and gloo are left to choose."""
    if _is_loopback(address):
        return None
    for name, addresses in psutil.net_if_addrs().items():
        # An IPv6 address may carry its zone: fe80::1%eth0.
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


def check_rendezvous(role: str, addresses: Sequence[str]) -> None:
    """Refuse a role whose ranks cannot reach the address at which they are to meet.

    Args:
        addresses: of each rank's node, as Ray knows it; the ranks meet at the first.

    Raises:
        PlacementError: the first is a loopback address, and a rank is on another machine.
    """
    others = sorted({address for address in addresses if address != addresses[0]})
    if others and _is_loopback(addresses[0]):
        raise PlacementError(
            f"the ranks of {role} would meet at {addresses[0]}, which the ranks on {', '.join(others)} cannot reach; start Ray "
            "on that node with --node-ip-address and an address that the other nodes reach"
        )


def rank_environment(config: RayConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that rank processes on a cluster get: those of the driver's `environment` whose names `ray.pass_env` covers,
    then `ray.env_vars`."""
    passed = {
        name: value
        for name, value in environment.items()
        if any(fnmatchcase(name, pattern) for pattern in config.pass_env)
    }
    return passed | config.env_vars


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
