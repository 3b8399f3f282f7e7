"""The frozen reward model r_θ."""

from __future__ import annotations

from torch import Tensor

from rlhf_dist.config.hosting import FrozenModel
from rlhf_dist.core.batches import SequenceBatch
from rlhf_dist.core.errors import ModelError
from rlhf_dist.core.offload import Level
from rlhf_dist.distributed.deepspeed.frozen import FrozenEngine, frozen_init
from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.workers.inference import MicroBatches, sequence_scores
from rlhf_dist.models.forward import ScalarHead, check_now
from rlhf_dist.models.loading import DTYPES, load_scalar_model, restore_buffers


class RewardWorker:
    """One number a sequence."""

    def __init__(self, config: FrozenModel, context: RankContext) -> None:
        with frozen_init(config, context):
            model, head_is_new = load_scalar_model(config.model_path, DTYPES[config.precision], pad_token_id=None)
        restore_buffers(model)
        if head_is_new:
            raise ModelError(
                f"{config.model_path!r} has no trained scalar head, so its scores would be noise; give the model/ folder of "
                "a `rlhf-dist reward` run or another sequence-classification model with one label"
            )
        module = ScalarHead(model, config.packed)
        self.engine = FrozenEngine(module, config, context)
        check_now(self.engine, module)

    def hold(self, level: Level) -> None:
        """See `FrozenEngine.hold`."""
        self.engine.hold(level)

    def score(self, batch: SequenceBatch, micro_batches: MicroBatches) -> Tensor:
        """[rows] fp32 scores at the last token."""
        return sequence_scores(self.engine, batch, micro_batches)
