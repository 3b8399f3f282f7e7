"""What ranks on several nodes need beyond Ray: an address to meet at, an interface that has it, and an environment."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import psutil

from rlhf_dist.config.hosting import RayConfig
from rlhf_dist.core.errors import PlacementError

_NOBODY = "192.0.2.1"
"""An address that is nobody's (RFC 5737): the route towards it is looked up, nothing is sent."""
_PORTS = range(20000, 30000)
"""Below the range from which systems take ports of outgoing connections."""
REACH_S = 10.0
"""Longest wait for a TCP connection between two nodes of a cluster."""


class Place(NamedTuple):
    """Where a rank is."""

    node: str
    """Ray's id of its node: two nodes may claim one address."""
    address: str
    """Of the node, as Ray knows it."""


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


def reachable_address(interface: str | None = None, towards: str | None = None) -> str:
    """This machine's IPv4 address for other nodes: of `interface`, where one is named; or the one with which `towards` is
    reached; or, of those of the host's own name, of the default route and of all interfaces, the first that is no loopback.

    Raises:
        PlacementError: there is no such interface, it has no IPv4 address, or the machine has none but loopbacks.
    """
    addresses = {
        name: [entry.address for entry in found if entry.family == socket.AF_INET]
        for name, found in psutil.net_if_addrs().items()
    }
    if interface is not None:
        if not addresses.get(interface):
            known = ", ".join(name for name, found in addresses.items() if found)
            raise PlacementError(
                f"{socket.gethostname()} has no interface {interface!r} with an IPv4 address, but {known}; name one of these, "
                "or none"
            )
        return addresses[interface][0]
    candidates = [_source_address(towards)] if towards is not None else []
    with contextlib.suppress(OSError):
        candidates += socket.gethostbyname_ex(socket.gethostname())[2]
    candidates += [_source_address(_NOBODY), *(address for found in addresses.values() for address in found)]
    for candidate in candidates:
        if candidate is not None and not _is_loopback(candidate):
            return candidate
    raise PlacementError(f"{socket.gethostname()} has no IPv4 address but loopbacks, so other nodes cannot reach it")


def _source_address(destination: str) -> str | None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((destination, 9))
        return probe.getsockname()[0]
    return None


def free_port(start: int) -> int:
    """A free port for a server that starts a little later. `start` says where the search begins: callers with numbers of their
    own do not take the same port between the search and its use.

    Raises:
        PlacementError: there is none.
    """
    for offset in range(len(_PORTS)):
        port = _PORTS[(start + offset) % len(_PORTS)]
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise PlacementError(
        f"no port of {_PORTS[0]} to {_PORTS[-1]} is free on {socket.gethostname()}; end what uses them"
    )


def check_rendezvous(role: str, addresses: Sequence[str]) -> None:
    """Reject a role whose ranks cannot reach the address at which they are to meet.

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


def why_unreachable(address: str, port: int, timeout_s: float = REACH_S) -> str | None:
    """Why no TCP connection to `address` comes about from here, in the system's words; None where one does."""
    try:
        with socket.create_connection((address, port), timeout=timeout_s):
            return None
    except OSError as error:
        return error.strerror or str(error)


def check_interface(interface: str | None) -> None:
    """Reject interfaces (one, or several with commas between) that this machine does not have: gloo would end for it in its own
    words, and NCCL takes any whose name begins so.

    Raises:
        PlacementError: one of them is not there.
    """
    wanted, there = (interface or "").split(","), psutil.net_if_addrs()
    missing = [name for name in wanted if interface is not None and name not in there]
    if missing:
        raise PlacementError(
            f"ray.network_interface {interface!r} cannot be used: {socket.gethostname()} has no {', '.join(missing)}, but "
            f"{', '.join(there)}; name an interface that every node has, or null to take the one of the node's address"
        )


def check_reached(role: str, address: str, tries: Sequence[tuple[str, str | None]]) -> None:
    """Reject a role of which a node did not reach the `address` at which its ranks are to meet.

    Args:
        tries: of each other node, its address and what its try ended with (`why_unreachable`).

    Raises:
        PlacementError: one did not reach it.
    """
    failed = [f"{other} ({reason})" for other, reason in tries if reason is not None]
    if failed:
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise PlacementError(
            f"the ranks of {role} would meet at {address}, which cannot be reached from {', '.join(failed[:3])}{more}; start "
            "Ray on that node with --node-ip-address and an address that the other nodes reach (one of a container's own "
            "network is none), or let the nodes open connections to each other on all ports"
        )


def passed_environment(config: RayConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that rank processes on a cluster take over: those of the driver's `environment` whose names `ray.pass_env`
    covers, but for those that `ray.env_vars` sets."""
    return {
        name: value
        for name, value in environment.items()
        if name not in config.env_vars and any(fnmatchcase(name, pattern) for pattern in config.pass_env)
    }


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
