"""On a real cluster of two nodes with three GPUs each, in name: an engine's ranks come to one node, each on its own GPU."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence

import pytest
import ray
from ray.cluster_utils import Cluster

from rlhf_dist.config.hosting import Placement, RayConfig
from rlhf_dist.core.errors import PlacementError
from rlhf_dist.distributed.group import WorkerSpec
from rlhf_dist.distributed.ray import session
from rlhf_dist.distributed.ray.actor import RankHost
from rlhf_dist.rollout.config import RolloutConfig

pytestmark = [pytest.mark.timeout(400)]


def _spec(role: str, placement: Placement) -> WorkerSpec:
    return WorkerSpec(role, placement, object)


def _engines(gpus: float) -> WorkerSpec:
    settings = {"engine": "vllm", "num_ranks": 4, "tensor_parallel_size": 2, "gpus_per_rank": gpus}
    return _spec("rollout", RolloutConfig.model_validate(settings))


def _places(ours: session.RaySession, specs: Sequence[WorkerSpec], role: str) -> list[tuple[str, str]]:
    """(node, GPU) of each rank."""
    ours.check(specs)
    with ours._hosts(specs) as (hosts, _):
        return ray.get([host.where.remote() for host in hosts[role]], timeout=200)


def _on_two_nodes() -> None:
    class TellingHost(RankHost):  # in here, so that Ray's workers need not find this file
        def where(self) -> tuple[str, str]:
            return self.place().node, os.environ["CUDA_VISIBLE_DEVICES"]

    session.RankHost = TellingHost
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 3, "include_dashboard": False})
    cluster.add_node(num_cpus=8, num_gpus=3)
    ours = session.RaySession(RayConfig(address=cluster.address, placement_timeout_s=60), "cuda")
    try:
        # Bundle by bundle, three of these four ranks would fill a node, and an engine would be on both.
        places = _places(ours, [_engines(1.0), _spec("policy", Placement(num_ranks=1))], "rollout")
        assert places[0][0] == places[1][0] != places[2][0] == places[3][0], places
        assert len(set(places)) == 4, places
        with pytest.raises(PlacementError, match=r"engine 1 of rollout .* on 2 nodes, and they must lie on one; give"):
            _places(ours, [_engines(0.5), _spec("reward", Placement(num_ranks=4, gpus_per_rank=0.5))], "rollout")
        assert len(set(_places(ours, [_engines(1.0)], "rollout"))) == 4, "the GPUs of the rejected run were given back"
    finally:
        ours.close()
        cluster.shutdown()


def test_engines_lie_on_one_node_each(monkeypatch: pytest.MonkeyPatch) -> None:
    # In a process of its own: Ray keeps the authentication mode of a process's first connection, and later tests connect to
    # private clusters, which have a token.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    process = multiprocessing.get_context("spawn").Process(target=_on_two_nodes)
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0
