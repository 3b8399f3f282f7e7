"""What would make a run fit, and a placement for the GPUs there are. All that is suggested was planned again, and fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from rlhf_dist.config.hosting import TrainedModel
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.planning.divisions import Change, even_share, layouts, tensor_parallel_sizes
from rlhf_dist.planning.plan import Plan
from rlhf_dist.planning.roles import AnyConfig, Role

Replan = Callable[[AnyConfig], Plan]

_MOST_TRIES = 1500
_OFFLOAD_FILES = {2: "ds_configs/zero2_offload.json", 3: "ds_configs/zero3_offload.json"}


@dataclass(frozen=True)
class Suggestion:
    """A change, and the run with it."""

    change: Change
    plan: Plan

    @property
    def overrides(self) -> list[str]:
        """As they are written on the command line."""
        return [word for key, value in self.change.items() for word in (f"--{key}", _word(value))]


class Counted:
    """Plans configurations, and counts them."""

    def __init__(self, replan: Replan) -> None:
        self.number = 0
        self._replan = replan

    def __call__(self, config: AnyConfig) -> Plan:
        self.number += 1
        return self._replan(config)


def _word(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _new_values(config: AnyConfig, change: Change) -> Change:
    """Without what the configuration says already."""
    now = config.model_dump(mode="json")

    def value_of(key: str) -> object:
        value: object = now
        for section in key.split("."):
            value = value[section] if isinstance(value, dict) else None
        return value

    def is_said(key: str, value: object) -> bool:
        # A configuration has its paths absolute.
        is_path = key.endswith(".ds_config_path") and value is not None
        return value_of(key) == (str(Path(str(value)).absolute()) if is_path else value)

    return {key: value for key, value in change.items() if not is_said(key, value)}


def changed(config: AnyConfig, change: Change) -> AnyConfig:
    """The configuration with other values.

    Raises:
        ValidationError: its schema rejects them.
    """
    values = config.model_dump()
    for key, value in change.items():
        *sections, name = key.split(".")
        target = values
        for section in sections:
            target = target[section]
        target[name] = value
    return type(config).model_validate(values)


def sufficient_changes(config: AnyConfig, plan: Plan, replan: Replan, count: int = 4) -> list[Suggestion]:
    """The first few changes that make the run fit: single ones, then two at a time, then all that help until it does."""
    singles = list(_singles(plan))
    found: list[Suggestion] = []
    tries = 0
    for change in _then_pairs(singles):
        if len(found) == count or tries == _MOST_TRIES:
            break
        if any(change.items() >= suggestion.change.items() for suggestion in found):
            continue  # more than enough
        tries += 1
        again = _tried(config, change, replan)
        if again is not None and again.fits:
            found.append(Suggestion(_new_values(config, change), again))
    return found or _greedy(config, plan, replan)


def _then_pairs(singles: list[Change]) -> Iterator[Change]:
    yield from singles
    for one, other in itertools.combinations(singles, 2):
        if not one.keys() & other.keys():
            yield one | other


def _greedy(config: AnyConfig, plan: Plan, replan: Replan) -> list[Suggestion]:
    """Take the change that lowers the excess most, again and again."""
    change: Change = {}
    now = plan
    while not now.fits:
        options = [(change | more, _tried(config, change | more, replan)) for more in _singles(now)]
        lower = [(_excess(again), i) for i, (_, again) in enumerate(options) if again is not None]
        if not lower or min(lower)[0] >= _excess(now):
            return []
        change, again = options[min(lower)[1]]
        assert again is not None
        now = again
    return [Suggestion(_new_values(config, change), now)]


def _excess(plan: Plan) -> int:
    """Bytes that are too many, over all GPUs and nodes."""
    host_limit = plan.cluster.host_memory_bytes
    gpus = sum(max(0, need - plan.cluster.gpu_memory_bytes) for need in plan.gpus.values())
    hosts = sum(max(0, need - host_limit) for need in plan.hosts.values()) if host_limit is not None else 0
    missing = max(0.0, plan.layout.placement.total_gpus - plan.cluster.num_gpus) if not plan.cluster.on_cpu else 0
    return int(gpus + hosts + missing * plan.cluster.gpu_memory_bytes)


def _tried(config: AnyConfig, change: Change, replan: Replan) -> Plan | None:
    try:
        return replan(changed(config, change))
    except (ValidationError, ConfigError):
        return None


def _singles(plan: Plan) -> Iterator[Change]:
    """Changes of the roles that are too large, those that cost least first."""
    names = plan.crowded or [role.name for role in plan.work.roles]
    roles = [role for name in names if (role := plan.work.role(name)) is not None]
    for kind in (
        _checkpointing,
        _smaller_passes,
        _more_sharding,
        _larger_engines,
        _smaller_part_of_gpu,
        _own_gpus,
        _more_ranks,
        _shared_gpus,
        _fewer_ranks,
        _offload,
    ):
        for role in roles:
            yield from kind(role, plan)


def _checkpointing(role: Role, plan: Plan) -> Iterator[Change]:
    if role.trained is not None and not role.trained.gradient_checkpointing:
        yield {f"{role.key}.gradient_checkpointing": True}


def _smaller_passes(role: Role, plan: Plan) -> Iterator[Change]:
    """Halves, down to one row (with a token budget: one longest row)."""
    if role.rollout is not None:
        size = min(role.rollout.batch_size, max(1, -(-plan.work.responses // role.num_engines))) // 2
        while size >= 1:
            yield {f"{role.key}.batch_size": size}
            size //= 2
        return
    model = role.trained or role.frozen
    passes = [*role.update, *([role.score] if role.score else [])]
    if model is None or not passes:
        return
    if model.micro_batch_tokens is not None:
        least = max(p.length * p.sequences_per_row for p in passes)
        tokens = model.micro_batch_tokens // 2
        while tokens >= least:
            yield {f"{role.key}.micro_batch_tokens": tokens}
            tokens //= 2
        return
    rows = max(role.micro_sequences(p) // p.sequences_per_row for p in passes) // 2
    while rows >= 1:
        yield {f"{role.key}.micro_batch_size": rows}
        rows //= 2


def _more_sharding(role: Role, plan: Plan) -> Iterator[Change]:
    if role.num_ranks == 1:
        return
    if role.trained is not None and role.trained.ds_config_path is None:
        for stage in range(role.trained.zero_stage + 1, 4):
            yield {f"{role.key}.zero_stage": stage}
    if role.frozen is not None and role.frozen.zero_stage == 0:
        yield {f"{role.key}.zero_stage": 3}


def _larger_engines(role: Role, plan: Plan) -> Iterator[Change]:
    """A copy of the model over more GPUs: with as many ranks as now, or as many as make an engine."""
    if role.rollout is None or role.rollout.engine != "vllm" or role.inline:
        return
    for size in tensor_parallel_sizes(role, plan.cluster.gpus_per_node):
        if size > role.tensor_parallel_size:
            yield {f"{role.key}.tensor_parallel_size": size, f"{role.key}.num_ranks": -(-role.num_ranks // size) * size}


def _smaller_part_of_gpu(role: Role, plan: Plan) -> Iterator[Change]:
    """What the other roles on its GPUs leave of them."""
    needs = plan.memory[role.name]
    if needs.engine is None or role.rollout is None or plan.cluster.on_cpu:
        return
    limit = plan.cluster.gpu_memory_bytes
    left = math.floor(100 * (limit - plan.others_bytes(role.name)) / limit) / 100
    if needs.gpu_bytes <= left * limit < needs.engine.taken(limit):
        yield {f"{role.key}.vllm_options": {**role.rollout.vllm_options, "gpu_memory_utilization": left}}


def _own_gpus(role: Role, plan: Plan) -> Iterator[Change]:
    if role.placement.gpus_per_rank < 1 and not role.inline:
        yield {f"{role.key}.gpus_per_rank": 1.0}


def _more_ranks(role: Role, plan: Plan) -> Iterator[Change]:
    """As many as there are GPUs; frozen models are then sharded, too."""
    if role.inline or role.rollout is not None:
        return
    count = plan.cluster.num_gpus
    for ranks in sorted({min(2 * role.num_ranks, count), count}):
        if ranks > role.num_ranks:
            yield {f"{role.key}.num_ranks": ranks}
            if role.frozen is not None and role.frozen.zero_stage == 0:
                yield {f"{role.key}.num_ranks": ranks, f"{role.key}.zero_stage": 3}
            if role.trained is not None and role.trained.zero_stage < 3 and role.trained.ds_config_path is None:
                yield {f"{role.key}.num_ranks": ranks, f"{role.key}.zero_stage": 3}


def _shared_gpus(role: Role, plan: Plan) -> Iterator[Change]:
    """Where there are too few GPUs: all roles on the same ones."""
    roles = plan.work.roles
    if plan.layout.misfit and len(roles) > 1 and role is roles[0] and not role.inline:
        ranks: Change = {f"{other.key}.num_ranks": min(other.num_ranks, plan.cluster.num_gpus) for other in roles}
        yield ranks | {f"{other.key}.gpus_per_rank": even_share(len(roles)) for other in roles}


def _fewer_ranks(role: Role, plan: Plan) -> Iterator[Change]:
    """Where a node's memory is short: each rank reads the whole checkpoint there."""
    if plan.lacks_host_memory and role.num_ranks > 1:
        yield {f"{role.key}.num_ranks": role.num_ranks // 2}


def _offload(role: Role, plan: Plan) -> Iterator[Change]:
    """With the files of ds_configs/, where the command runs beside them."""
    model = role.trained
    if not isinstance(model, TrainedModel) or model.ds_config_path is not None:
        return
    for stage, file in _OFFLOAD_FILES.items():
        if Path(file).is_file():
            yield {f"{role.key}.zero_stage": stage, f"{role.key}.ds_config_path": file}


def placements(config: AnyConfig, plan: Plan, replan: Replan) -> list[Suggestion]:
    """Placements for all GPUs of the cluster that fit, the fastest on paper first."""
    found, seen = [], set()
    offload = {3: _OFFLOAD_FILES[3]} if Path(_OFFLOAD_FILES[3]).is_file() else {}
    for layout in layouts(plan, offload):
        change = _new_values(config, layout)
        if (key := frozenset(change.items())) in seen:
            continue
        seen.add(key)
        again = _tried(config, change, replan)
        if again is not None and again.fits:
            found.append(Suggestion(change, again))
    return sorted(found, key=lambda suggestion: suggestion.plan.timeline.total)
