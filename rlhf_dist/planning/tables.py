"""A plan as tables of words and numbers, and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from rlhf_dist.planning.activations import ERROR_BAND
from rlhf_dist.planning.memory import CONTEXT_BYTES, FRAGMENTATION, NCCL_BYTES, RoleMemory
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
    return [sizes(plan), memory(plan), phases(plan), shares(plan), traffic(plan), times(plan)]


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
            each = -(-plan.work.responses // role.num_ranks)
            batches = -(-each // max(1, min(each, role.rollout.batch_size)))
            tokens = plan.work.responses * (plan.work.prompt + plan.work.response)
            idle = str(plan.idle_ranks.get(role.name, 0))
            cells = (str(plan.work.responses), f"{tokens:,}", str(role.num_ranks), str(each))
            rows.append((role.name, "generating", *cells, f"{batches} × {min(each, role.rollout.batch_size)}", idle))
    header = ("role", "work", "sequences", "tokens at most", "ranks", "a rank", "micro-batches a rank", "idle ranks")
    return Table("Batches", header, rows, f"Optimizer steps an iteration: {plan.work.updates}.")


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
        f"NCCL, {FRAGMENTATION:.0%} fragmentation."
    )
    for name, needs in plan.memory.items():
        if needs.role.trained is not None and needs.model.frozen:
            note += f" Of {name}, {needs.model.num_trained:,} of {needs.model.num_held:,} parameters are trained."
    header = ("role", "layout", "phase", "param.", "grad.", "optim.", "buffers", "activ.", "logits", "other")
    return Table("Memory of a rank", (*header, "allow.", "GPU"), rows, note)


def _layout_words(role: Role) -> str:
    host = role.trained or role.frozen
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
        "that a GPU has to hold every role's worst phase at once. update: backward passes; step: the optimizer.",
    )


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
    for slot, roles in plan.layout.shares().items():
        groups.setdefault(tuple(roles), []).append(plan.gpus[slot])
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


def traffic(plan: Plan) -> Table:
    """Object store, weight sync, and disk."""
    rows = []
    if plan.sync_bytes:
        nodes = plan.sync_bytes // plan.memory["policy"].model_bytes
        rows.append(
            (
                "weight sync, an iteration",
                gigabytes(plan.sync_bytes),
                f"the policy, in the object store of {nodes} node(s)",
            )
        )
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
            {"node": plan.layout.nodes[slot], "roles": roles, "bytes": plan.gpus.get(slot)}
            for slot, roles in plan.layout.shares().items()
        ],
        "host_bytes_of_nodes": {str(node): need for node, need in plan.hosts.items()},
        "weight_sync_bytes": plan.sync_bytes,
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
