"""The gradient that DeepSpeed has accumulated and averaged over ranks: its norm, and how to throw it away.

To be used between the backward pass marked as the boundary and the optimizer step, when each stage has it whole: without ZeRO
every rank the same, under ZeRO each rank its shard.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_dist.distributed.deepspeed import process_group as distributed


def gradient_parts(engine: Any) -> tuple[list[Tensor], bool]:
    """(tensors of any shape, zero padding included, that make up this rank's gradient; whether it is only a shard)."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None], False
    if _is_bf16(optimizer):  # bf16 under ZeRO-1: whole fp32 gradients
        return optimizer.fp32_groups_gradients_flat, False
    if _offloads(optimizer):
        flat = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
        return [group.grad for group in flat if group.grad is not None], True
    return [shard for group in optimizer.averaged_gradients.values() for shard in group or []], True


def global_grad_norm(engine: Any, device: torch.device) -> float:
    """L2 norm of the whole gradient before clipping, the same on every rank; inf or NaN where an entry is."""
    parts, sharded = gradient_parts(engine)
    filled = [part for part in parts if part.numel()]
    # In fp32 whatever they are in: a bf16 norm has three digits.
    norms = [torch.linalg.vector_norm(part, dtype=torch.float32).to(device) for part in filled]
    square = (
        torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
    )
    return float((distributed.summed(square) if sharded else square).sqrt())


def drop_gradients(engine: Any) -> None:
    """Forget the gradient, so that the next backward pass starts a new optimizer step. No weight and no moment is touched.

    What DeepSpeed does itself when a step overflows (`ZeROOptimizer.step`), without its bookkeeping of the loss scale.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    engine.zero_grad()
    if stage == 0:
        return
    optimizer.zero_grad(set_to_none=True)
    if _is_bf16(optimizer):
        optimizer.clear_hp_grads()
        return
    if stage == 3:
        # The count of micro-batches starts over, and with it "copy" instead of "add" into the shards.
        optimizer._pre_step()
        optimizer.averaged_gradients = {}
    else:
        optimizer.micro_step_id = -1
        optimizer._release_preflattened_grad_buffers()
        for groups in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            groups.update(dict.fromkeys(groups))
    if _offloads(optimizer):
        optimizer._offload_accumulated_param_ids = set()
        optimizer.reset_cpu_buffers()


def _offloads(optimizer: Any) -> bool:
    return bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))


def _is_bf16(optimizer: Any) -> bool:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer  # the driver imports workers, and never DeepSpeed

    return isinstance(optimizer, BF16_Optimizer)
