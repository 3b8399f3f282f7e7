"""How long an iteration takes, on paper: datasheet rates times efficiencies, phase by phase.

A bound for comparing layouts, not a promise: the efficiencies are assumptions until `calibrated` from a real run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rlhf_dist.models.architecture import Architecture
from rlhf_dist.planning import generation, sync
from rlhf_dist.planning.hardware import Cluster
from rlhf_dist.planning.layout import Layout, slowest_link
from rlhf_dist.planning.memory import RoleMemory
from rlhf_dist.planning.rates import COLLECTIVES, Lengths, Rates, Seconds
from rlhf_dist.planning.roles import Passes, Role, Work
from rlhf_dist.planning.sharding import Sharding
from rlhf_dist.planning.turns import moved_bytes

COMPUTING = "computing"
OPTIMIZER = "the optimizer's memory traffic"
MOVES = "copies between GPU and host memory of roles that take turns"


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


def timeline(
    work: Work,
    layout: Layout,
    cluster: Cluster,
    rates: Rates,
    lengths: Lengths,
    memory: Mapping[str, RoleMemory] | None = None,
) -> Timeline:
    """Estimate an iteration (of a supervised run: an optimizer step; of an evaluation: one batch). `memory`: of each role, for
    what those that take turns move."""
    clock = _Clock(work, layout, cluster, rates, lengths)
    moves = _moves(layout, memory, rates) if memory and not cluster.on_cpu else {}
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
        phase: {
            part: seconds * rates.factors.get(phase, 1.0)
            for part, seconds in (parts | ({MOVES: moves[phase]} if moves.get(phase) else {})).items()
        }
        for phase, parts in phases.items()
    }
    return Timeline(scaled)


def _moves(layout: Layout, memory: Mapping[str, RoleMemory], rates: Rates) -> Seconds:
    """Phase → seconds of copies between GPU and host memory, on the GPU that has most of them, of roles that take turns."""
    found: Seconds = {}
    for roles in layout.shares().values():
        moved = moved_bytes([memory[role] for role in roles if memory[role].role.takes_turns])
        moved["update"] = moved.pop("policy") + moved.pop("value")
        for phase, size in moved.items():
            found[phase] = max(found.get(phase, 0.0), size / rates.host_copy_bytes_per_s)
    return found


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
        """See `generation.seconds`."""
        return generation.seconds(role, self.work, self.cluster, self.rates, self.lengths)

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
        """See `sync.seconds`."""
        return sync.seconds(self.work, self.layout, self.cluster, self.rates)

    @property
    def _memory_bandwidth(self) -> float:
        return self.rates.memory_bandwidth(self.cluster.gpu)

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
        """A ring over the role's ranks."""
        link = slowest_link(self.layout, self.cluster, role.name)
        return self.rates.ring_s(num_bytes, role.num_ranks, link)


def _added(parts: Iterable[Seconds]) -> Seconds:
    total: Seconds = {}
    for one in parts:
        for name, seconds in one.items():
            total[name] = total.get(name, 0.0) + seconds
    return total
