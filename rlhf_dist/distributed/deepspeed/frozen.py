"""Forward passes of a model that is never trained, whole in each rank or sharded by ZeRO-3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rlhf_dist.config.hosting import FrozenModel
from rlhf_dist.core.offload import Level, Offloadable
from rlhf_dist.distributed.deepspeed import zero
from rlhf_dist.distributed.deepspeed.held_tensors import weight_tensors
from rlhf_dist.distributed.deepspeed.process_group import RankContext, join_process_group


def frozen_ds_config(config: FrozenModel) -> dict[str, Any]:
    """The DeepSpeed configuration of a frozen model."""
    return zero.ds_config(zero_stage=config.zero_stage, precision=config.precision)


@contextlib.contextmanager
def frozen_init(config: FrozenModel, context: RankContext) -> Iterator[None]:
    """Inside, a frozen model is loaded as it will be held. Whole copies need neither a process group nor DeepSpeed."""
    if config.zero_stage == 3:
        join_process_group(context)
        zero.check_precision(config.precision, context.device)
    with zero.sharded_init(frozen_ds_config(config)):
        yield


class FrozenEngine:
    """A module that only runs forward."""

    def __init__(self, module: nn.Module, config: FrozenModel, context: RankContext) -> None:
        self.device = torch.device(context.device)
        module.requires_grad_(False).eval()
        if config.zero_stage == 3:
            import deepspeed  # two seconds to import: only where it is used

            engine, *_ = deepspeed.initialize(model=module, config=frozen_ds_config(config), dist_init_required=False)
            engine.eval()  # unlike a module's, DeepSpeed's returns nothing
            self._module: Any = zero.owned_by(self, engine)
        else:
            self._module = module.to(self.device)
        self._memory = Offloadable(self.device)

    def hold(self, level: Level) -> None:
        """The model in host memory (`asleep`), or where it computes."""
        self._memory.hold(level, lambda: weight_tensors(self._module))

    @torch.no_grad()
    def infer(self, *args: Any) -> Any:
        """Forward pass without gradients. Collective under ZeRO-3."""
        return self._module(*args)
