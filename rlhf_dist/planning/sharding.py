"""Bytes of parameters, gradients and optimizer states under DeepSpeed, exact for every rank.

The sizes of the tensors that DeepSpeed 0.19 allocates, its padding included. `tests/unit/planning/test_exact_bytes.py` holds
them against the tensors of real engines, byte for byte.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from rlhf_dist.config.hosting import FrozenModel, TrainedModel
from rlhf_dist.distributed.deepspeed import zero
from rlhf_dist.distributed.deepspeed.optimizer import uses_cpu_adam
from rlhf_dist.models.architecture import ELEMENT_BYTES, Architecture

_ALIGNMENT = 2
"""ZeRO-1/2 pad a group's flat tensor to a multiple of this times the number of ranks."""
_STEP_COUNTER_BYTES = 4
"""torch's AdamW counts the steps of each tensor it updates in a tensor of its own, in host memory."""


@dataclass(frozen=True)
class Held:
    """Bytes of one rank."""

    gpu: int = 0
    host: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(self.gpu + other.gpu, self.host + other.host)

    @property
    def total(self) -> int:
        """Wherever they are."""
        return self.gpu + self.host


def held(num_bytes: float, on_host: bool = False) -> Held:
    """Bytes in one of the two places."""
    return Held(0, int(num_bytes)) if on_host else Held(int(num_bytes), 0)


