"""How long an iteration takes, on paper: datasheet rates times efficiencies, phase by phase.

A bound for comparing layouts, not a promise: the efficiencies are assumptions until `calibrated` from a real run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.models.architecture import ELEMENT_BYTES, Architecture, architecture
from rlhf_dist.planning.hardware import Cluster
from rlhf_dist.planning.layout import Layout
from rlhf_dist.planning.roles import Passes, Role, Work
from rlhf_dist.planning.sharding import Sharding

PHASES = ("generate", "score", "update", "sync")
"""Of an iteration, in the order they come in."""

Seconds = dict[str, float]
"""What the time goes into → seconds."""

COMPUTING = "computing"
COLLECTIVES = "ZeRO's collectives"
OPTIMIZER = "the optimizer's memory traffic"
PREFILL = "reading prompts"
WEIGHTS = "reading weights and KV cache for every token"
LAUNCHES = "launching each layer's kernels for every token"
CHECKSUMS = "checksums of the weights at both ends"
COPIES = "copies of the weights between GPU, host and object store"
_CHECKSUM_PASSES = 5
"""Of `weight_sync.buckets.checksum` over memory: words and weights in, products out and in, words in."""
NETWORK = "the object store's transfers between nodes"


@dataclass(frozen=True)
class Rates:
    """Efficiencies and rates beside the datasheet's. A JSON file may replace any of them."""

    train_efficiency: float = 0.40
    """Of the GPU's operations a second, in forward and backward passes of training."""
    forward_efficiency: float = 0.50
    """In forward passes: scoring, reading prompts."""
    decode_efficiency: float = 0.60
    """Of the GPU's memory bandwidth, in decoding."""
    link_efficiency: float = 0.70
    """Of the bandwidth between GPUs, in collectives."""
    layer_launch_s: float = 0.8e-3
    """Python and kernel launches of one layer for one token step of the `hf` engine."""
    host_copy_bytes_per_s: float = 8e9
    """Between a GPU and pageable host memory."""
    host_memory_bytes_per_s: float = 10e9
    """That a rank's AdamW gets where optimizer states are offloaded."""
    store_bytes_per_s: float = 2e9
    """Into Ray's object store, and between the stores of two nodes."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Phase → measured over estimated seconds of a real run."""

    @classmethod
    def read(cls, values: Mapping[str, object], source: str) -> Rates:
        """From a mapping.

        Raises:
            ConfigError: an unknown name, or a value that is no positive number.
        """
        known = sorted({f.name for f in fields(cls)} - {"factors"})
        rates = {name: value for name, value in values.items() if name != "factors"}
        factors = values.get("factors", {})
        if not isinstance(factors, Mapping):
            raise ConfigError(f"{source} sets factors to {factors!r}; it must be an object of numbers by phase")
        for name in rates.keys() - set(known):
            raise ConfigError(f"{source} names the rate {name!r}; known ones are {', '.join(known)}, factors")
        for name in factors.keys() - set(PHASES):
            raise ConfigError(f"{source} has a factor of {name!r}; phases are {', '.join(PHASES)}")
        for name, value in [*rates.items(), *((f"factors.{phase}", value) for phase, value in factors.items())]:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                raise ConfigError(f"{source} sets {name} to {value!r}; it must be a positive number")
        return cls(**rates, factors=dict(factors))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and responses: what is expected on average, and the longest response, to which engines decode."""

    prompt: float
    response: float
    longest_response: int


@dataclass(frozen=True)
class Timeline:
    """Seconds of one iteration."""

    phases: dict[str, Seconds]
    """generate, score, update, sync → of the GPUs that take longest, what it goes into."""

    @property
    def seconds(self) -> dict[str, float]:
        """Of each phase."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def total(self) -> float:
        """Of the iteration."""
        return sum(self.seconds.values())

    @property
    def bottleneck(self) -> str:
        """In words: the longest phase, and what most of it goes into."""
        phase = max(self.seconds, key=lambda name: self.seconds[name])
        return f"{phase}: {max(self.phases[phase], key=lambda part: self.phases[phase][part])}"


