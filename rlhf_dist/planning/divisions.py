"""Whole layouts of a run on the GPUs there are: which roles share GPUs, how the trained ones are sharded, how much they take at
a time. They are candidates; `suggest` plans each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from rlhf_dist.models.architecture import ELEMENT_BYTES
from rlhf_dist.planning.plan import Plan
from rlhf_dist.planning.roles import Role

Change = dict[str, object]
"""Key of the configuration → new value."""
Division = dict[str, tuple[int, float]]
"""Role → (ranks, share of a GPU)."""

_PPO_PARTS = (
    # What changes most in an iteration is the policy; on GPUs of its own it is sharded over few ranks, but alone.
    ((("policy",), 1), (("value", "reference", "reward", "rollout"), 1)),
    ((("policy",), 3), (("value",), 3), (("reference", "reward", "rollout"), 2)),
    # A rollout engine of one GPU holds a whole copy of the policy: on small GPUs there is no room beside it.
    ((("policy",), 3), (("value", "reference", "reward"), 3), (("rollout",), 2)),
    ((("policy", "value", "reference", "reward"), 3), (("rollout",), 1)),
    ((("policy",), 3), (("value",), 3), (("reference", "reward"), 1), (("rollout",), 1)),
    # Of the largest models, no two ranks that load a checkpoint have room in host memory for each GPU.
    ((("policy",), 6), (("value",), 6), (("reference",), 1), (("reward",), 1), (("rollout",), 2)),
)
"""Divisions of PPO's roles: roles that share GPUs, and their part of all GPUs. Roles can share in one group only
(`placement.plan_placement`)."""
_SIZES = ((None, None), (4, 16), (1, 4))
"""Sequences in a micro-batch, and responses that an engine generates at a time; None: as they are."""
_TENSOR_PARALLEL = (1, 2, 4, 8)
"""GPUs that share a copy of the policy."""


def layouts(plan: Plan, offload_files: Mapping[int, str]) -> Iterator[Change]:
    """Changes that lay the run out over all GPUs. Policy and value are sharded each in its own way.

    Args:
        offload_files: ZeRO stage → a DeepSpeed file that offloads to host memory.
    """
    names = [role.name for role in plan.work.roles]
    trained = [role for role in plan.work.roles if role.trained is not None]
    stages: list[tuple[int, str | None]] = [(2, None), (3, None), *offload_files.items()]
    for division in divisions(names, plan.cluster.num_gpus):
        for chosen, checkpointing, (rows, responses), engines in itertools.product(
            list(itertools.product(stages, repeat=len(trained))), (False, True), _SIZES, _engines(plan, division)
        ):
            change: Change = dict(engines)
            for role in plan.work.roles:
                ranks, share = division[role.name]
                change |= {f"{role.key}.num_ranks": ranks, f"{role.key}.gpus_per_rank": share}
                if role.frozen is not None:
                    change[f"{role.key}.zero_stage"] = 3 if ranks > 1 else 0
                change |= _sizes(role, rows, responses)
            for role, (stage, file) in zip(trained, chosen, strict=True):
                change |= {f"{role.key}.zero_stage": stage, f"{role.key}.ds_config_path": file}
                change[f"{role.key}.gradient_checkpointing"] = checkpointing
            yield change


def tensor_parallel_sizes(role: Role, gpus_per_node: int) -> list[int]:
    """Numbers of GPUs of a node over which vLLM can divide a role's model: they divide its attention heads."""
    heads = role.architecture.num_heads
    return [size for size in _TENSOR_PARALLEL if size <= gpus_per_node and heads % size == 0]


def _engines(plan: Plan, division: Division) -> list[Change]:
    """Ways to make engines of a rollout role's ranks, of GPUs that hold their weights; with transformers there is one."""
    role = next((role for role in plan.work.roles if role.rollout is not None), None)
    if role is None or role.rollout is None or role.rollout.engine != "vllm":
        return [{}]
    ranks, _ = division[role.name]
    sizes = tensor_parallel_sizes(role, plan.cluster.gpus_per_node)
    weights = ELEMENT_BYTES[role.precision] * role.architecture.num_parameters
    sizes = [size for size in sizes if ranks % size == 0 and weights <= size * plan.cluster.gpu_memory_bytes]
    return [{f"{role.key}.tensor_parallel_size": size} for size in sizes]


def _sizes(role: Role, rows: int | None, responses: int | None) -> Change:
    """What a role takes at a time, where it is less than now."""
    if role.rollout is not None:
        return {} if responses is None else {f"{role.key}.batch_size": min(responses, role.rollout.batch_size)}
    model = role.trained or role.frozen
    if model is None or rows is None:
        return {}
    if model.micro_batch_tokens is None:
        return {f"{role.key}.micro_batch_size": min(rows, model.micro_batch_size)}
    passes = [*role.update, *([role.score] if role.score else [])]
    longest = max(p.length * p.sequences_per_row for p in passes)
    return {f"{role.key}.micro_batch_tokens": min(rows * longest, model.micro_batch_tokens)}


def divisions(names: list[str], num_gpus: int) -> Iterator[Division]:
    """All GPUs for all roles; for PPO's roles, also divided among groups of them."""
    yield {name: (num_gpus, even_share(len(names))) for name in names}
    if set(names) != {"policy", "value", "reference", "reward", "rollout"}:
        return
    for parts in _PPO_PARTS:
        if len(parts) <= num_gpus:
            counts = _apportioned(num_gpus, [weight for _, weight in parts])
            yield {
                name: (count, even_share(len(roles)))
                for (roles, _), count in zip(parts, counts, strict=True)
                for name in roles
            }


def _apportioned(number: int, weights: list[int]) -> list[int]:
    """`number` in parts as the weights, at least 1 each: what is left over goes one by one to the part that is most behind."""
    counts = [max(1, number * weight // sum(weights)) for weight in weights]
    while sum(counts) != number:
        step = 1 if sum(counts) < number else -1
        behind = [
            step * (number * weight / sum(weights) - count) for weight, count in zip(weights, counts, strict=True)
        ]
        allowed = [i for i, count in enumerate(counts) if count + step >= 1]
        counts[max(allowed, key=lambda i: behind[i])] += step
    return counts


def even_share(number: int) -> float:
    """Of a GPU, in two digits, rounded down: the sum may not exceed 1."""
    return int(100 / number) / 100
