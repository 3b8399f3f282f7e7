"""What a process is told before it joins its role."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

from rlhf_dist.distributed.deepspeed.process_group import RankContext, prepare_process

SOCKETS = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("configured", "found", "set_before", "expected"),
    [
        (None, None, {}, (None, None)),
        (None, "eth0", {}, ("eth0", "eth0")),
        (None, "eth0", {"NCCL_SOCKET_IFNAME": "^lo"}, ("^lo", "eth0")),
        ("ib0", "eth0", {}, ("ib0", "ib0")),
        ("ib0", "eth0", {"NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth1"}, ("ib0", "ib0")),
    ],
)
def test_a_configured_interface_beats_the_environment_which_beats_the_one_that_was_found(
    configured: str | None, found: str | None, set_before: dict[str, str], expected: tuple[str | None, str | None]
):
    context = RankContext(interface=configured, own_interface=found, threads=torch.get_num_threads())
    with mock.patch.dict(os.environ):
        for name in SOCKETS:
            os.environ.pop(name, None)
        os.environ.update(set_before)
        prepare_process(context)
        assert tuple(os.environ.get(name) for name in SOCKETS) == expected
