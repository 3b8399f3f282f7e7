"""The tensors that a model and its DeepSpeed engine hold between two calls.

DeepSpeed's own `offload_states` has none of this without ZeRO and for bf16 under ZeRO-1, and takes no optimizer but its
FusedAdam under ZeRO-3. So tensors are looked for where DeepSpeed keeps them, and their storages are moved (`core.offload`): a
tensor that is not found keeps its memory, and no result depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def weight_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, sharded or whole, and buffers: what a forward pass needs."""
    for parameter in module.parameters():
        yield parameter.detach()
        for name in ("ds_tensor", "ds_secondary_tensor"):  # shards of ZeRO-3, and of ZeRO++
            shard = getattr(parameter, name, None)
            if isinstance(shard, Tensor):
                yield shard
    yield from module.buffers()


def all_tensors(module: nn.Module, *holders: Any) -> Iterator[Tensor]:
    """Weights, gradients, and what is reachable from `holders` (an optimizer of DeepSpeed or torch, dictionaries, lists)."""
    yield from weight_tensors(module)
    waiting: list[Any] = [*module.parameters(), *holders]
    seen: dict[int, Any] = {}  # the objects themselves, so that no id is used twice
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen[id(found)] = found
        if isinstance(found, Tensor):
            yield found
            if found.is_leaf and found.grad is not None:
                waiting.append(found.grad)
            waiting.extend(vars(found).values())
        elif isinstance(found, Mapping):
            waiting.extend(found.values())
        elif isinstance(found, list | tuple | set):
            waiting.extend(found)
        elif isinstance(found, torch.optim.Optimizer) or type(found).__module__.startswith("deepspeed."):
            waiting.extend(getattr(found, "__dict__", {}).values())