@dataclass(frozen=True)
class Sharding:
    """What DeepSpeed is told, as far as it decides sizes. Counts are of elements."""

    zero_stage: int
    num_ranks: int
    element_bytes: int
    """Of the compute precision."""
    offload_optimizer: bool = False
    offload_param: bool = False
    contiguous_gradients: bool = True
    overlap_comm: bool = False
    reduce_bucket_size: int = 500_000_000
    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    persistence_threshold: int = 100_000
    sub_group_size: int = 1_000_000_000
    secondary_ranks: int = 1
    """Ranks of a ZeRO++ hpZ group, each of which holds a second shard of the parameters; 1 switches it off."""
    step_counter_bytes: int = _STEP_COUNTER_BYTES
    """Of each tensor that is updated."""
    keeps_fp32_gradients: bool = False
    """ZeRO-1 in bf16, states on the GPU: DeepSpeed's BF16_Optimizer, with whole fp32 gradients for good."""

    @classmethod
    def of(cls, model: TrainedModel | FrozenModel, num_ranks: int) -> Sharding:
        """Of a role's model over `num_ranks`."""
        path = model.ds_config_path if isinstance(model, TrainedModel) else None
        settings = zero.ds_config(zero_stage=model.zero_stage, precision=model.precision, path=path)
        section = settings["zero_optimization"]
        stage = model.zero_stage

        def number(key: str, default: int) -> int:
            return int(section.get(f"stage3_{key}", section.get(key, default)))

        def offloads(part: str) -> bool:
            return (section.get(part) or {}).get("device", "none") != "none"

        return cls(
            zero_stage=stage,
            num_ranks=num_ranks,
            element_bytes=ELEMENT_BYTES[model.precision],
            offload_optimizer=offloads("offload_optimizer"),
            offload_param=offloads("offload_param"),
            contiguous_gradients=bool(section.get("contiguous_gradients", True)),
            overlap_comm=bool(section.get("overlap_comm", stage == 3)),
            reduce_bucket_size=number("reduce_bucket_size", cls.reduce_bucket_size),
            prefetch_bucket_size=number("prefetch_bucket_size", cls.prefetch_bucket_size),
            max_live_parameters=number("max_live_parameters", cls.max_live_parameters),
            persistence_threshold=number("param_persistence_threshold", cls.persistence_threshold),
            sub_group_size=number("sub_group_size", cls.sub_group_size),
            secondary_ranks=number("zero_hpz_partition_size", 1),
            keeps_fp32_gradients=stage == 1 and model.precision == "bf16" and not offloads("offload_optimizer"),
            step_counter_bytes=0 if uses_cpu_adam(settings) else _STEP_COUNTER_BYTES,  # CPUAdam's are plain numbers
        )

    @property
    def accumulates_whole(self) -> bool:
        """ZeRO-1 in 16 bits without BF16_Optimizer: micro-batches add up in whole fp32 gradients, reduced at the step's end."""
        return self.zero_stage == 1 and self.element_bytes < 4 and not self.keeps_fp32_gradients

    @property
    def bucket_elements(self) -> int:
        """ZeRO-1/2: of the buckets that gradients are copied to before they are reduced."""
        return self.reduce_bucket_size * (1 + self.overlap_comm) * self.contiguous_gradients

    def shard(self, size: int) -> int:
        """Elements of a rank's shard of a parameter of `size` elements under ZeRO-3."""
        return -(-size // self.num_ranks)

    def padded(self, group: Sequence[int]) -> int:
        """Elements of a group's flat tensor under ZeRO-1/2."""
        unit = _ALIGNMENT * self.num_ranks
        return -(-sum(group) // unit) * unit


@dataclass(frozen=True)
class ModelStates:
    """Bytes of one rank of a trained or frozen model."""

    parameters: Held
    """In the compute precision: whole, or this rank's shard."""
    persistent: Held = Held()
    """ZeRO-3: small parameters, which stay whole on every rank after their first use; and hpZ's second shards."""
    gradients: Held = Held()
    """At their most between passes: when the last backward pass of a step has ended."""
    gradients_kept: Held = Held()
    """Of these, what stays between steps."""
    optimizer: Held = Held()
    """fp32 master weights, two moments, step counters."""
    buffers: Held = Held()
    """Kept by DeepSpeed for reducing and offloading."""


def frozen_states(model: Architecture, sharding: Sharding) -> ModelStates:
    """Of a model that only runs forward."""
    size = sharding.element_bytes
    if sharding.zero_stage < 3:
        return ModelStates(held(size * model.num_parameters))
    return ModelStates(held(size * _shards(model.sizes, sharding)), _persistent(model.sizes, sharding))


def trained_states(model: Architecture, sharding: Sharding, rank: int) -> ModelStates:
    """Of a trained model on `rank`."""
    stage = {0: _stage0, 1: _stages12, 2: _stages12, 3: _stage3}[sharding.zero_stage]
    return stage(model.groups, model.frozen_sizes, sharding, rank)


def largest_states(model: Architecture, sharding: Sharding) -> ModelStates:
    """Of the rank of a trained model that holds the most. (Only fp32 gradients under ZeRO-1/2 differ by rank.)"""
    differs = sharding.zero_stage in (1, 2) and sharding.element_bytes == 4 and not sharding.offload_optimizer
    ranks = range(sharding.num_ranks) if differs else range(1)
    return max((trained_states(model, sharding, rank) for rank in ranks), key=lambda s: s.gradients.gpu)


def average_bytes(model: Architecture, sharding: Sharding) -> Held:
    """Of a moving average of the weights (`engine.average`) on one rank: fp32, sharded whatever the stage."""
    return held(4 * _shards(model.sizes, sharding), on_host=sharding.offload_param)


def _shards(sizes: Sequence[int], sharding: Sharding) -> int:
    return sum(sharding.shard(size) for size in sizes)


def _persistent(sizes: Sequence[int], sharding: Sharding) -> Held:
    """Whole copies beside the shards; a rank that is alone views its shard instead, unless that is in host memory."""
    small = (size for size in sizes if size <= sharding.persistence_threshold)
    whole = sum(sharding.shard(size) * sharding.num_ranks for size in small)
    if sharding.num_ranks == 1 and not sharding.offload_param:
        whole = 0
    second = 0
    if sharding.secondary_ranks > 1:
        second = sum(sharding.shard(size) * sharding.num_ranks // sharding.secondary_ranks for size in sizes)
    return held(sharding.element_bytes * (whole + second))


def _stage0(groups: Sequence[Sequence[int]], frozen: Sequence[int], sharding: Sharding, rank: int) -> ModelStates:
    """Whole on every rank, and gradients in the compute precision."""
    count, size = sum(map(sum, groups)), sharding.element_bytes
    master = 4 * count if size < 4 else 0  # in fp32 AdamW updates the parameters themselves
    counters = held(sharding.step_counter_bytes * sum(map(len, groups)), on_host=True)
    return ModelStates(
        parameters=held(size * (count + sum(frozen))),
        gradients=held(size * count),
        optimizer=held(master + 8 * count) + counters,
    )


def _stages12(groups: Sequence[Sequence[int]], frozen: Sequence[int], sharding: Sharding, rank: int) -> ModelStates:
    size, offloads = sharding.element_bytes, sharding.offload_optimizer
    padded = [sharding.padded(group) for group in groups]
    shards = [flat // sharding.num_ranks for flat in padded]
    counters = held(sharding.step_counter_bytes * len(groups), on_host=True)
    optimizer = held(12 * sum(shards), on_host=offloads) + counters
    kept, buffers = Held(), Held()
    if sharding.keeps_fp32_gradients:
        # Whole fp32 gradients that stay, and those of the backward passes in bf16.
        kept = held(4 * sum(padded))
        gradients = kept + held(size * sum(map(sum, groups)))
    elif size < 4:
        gradients = held(4 * sum(shards))
        if sharding.accumulates_whole and sharding.num_ranks > 1:
            gradients += held(4 * sharding.bucket_elements)  # the whole ones lie there until the step is taken
    else:
        # The parameters that the partition meets, each with its whole gradient.
        pairs = zip(groups, shards, strict=True)
        gradients = held(4 * sum(_met(group, rank * shard, shard) for group, shard in pairs))
    if offloads:
        largest = max(map(max, groups))
        kept = held(4 * sum(shards), on_host=True)
        gradients += kept
        if size == 4:
            kept = (
                gradients  # without conversion to fp32 DeepSpeed keeps the GPU's gradients until the next backward pass
            )
        # Parameters on their way back to the GPU, and one gradient on its way to the host at both ends.
        buffers = held(size * (sum(shards) + largest), on_host=True) + held(size * largest)
    parameters = held(size * (sum(padded) + sum(frozen)))
    return ModelStates(parameters, Held(), gradients, kept, optimizer, buffers)


def _met(group: Sequence[int], start: int, shard: int) -> int:
    """Elements of the parameters that [start, start + shard) of the group's flat tensor meets, and of the padding behind."""
    ends = list(accumulate(group))
    first, last = bisect_right(ends, start), bisect_left(ends, start + shard)
    met = group[first : last + 1]
    return sum(met) + max(0, start + shard - max(start, ends[-1]))


def _stage3(groups: Sequence[Sequence[int]], frozen: Sequence[int], sharding: Sharding, rank: int) -> ModelStates:
    size, offloads = sharding.element_bytes, sharding.offload_optimizer
    sizes = [number for group in groups for number in group]
    count = _shards(sizes, sharding)
    counters = held(
        sharding.step_counter_bytes * sum(_num_sub_groups(group, sharding) for group in groups), on_host=True
    )
    kept = held(4 * count, on_host=offloads)
    if offloads:
        kept += held(4 * count, on_host=True)  # what AdamW reads, which is allocated for good there
    bucket = sharding.reduce_bucket_size if sharding.contiguous_gradients else 0
    return ModelStates(
        parameters=held(size * (count + _shards(frozen, sharding)), on_host=sharding.offload_param),
        persistent=_persistent([*sizes, *frozen], sharding),
        gradients=kept,
        gradients_kept=kept,
        optimizer=held(12 * count, on_host=offloads) + counters,
        buffers=held(size * bucket),
    )


def _num_sub_groups(group: Sequence[int], sharding: Sharding) -> int:
    """Tensors that a group's shards are laid into."""
    shards = [sharding.shard(size) for size in group]
    if sharding.sub_group_size >= sum(shards):
        return 1
    number, filled = 0, 0
    for i, shard in enumerate(shards):
        filled += shard
        if filled >= sharding.sub_group_size or i == len(shards) - 1:
            number, filled = number + 1, 0
    return number
