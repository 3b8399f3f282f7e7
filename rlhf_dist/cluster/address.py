"""The address of this machine that other nodes reach: `python -m rlhf_dist.cluster.address`, for scripts that start Ray.

Ray's own choice follows the route to the internet; on a machine with several networks that may be the wrong one, and on one
without a route it is 127.0.0.1.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
from collections.abc import Mapping, Sequence

import psutil

from rlhf_dist.errors import PlacementError, RlhfDistError

_ANYWHERE = "192.0.2.1"
"""An address of nobody (RFC 5737): only the route towards it is asked for, nothing is sent."""

_PORTS = range(20000, 30000)


def reachable_address(interface: str | None = None, towards: str | None = None) -> str:
    """This machine's IPv4 address: of `interface`; or the one with which `towards` is reached; or, of the addresses of the
    host's own name, of the default route and of all interfaces, the first that is not a loopback.

    Raises:
        PlacementError: there is no such interface, it has no IPv4 address, or the machine has none but loopbacks.
    """
    addresses = _addresses()
    if interface is not None:
        if not addresses.get(interface):
            known = ", ".join(name for name, found in addresses.items() if found)
            raise PlacementError(
                f"interface {interface!r} is not one of {socket.gethostname()}'s with an IPv4 address ({known}); change the "
                "interface, or leave it out"
            )
        return addresses[interface][0]
    candidates = [_source_address(towards)] if towards is not None else []
    with contextlib.suppress(OSError):
        candidates += socket.gethostbyname_ex(socket.gethostname())[2]
    candidates += [_source_address(_ANYWHERE), *(a for found in addresses.values() for a in found)]
    for candidate in candidates:
        if candidate is not None and not candidate.startswith("127."):
            return candidate
    raise PlacementError(f"{socket.gethostname()} has no IPv4 address but loopbacks; other nodes cannot reach it")


def free_port(start: int) -> int:
    """A free port that no outgoing connection takes (below the ephemeral range), searched from a place that `start` says:
    callers with different numbers do not take the same one between their search and its use.

    Raises:
        PlacementError: there is none.
    """
    for offset in range(len(_PORTS)):
        port = _PORTS[(start + offset) % len(_PORTS)]
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise PlacementError(f"no port of {_PORTS[0]} to {_PORTS[-1]} is free on {socket.gethostname()}; end what uses them")


def _addresses() -> Mapping[str, list[str]]:
    """Interface → its IPv4 addresses."""
    return {
        name: [a.address for a in found if a.family == socket.AF_INET] for name, found in psutil.net_if_addrs().items()
    }


def _source_address(destination: str) -> str | None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((destination, 9))
        return probe.getsockname()[0]
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the address; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_dist.cluster.address", description=__doc__)
    parser.add_argument("--interface", help="network interface, such as ib0")
    parser.add_argument("--towards", metavar="HOST", help="the address with which HOST is reached")
    parser.add_argument("--free-port", type=int, metavar="START", help="print a free port; START: a number of the caller's own")
    options = parser.parse_args(arguments)
    try:
        if options.free_port is not None:
            found = str(free_port(options.free_port))
        else:
            found = reachable_address(options.interface, options.towards)
        sys.stdout.write(f"{found}\n")
    except RlhfDistError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
