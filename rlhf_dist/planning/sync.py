"""The weight sync on paper: bytes on their way from the policy to the rollout engines, and how long that takes.

Bucket after bucket, and nothing at the same time: the policy gathers a bucket, rank 0 computes its checksum and sends it, every
rank of every engine receives all of it, computes the checksum, too, and keeps its part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rlhf_dist.models.architecture import ELEMENT_BYTES
from rlhf_dist.planning.hardware import Cluster
from rlhf_dist.planning.layout import Layout, slowest_link
from rlhf_dist.planning.rates import COLLECTIVES, Rates, Seconds
from rlhf_dist.planning.roles import Role, Work
from rlhf_dist.planning.sharding import Sharding

CHECKSUMS = "checksums of the weights at both ends"
COPIES = "copies of the weights between GPU, host and object store"
NETWORK = "the object store's transfers between nodes"
BROADCAST = "NCCL's broadcast to the engines"
_CHECKSUM_PASSES = 5
"""Of `weight_sync.checksum` over memory: words and weights in, products out and in, words in."""


@dataclass(frozen=True)
class Traffic:
    """Of one sync."""

    transport: Literal["store", "broadcast"]
    """See `RolloutConfig.weight_transport`."""
    num_bytes: int
    """Store: taken in by the object stores of all nodes; broadcast: received by all ranks of all engines."""
    receivers: int
    """Nodes with a copy in their store, or ranks of engines."""

    @property
    def words(self) -> str:
        """What passes where."""
        if self.transport == "broadcast":
            return f"the policy, from GPU to GPU, to {self.receivers} engine rank(s)"
        return f"the policy, in the object store of {self.receivers} node(s)"


def traffic(work: Work, layout: Layout, cluster: Cluster) -> Traffic | None:
    """Bytes of a sync; None of a run that has none."""
    roles = _ends(work)
    if roles is None:
        return None
    policy, rollout = roles
    transport = _transport(policy, rollout, cluster)
    receivers = rollout.num_ranks if transport == "broadcast" else 1 + _other_nodes(layout)
    return Traffic(transport, _model_bytes(policy) * receivers, receivers)


def seconds(work: Work, layout: Layout, cluster: Cluster, rates: Rates) -> Seconds:
    """Of a sync; empty of a run that has none."""
    roles = _ends(work)
    if roles is None:
        return {}
    policy, rollout = roles
    size = _model_bytes(policy)
    link = slowest_link(layout, cluster, "policy")
    assert policy.trained is not None
    zero_3 = Sharding.of(policy.trained, policy.num_ranks).zero_stage == 3
    parts = {
        COLLECTIVES: rates.ring_s(size, policy.num_ranks, link) if zero_3 else 0.0,
        CHECKSUMS: 2 * _CHECKSUM_PASSES * size / rates.memory_bandwidth(cluster.gpu),
    }
    if _transport(policy, rollout, cluster) == "broadcast":
        # Pipelined in pieces: as long as the bytes take over the slowest link, however many ranks there are.
        link = slowest_link(layout, cluster, "policy", "rollout")
        return parts | {BROADCAST: size / (link * rates.link_efficiency)}
    on_gpu = 0.0 if cluster.on_cpu else 2 * size / rates.host_copy_bytes_per_s
    return parts | {
        COPIES: size / rates.store_bytes_per_s + on_gpu,
        # Nodes that have a bucket hand it on, so that rounds grow with the logarithm.
        NETWORK: math.ceil(math.log2(_other_nodes(layout) + 1)) * size / rates.store_bytes_per_s,
    }


def _ends(work: Work) -> tuple[Role, Role] | None:
    policy, rollout = work.role("policy"), work.role("rollout")
    return (policy, rollout) if policy and rollout and work.command == "ppo" else None


def _transport(policy: Role, rollout: Role, cluster: Cluster) -> Literal["store", "broadcast"]:
    assert rollout.rollout is not None
    device = "cpu" if cluster.on_cpu else "cuda"
    return rollout.rollout.sends_weights_by(policy.placement, device, "inline" if rollout.inline else "ray")


def _model_bytes(policy: Role) -> int:
    return ELEMENT_BYTES[policy.precision] * policy.architecture.num_parameters


def _other_nodes(layout: Layout) -> int:
    """With engines, but without rank 0 of the policy."""
    return len(set(layout.nodes_of("rollout")) - {layout.nodes_of("policy")[0]})