def timeline(work: Work, layout: Layout, cluster: Cluster, rates: Rates, lengths: Lengths) -> Timeline:
    """Estimate an iteration (of a supervised run: an optimizer step; of an evaluation: one batch)."""
    clock = _Clock(work, layout, cluster, rates, lengths)
    phases: dict[str, Seconds] = {}
    if work.responses:
        phases["generate"] = clock.slowest(clock.generate)
    if any(role.score for role in work.roles):
        phases["score"] = clock.slowest(clock.score)
    if any(role.update for role in work.roles):
        phases["update"] = clock.slowest(clock.update)
    if work.command == "ppo":
        phases["sync"] = clock.sync()
    scaled = {
        phase: {part: seconds * rates.factors.get(phase, 1.0) for part, seconds in parts.items()}
        for phase, parts in phases.items()
    }
    return Timeline(scaled)


@dataclass(frozen=True)
class _Clock:
    work: Work
    layout: Layout
    cluster: Cluster
    rates: Rates
    lengths: Lengths

    def slowest(self, seconds_of: Callable[[Role], Seconds]) -> Seconds:
        """Of the GPU whose roles take longest together: roles on the same GPU take turns, others work at the same time."""
        times = {role.name: seconds_of(role) for role in self.work.roles}
        shares = self.layout.shares().values()
        sums = [_added(times[name] for name in roles) for roles in shares]
        return max(sums, key=lambda parts: sum(parts.values()), default={})

    def generate(self, role: Role) -> Seconds:
        """An engine's batches one after the other, each to the end of its longest response."""
        if role.rollout is None:
            return {}
        model, size = architecture(role.model_path), ELEMENT_BYTES[role.precision]
        rows = max(1, -(-self.work.responses // role.num_ranks))
        at_once = min(rows, role.rollout.batch_size)
        batches = -(-rows // at_once)
        steps = self.lengths.longest_response
        prefill = model.forward_flops(at_once, self.lengths.prompt, 1)
        # Ended responses leave the batch: on average as many are at work as the mean response is long.
        busy = at_once * min(1.0, self.lengths.response / steps)
        context = self.lengths.prompt + steps / 2
        read = size * (model.num_parameters + busy * context * model.kv_elements_per_token)
        flops = busy * (model.body_flops_per_token + model.head_flops_per_token)
        reading = read / (self.cluster.gpu.memory_bytes_per_s * self.rates.decode_efficiency)
        reading = max(reading, flops / (self.cluster.gpu.flops * self.rates.forward_efficiency))
        launching = max(0.0, model.num_layers * self.rates.layer_launch_s - reading)
        return {
            PREFILL: batches * prefill / (self.cluster.gpu.flops * self.rates.forward_efficiency),
            WEIGHTS: batches * steps * reading,
            LAUNCHES: batches * steps * launching,
        }

    def score(self, role: Role) -> Seconds:
        """Forward passes of all responses."""
        if role.score is None:
            return {}
        model, sharding = self._model(role), self._sharding(role)
        flops = self._flops(model, role.sequences_per_rank(role.score), role.score)
        gathers = role.num_micro_batches(role.score) if sharding.zero_stage == 3 else 0
        size = sharding.element_bytes * model.num_parameters
        return {
            COMPUTING: flops / (self.cluster.gpu.flops * self.rates.forward_efficiency),
            COLLECTIVES: gathers * self._collective(role, size),
        }

    def update(self, role: Role) -> Seconds:
        """All optimizer steps: forward, backward (twice the forward, less what weights that are frozen save; and once more with
        checkpointing), collectives, AdamW."""
        if not role.update or role.trained is None:
            return {}
        model, sharding = self._model(role), self._sharding(role)
        # Forward, gradients of activations, and of those weights that are trained.
        passes = (3 if role.trained.gradient_checkpointing else 2) + model.num_trained / model.num_held
        flops = sum(passes * self._flops(model, role.sequences_per_rank(p), p) for p in role.update)
        micro_batches = sum(role.num_micro_batches(p) for p in role.update)
        count, size = model.num_trained, sharding.element_bytes
        stage = sharding.zero_stage
        if stage == 3:
            # Gathered for forward and for backward; gradients scattered.
            moved = micro_batches * size * (2 * model.num_held + count)
        elif stage == 2:
            moved = (micro_batches + 1) * size * count  # gradients scattered each time; parameters gathered once
        else:
            moved = 2 * (4 if stage else size) * count + (size * count if stage else 0)
        owned = count / (role.num_ranks if stage else 1)
        bandwidth = self.rates.host_memory_bytes_per_s if sharding.offload_optimizer else self._memory_bandwidth
        traffic = (
            40 * owned
        )  # gradient, master weight and moments read, and written but for the gradient; an intermediate
        copied = 6 * owned / self.rates.host_copy_bytes_per_s if sharding.offload_optimizer else 0.0
        return {
            COMPUTING: role.updates * flops / (self.cluster.gpu.flops * self.rates.train_efficiency),
            COLLECTIVES: role.updates * self._collective(role, moved),
            OPTIMIZER: role.updates * (traffic / bandwidth + copied),
        }

    def sync(self) -> Seconds:
        """Bucket after bucket, and nothing at the same time: rank 0 gathers, copies, sums; the store carries; engines sum."""
        policy, rollout = self.work.role("policy"), self.work.role("rollout")
        if policy is None or rollout is None:
            return {}
        model, sharding = self._model(policy), self._sharding(policy)
        size = sharding.element_bytes * model.num_parameters
        source = self.layout.nodes_of("policy")[0]
        others = len(set(self.layout.nodes_of("rollout")) - {source})
        copies = size / self.rates.store_bytes_per_s
        if not self.cluster.on_cpu:
            copies += 2 * size / self.rates.host_copy_bytes_per_s
        return {
            COLLECTIVES: self._collective(policy, size) if sharding.zero_stage == 3 else 0.0,
            CHECKSUMS: 2 * _CHECKSUM_PASSES * size / self._memory_bandwidth,
            COPIES: copies,
            # Nodes that have a bucket hand it on, so that rounds grow with the logarithm.
            NETWORK: math.ceil(math.log2(others + 1)) * size / self.rates.store_bytes_per_s,
        }

    @property
    def _memory_bandwidth(self) -> float:
        return self.cluster.gpu.memory_bytes_per_s * self.rates.decode_efficiency

    def _model(self, role: Role) -> Architecture:
        return role.architecture

    def _sharding(self, role: Role) -> Sharding:
        host = role.trained or role.frozen
        assert host is not None
        return Sharding.of(host, role.num_ranks)

    def _flops(self, model: Architecture, sequences: int, passes: Passes) -> float:
        """Of a forward pass at the expected lengths. Responses' share of a sequence is the share of its targets."""
        if not self.work.response:
            return model.forward_flops(sequences, passes.length, passes.targets)
        length = min(passes.length, self.lengths.prompt + self.lengths.response)
        return model.forward_flops(sequences, length, min(passes.targets, self.lengths.response))

    def _collective(self, role: Role, num_bytes: float) -> float:
        """A ring over the role's ranks; where they are on several nodes, the link between nodes is the narrowest."""
        ranks = role.num_ranks
        if ranks == 1:
            return 0.0
        several = len(set(self.layout.nodes_of(role.name))) > 1
        link = self.cluster.gpu.link_bytes_per_s
        if several:
            link = min(link, self.cluster.node_link_bytes_per_s)
        return num_bytes * (ranks - 1) / ranks / (link * self.rates.link_efficiency)


def _added(parts: Iterable[Seconds]) -> Seconds:
    total: Seconds = {}
    for one in parts:
        for name, seconds in one.items():
            total[name] = total.get(name, 0.0) + seconds
    return total
