"""A plan as tables of words and numbers, and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from rlhf_dist.planning import turns
from rlhf_dist.planning.activations import ERROR_BAND
from rlhf_dist.planning.allowances import CONTEXT_BYTES, FRAGMENTATION, GRAPH_BYTES, NCCL_BYTES
from rlhf_dist.planning.engines import determinism
from rlhf_dist.planning.memory import RoleMemory
from rlhf_dist.planning.plan import Plan
from rlhf_dist.planning.roles import Role

PHASES = ("load", "generate", "score", "update", "step", "sync", "save")
_COLUMNS = ("parameters", "gradients", "optimizer", "buffers", "activations", "logits")


@dataclass(frozen=True)
class Table:
    """A title, a header and rows of words."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def gigabytes(num_bytes: float) -> str:
    """In 10^9 bytes."""
    if not num_bytes:
        return "–"
    return f"{num_bytes / 1e9:.1f}" if num_bytes >= 5e7 else "<0.1"


def duration(seconds: float) -> str:
    """To two or three digits."""
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2g}"


def tables(plan: Plan) -> list[Table]:
    """All that a reader needs of a plan."""
    return [sizes(plan), memory(plan), phases(plan), shares(plan), *rollouts(plan), traffic(plan), times(plan)]


def sizes(plan: Plan) -> Table:
    """Derived batch sizes."""
    rows = []
    for role in plan.work.roles:
        for name, passes in (("a step", role.update[:1]), ("scoring", (role.score,) if role.score else ())):
            for p in passes:
                rows.append(_size_row(role, name, p))
        for p in role.update[1:]:
            rows.append(_size_row(role, "a step (PTX)", p))
        if role.rollout is not None:
            each = -(-plan.work.responses // role.num_engines)
            at_once = min(each, role.rollout.batch_size)
            batches = f"{-(-each // max(1, at_once))} × {at_once}"
            if role.rollout.engine == "vllm":
                batches = f"{at_once} at once"
            tokens = plan.work.responses * (plan.work.prompt + plan.work.response)
            idle = str(plan.idle_ranks.get(role.name, 0))
            cells = (str(plan.work.responses), f"{tokens:,}", str(role.num_ranks), str(each))
            rows.append((role.name, "generating", *cells, batches, idle))
    header = ("role", "work", "sequences", "tokens at most", "ranks", "a rank", "micro-batches a rank", "idle ranks")
    note = f"Optimizer steps an iteration: {plan.work.updates}."
    if any(role.tensor_parallel_size > 1 for role in plan.work.roles):
        note += " The ranks of an engine generate the same sequences together."
    return Table("Batches", header, rows, note)


def _size_row(role: Role, name: str, passes: Any) -> tuple[str, ...]:
    return (
        role.name,
        name,
        str(passes.sequences),
        f"{passes.sequences * passes.length:,}",
        str(role.num_ranks),
        str(role.sequences_per_rank(passes)),
        f"{role.num_micro_batches(passes)} × {role.micro_sequences(passes)}",
        str(role.idle_ranks(passes)),
    )


def memory(plan: Plan) -> Table:
    """Each role in the phase that takes most of its GPU."""
    rows = []
    for name, needs in plan.memory.items():
        items = needs.phases[needs.worst_phase]
        known = [gigabytes(items[column].gpu) if column in items else "–" for column in _COLUMNS]
        rest = sum(held.gpu for item, held in items.items() if item not in _COLUMNS)
        last = (gigabytes(rest), gigabytes(0 if plan.cluster.on_cpu else needs.allowance_bytes))
        whole = needs.gpu_bytes - (needs.allowance_bytes if plan.cluster.on_cpu else 0)
        rows.append((name, _layout_words(needs.role), needs.worst_phase, *known, *last, gigabytes(whole)))
    below, above = ERROR_BAND
    note = (
        "GB (10^9 bytes) of one rank. Parameters, gradients and optimizer states are exact; real peaks of activations and "
        f"logits lay between {below:+.0%} and {above:+.0%} of the estimate. Other: KV cache, gathered parameters, sync "
        f"buckets, AdamW's intermediate results. Allowance: {CONTEXT_BYTES / 1e9:g} GB CUDA context, {NCCL_BYTES / 1e9:g} GB "
        f"NCCL, {FRAGMENTATION:.0%} fragmentation"
        + (
            f", {GRAPH_BYTES / 1e9:g} GB CUDA graphs of vLLM."
            if any(needs.engine for needs in plan.memory.values())
            else "."
        )
    )
    for name, needs in plan.memory.items():
        if needs.role.trained is not None and needs.model.frozen:
            note += f" Of {name}, {needs.model.num_trained:,} of {needs.model.num_held:,} parameters are trained."
    header = ("role", "layout", "phase", "param.", "grad.", "optim.", "buffers", "activ.", "logits", "other")
    return Table("Memory of a rank", (*header, "allow.", "GPU"), rows, note)


def _layout_words(role: Role) -> str:
    host = role.trained or role.frozen
    if role.tensor_parallel_size > 1:
        return f"{role.num_engines} × copy on {role.tensor_parallel_size} GPUs"
    words = f"{role.num_ranks} × "
    words += "whole copy" if host is None or (role.frozen and not host.zero_stage) else f"ZeRO-{host.zero_stage}"
    if role.trained is not None and role.trained.ds_config_path is not None:
        words += f" ({role.trained.ds_config_path.stem})"
    return words


def phases(plan: Plan) -> Table:
    """Each role's total in each phase."""
    there = [phase for phase in PHASES if any(phase in needs.phases for needs in plan.memory.values())]
    rows = []
    for name, needs in plan.memory.items():
        cells = [_phase_cell(needs, phase) for phase in there]
        rows.append((name, *cells))
    return Table(
        "Phases",
        ("role", *there),
        rows,
        "GB of one rank: GPU, and after + host memory, without allowance. A process's allocator keeps what it once had, so "
        "that a GPU has to hold every role's worst phase at once. update: backward passes; step: the optimizer."
        + _turns(plan),
    )


def _turns(plan: Plan) -> str:
    """What roles that take turns hold together."""
    roles = [needs for needs in plan.memory.values() if needs.role.takes_turns]
    if not roles:
        return ""
    together = ", ".join(f"{phase} {gigabytes(size)}" for phase, size in turns.together(roles).items())
    names = ", ".join(needs.role.name for needs in roles)
    return f" But {names} take turns (colocate), and hold together: {together}."


def _phase_cell(needs: RoleMemory, phase: str) -> str:
    if phase not in needs.phases:
        return "–"
    total = needs.total(phase)
    return gigabytes(total.gpu) + (f" + {gigabytes(total.host)}" if total.host >= 5e7 else "")


def shares(plan: Plan) -> Table:
    """What the GPUs, or the nodes, have to hold."""
    if plan.cluster.on_cpu:
        limit = plan.cluster.host_memory_bytes
        rows = [
            (f"node {node}", gigabytes(need), gigabytes(limit or 0), _verdict(need, limit))
            for node, need in plan.hosts.items()
        ]
        return Table("This machine", ("node", "needs", "has", ""), rows, "GB of host memory, all ranks together.")
    groups: dict[tuple[str, ...], list[int]] = {}
    for device, roles in plan.layout.shares().items():
        groups.setdefault(tuple(roles), []).append(plan.gpus[device])
    limit = plan.cluster.gpu_memory_bytes
    rows = [
        (str(len(needs)), " + ".join(roles), gigabytes(max(needs)), gigabytes(limit), _verdict(max(needs), limit))
        for roles, needs in groups.items()
    ]
    used = sum(map(len, groups.values()))
    if used < plan.cluster.num_gpus:
        rows.append((str(plan.cluster.num_gpus - used), "nobody", "–", gigabytes(limit), ""))
    most, there = max(plan.hosts.values(), default=0), plan.cluster.host_memory_bytes
    source = plan.cluster.host_memory_source
    known = f"{gigabytes(most)} of {gigabytes(there or 0)} GB" + (f" ({source})" if source else "")
    note = f"Host memory of the fullest node: {known if there else f'{gigabytes(most)} GB (not checked)'}."
    return Table(
        f"{plan.cluster.num_gpus} GPUs ({plan.cluster.num_nodes} × {plan.cluster.gpus_per_node} {plan.cluster.gpu.name})",
        ("GPUs", "roles on each", "need, GB", "have, GB", ""),
        rows,
        note,
    )


def _verdict(need: int, limit: int | None) -> str:
    return "" if limit is None else "fits" if need <= limit else "DOES NOT FIT"


def rollouts(plan: Plan) -> list[Table]:
    """Engines of the rollout role, and what holds of their responses; nothing of a run that has none."""
    tables = []
    for name, needs in plan.memory.items():
        role, engine = needs.role, needs.engine
        if role.rollout is None:
            continue
        note = f"{determinism(role)}."
        row = (name, role.rollout.engine, str(role.num_engines), str(role.tensor_parallel_size))
        if engine is None:
            each = min(role.rollout.batch_size, -(-plan.work.responses // role.num_engines))
            row += (gigabytes(needs.phases["generate"]["parameters"].gpu), "–", str(each), "–")
        else:
            fit = "–" if plan.cluster.on_cpu else f"{engine.fit_at_once(plan.cluster.gpu_memory_bytes):,}"
            row += (gigabytes(engine.weights), f"{engine.sequence / 1e9:.3g}", str(engine.asked_at_once), fit)
            taken = gigabytes(engine.taken(plan.cluster.gpu_memory_bytes))
            note = (
                f"GB of one GPU; a sequence is one of {engine.longest} tokens, the longest. vLLM takes {taken} GB of each GPU "
                f"when it starts (gpu_memory_utilization): what it needs for nothing else becomes KV cache. {note}"
            )
        header = (
            "role",
            "engine",
            "engines",
            "GPUs of each",
            "weights",
            "KV cache of a sequence",
            "at once",
            "fit at once",
        )
        tables.append(Table("Rollouts", header, [row], note))
    return tables


def traffic(plan: Plan) -> Table:
    """Object store, weight sync, and disk."""
    rows = []
    if plan.sync is not None:
        took = duration(plan.timeline.seconds["sync"])
        rows.append(("weight sync, an iteration", gigabytes(plan.sync.num_bytes), f"{plan.sync.words}; {took} s"))
    rows.append(("tokens and numbers, an iteration", gigabytes(plan.batch_bytes), "batches between driver and roles"))
    for name, needs in plan.memory.items():
        if needs.checkpoint_bytes:
            rows.append((f"a checkpoint of {name}", gigabytes(needs.checkpoint_bytes), "on disk, all ranks"))
            rows.append((f"the saved model of {name}", gigabytes(needs.model_bytes), "on disk"))
    return Table("Traffic and disk", ("what", "GB", ""), rows)


def times(plan: Plan) -> Table:
    """One iteration."""
    seconds, total = plan.timeline.seconds, plan.timeline.total
    rows = []
    for phase, parts in plan.timeline.phases.items():
        most = max(parts, key=lambda part: parts[part])
        share = parts[most] / seconds[phase] if seconds[phase] else 0
        rows.append((phase, duration(seconds[phase]), f"{seconds[phase] / total:.0%}", f"{most} ({share:.0%})"))
    rows.append(("iteration", duration(total), "100%", f"bottleneck: {plan.timeline.bottleneck}"))
    source = "calibrated by a run" if plan.rates.factors else "datasheet rates and assumed efficiencies, not measured"
    note = (
        f"Seconds, from {source}; prompts of {plan.lengths.prompt:g} and responses of {plan.lengths.response:g} tokens."
        if plan.work.response
        else f"Seconds of one optimizer step, from {source}."
    )
    return Table("Time of an iteration", ("phase", "s", "share", "most of it goes into"), rows, note)


def scaling(plans: Sequence[Plan]) -> Table:
    """The run on other numbers of GPUs."""
    first, rows = plans[0], []
    for plan in plans:
        faster = first.timeline.total / plan.timeline.total
        efficiency = faster * first.cluster.num_gpus / plan.cluster.num_gpus
        idle = ", ".join(f"{name} {count}" for name, count in plan.idle_ranks.items()) or "–"
        cells = (duration(plan.timeline.total), f"{faster:.2f}", f"{efficiency:.0%}", idle, plan.timeline.bottleneck)
        rows.append((f"{plan.cluster.num_gpus:,}", *cells, "yes" if plan.fits else "no"))
    note = f"Ranks in proportion, the global batch unchanged. {stops(plans)}"
    return Table("Scale", ("GPUs", "s", "times as fast", "efficiency", "idle ranks", "bottleneck", "fits"), rows, note)


def stops(plans: Sequence[Plan]) -> str:
    """In words: from where on more GPUs do not pay."""
    for before, after in pairwise(plans):
        grown = after.cluster.num_gpus / before.cluster.num_gpus
        if before.timeline.total / after.timeline.total < 1 + (grown - 1) / 4:
            idle = f"; idle ranks: {', '.join(after.idle_ranks)}" if after.idle_ranks else ""
            return (
                f"It stops to pay after {before.cluster.num_gpus:,} GPUs: at {after.cluster.num_gpus:,} the limit is "
                f"{after.timeline.bottleneck}{idle}."
            )
    return "It scales as far as asked."


def as_data(plan: Plan, scale: Sequence[Plan] = ()) -> dict[str, Any]:
    """For JSON: bytes, seconds, words."""
    cluster = asdict(plan.cluster) | {"gpu": asdict(plan.cluster.gpu)}
    return {
        "command": plan.work.command,
        "cluster": cluster,
        "fits": plan.fits,
        "problems": plan.problems,
        "roles": {name: _role_data(needs) for name, needs in plan.memory.items()},
        "gpus": [
            {"node": plan.layout.nodes[device.slot], "roles": roles, "bytes": plan.gpus.get(device)}
            for device, roles in plan.layout.shares().items()
        ],
        "host_bytes_of_nodes": {str(node): need for node, need in plan.hosts.items()},
        "weight_sync_bytes": plan.sync.num_bytes if plan.sync else 0,
        "weight_sync_transport": plan.sync.transport if plan.sync else None,
        "engines": {
            name: _engine_data(needs, plan) for name, needs in plan.memory.items() if needs.role.rollout is not None
        },
        "batch_bytes": plan.batch_bytes,
        "idle_ranks": plan.idle_ranks,
        "activation_error_band": list(ERROR_BAND),
        "timeline_s": plan.timeline.phases,
        "iteration_s": plan.timeline.total,
        "bottleneck": plan.timeline.bottleneck,
        "batches": [dict(zip(sizes(plan).header, row, strict=True)) for row in sizes(plan).rows],
        "scale": [
            {
                "gpus": other.cluster.num_gpus,
                "iteration_s": other.timeline.total,
                "timeline_s": other.timeline.phases,
                "bottleneck": other.timeline.bottleneck,
                "idle_ranks": other.idle_ranks,
                "fits": other.fits,
            }
            for other in scale
        ],
    }


def _engine_data(needs: RoleMemory, plan: Plan) -> dict[str, Any]:
    role, engine = needs.role, needs.engine
    assert role.rollout is not None
    data: dict[str, Any] = {
        "engine": role.rollout.engine,
        "num_engines": role.num_engines,
        "tensor_parallel_size": role.tensor_parallel_size,
        "determinism": determinism(role),
    }
    if engine is None:
        return data
    return data | {
        "weights_bytes": engine.weights,
        "kv_cache_bytes_of_sequence": engine.sequence,
        "at_once": engine.asked_at_once,
        "fit_at_once": None if plan.cluster.on_cpu else engine.fit_at_once(plan.cluster.gpu_memory_bytes),
        "taken_bytes": None if plan.cluster.on_cpu else engine.taken(plan.cluster.gpu_memory_bytes),
    }


def _role_data(needs: RoleMemory) -> dict[str, Any]:
    return {
        "model_path": needs.role.model_path,
        "num_parameters": needs.model.num_parameters,
        "num_trained_parameters": needs.model.num_trained if needs.role.trained else 0,
        "num_ranks": needs.role.num_ranks,
        "phases": {
            phase: {what: asdict(held) for what, held in items.items()} for phase, items in needs.phases.items()
        },
        "worst_phase": needs.worst_phase,
        "allowance_bytes": needs.allowance_bytes,
        "gpu_bytes": needs.gpu_bytes,
        "host_bytes": needs.host_bytes,
        "checkpoint_bytes": needs.checkpoint_bytes,
        "model_bytes": needs.model_bytes,
    }
