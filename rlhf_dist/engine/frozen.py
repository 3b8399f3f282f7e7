"""Forward passes of a model that is never trained, whole in each rank or sharded by ZeRO-3."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn

from rlhf_dist.config import FrozenModel
from rlhf_dist.engine import zero
from rlhf_dist.engine.distributed import RankContext


def frozen_ds_config(config: FrozenModel) -> dict[str, Any]:
    """The DeepSpeed configuration of a frozen model."""
    return zero.ds_config(zero_stage=config.zero_stage, precision=config.precision)


class FrozenEngine:
    """A module that only runs forward."""

    def __init__(self, module: nn.Module, config: FrozenModel, context: RankContext) -> None:
        self.device = torch.device(context.device)
        module.requires_grad_(False).eval()
        if config.zero_stage == 3:
            self._module, *_ = deepspeed.initialize(
                model=module, config=frozen_ds_config(config), dist_init_required=False
            )
            self._module.eval()
        else:
            self._module = module.to(self.device)

    @torch.no_grad()
    def infer(self, *args: Any) -> Any:
        """Forward pass without gradients. Collective under ZeRO-3."""
        return self._module(*args)
