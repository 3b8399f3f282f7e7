"""Roles that take turns on GPUs (`colocate`) on paper: what they hold together in each phase, and what moves between phases.

The phases, and the level of each role in them, are those of `distributed/phases.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rlhf_dist.core.offload import Level
from rlhf_dist.distributed.phases import PHASES
from rlhf_dist.planning.allowances import FRAGMENTATION
from rlhf_dist.planning.memory import RoleMemory

_KEPT = ("gradients", "optimizer", "buffers", "average", "KV cache")
"""What a role has above its weights."""
_FULL = ("update", "step", "save")
"""Phases of a trained role's own plan that fall into its turn."""
ORDER = ("generate", "score", "policy", "value", "sync")
"""Of the phases in an iteration."""


def level_of(needs: RoleMemory, phase: str) -> Level:
    """Of a role in a phase of `distributed/phases.py`."""
    levels: dict[str, Level] = PHASES[phase]
    return levels.get(needs.role.name, "asleep")


def held_in(needs: RoleMemory, phase: str) -> int:
    """Bytes of a rank's GPU in a phase of `distributed/phases.py`."""
    role, level = needs.role, level_of(needs, phase)
    if level == "asleep":
        return 0
    if level == "full":
        return max(needs.total(own).gpu for own in (_FULL if role.trained else ("generate",)))
    items = needs.phases["sync" if phase == "sync" else "score"]
    return sum(held.gpu for name, held in items.items() if name not in _KEPT)


def together(roles: Sequence[RoleMemory]) -> dict[str, int]:
    """Phase → bytes that roles hold of a GPU that they share; `load`: each is built while the others sleep."""
    phases = {phase: sum(held_in(needs, phase) for needs in roles) for phase in ORDER}
    return {"load": max((needs.total("load").gpu for needs in roles), default=0), **phases}


def gpu_bytes(roles: Sequence[RoleMemory]) -> int:
    """Of a GPU that roles share: the largest phase, and the allowances of all of them, for a process keeps its CUDA context."""
    largest = max(together(roles).values())
    return largest + int(FRAGMENTATION * largest) + sum(needs.context_bytes for needs in roles)


def resting_bytes(needs: RoleMemory, level: Level) -> int:
    """Of a rank's GPU, what stays from call to call at a level, and moves with it. A KV cache is discarded, and not moved."""
    if level == "asleep":
        return 0
    items = needs.phases["load"]
    return sum(
        items[name].gpu for name in ("parameters", *_KEPT) if name in items and (level == "full" or name not in _KEPT)
    )


def moved_bytes(roles: Collection[RoleMemory]) -> dict[str, int]:
    """Phase → bytes that are copied between a GPU and host memory before it, in an iteration in which all phases follow each
    other."""
    moved = {}
    for before, phase in zip((ORDER[-1], *ORDER[:-1]), ORDER, strict=True):
        moved[phase] = sum(
            abs(resting_bytes(one, level_of(one, phase)) - resting_bytes(one, level_of(one, before))) for one in roles
        )
    return moved
