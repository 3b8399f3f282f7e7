"""Wait until every node of a job has joined its Ray cluster: `python -m rlhf_dist.distributed.ray.wait_for_nodes`, for scripts.

Nodes are told apart by the label `slurm-node`, with which `slurm_node` starts them: several may share an address.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_dist.core.errors import PlacementError
from rlhf_dist.distributed.ray.slurm_node import NODE_LABEL, exit_code_of

REPORT_EVERY_S = 15.0


def wait_for_nodes(
    wanted: Sequence[str],
    alive: Callable[[], set[str]],
    ended: Callable[[], set[str]],
    timeout_s: float,
    poll_s: float = 0.5,
) -> None:
    """Return when `alive()` holds all `wanted` nodes. `ended()`: nodes whose Ray has ended, and will not come any more.

    Raises:
        PlacementError: some were not there within `timeout_s`, or have ended; names them.
    """
    start = time.monotonic()
    report_at = start + REPORT_EVERY_S
    while missing := [node for node in wanted if node not in alive()]:
        waited = time.monotonic() - start
        gone = [node for node in missing if node in ended()]
        if gone or waited > timeout_s:
            there = f"{len(wanted) - len(missing)} of {len(wanted)} nodes joined Ray"
            why = f"Ray ended on {', '.join(gone)}" if gone else f"after {timeout_s:g} s"
            raise PlacementError(
                f"{there}; missing: {', '.join(missing)} ({why}). Look above for what srun and Ray say of these nodes; "
                "exclude them (sbatch --exclude), or raise RLHF_DIST_START_TIMEOUT where nodes are slow to start"
            )
        if time.monotonic() > report_at:
            report_at += REPORT_EVERY_S
            _say(f"waiting since {waited:.0f} s for {len(missing)} of {len(wanted)} nodes: {', '.join(missing)}")
        time.sleep(poll_s)
    _say(f"all {len(wanted)} nodes have joined Ray")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _labeled_nodes() -> set[str]:
    import ray

    return {node["Labels"].get(NODE_LABEL, "") for node in ray.nodes() if node["Alive"]}


def _connect(address: str) -> None:
    import logging

    import ray

    try:
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PlacementError(
            f"Ray's head does not answer at {address}: {reason}; look above for what it says"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Wait; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_dist.distributed.ray.wait_for_nodes", description=__doc__)
    parser.add_argument("--address", required=True, help="HOST:PORT of Ray's head")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait at most")
    parser.add_argument("--ended", type=Path, help="a file to which the caller writes the nodes whose Ray has ended")
    parser.add_argument("nodes", nargs="+", metavar="NODE", help="values of the label slurm-node")
    options = parser.parse_args(arguments)

    def ended() -> set[str]:
        return set(options.ended.read_text(encoding="utf-8").split()) if options.ended else set()

    def wait() -> None:
        _connect(options.address)
        wait_for_nodes(options.nodes, _labeled_nodes, ended, options.timeout)

    return exit_code_of(wait)


if __name__ == "__main__":
    sys.exit(main())
