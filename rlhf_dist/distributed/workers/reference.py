"""The frozen reference π_SFT (and any language model that is only evaluated)."""

from __future__ import annotations

from torch import Tensor

from rlhf_dist.config.hosting import FrozenModel
from rlhf_dist.core.batches import RolloutBatch, TokenBatch
from rlhf_dist.core.offload import Level
from rlhf_dist.distributed.deepspeed.frozen import FrozenEngine, frozen_init
from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.workers.inference import MicroBatches, evaluate_nll, pick, response_logprobs
from rlhf_dist.models.forward import TargetLogprobs, check_now
from rlhf_dist.models.loading import DTYPES, load_causal_lm, restore_buffers


class ReferenceWorker:
    """Log-probs of responses under frozen weights."""

    def __init__(
        self, config: FrozenModel, context: RankContext, *, temperature: float = 1.0, num_tokens: int | None = None
    ) -> None:
        """`num_tokens`: see `TargetLogprobs`."""
        with frozen_init(config, context):
            model = load_causal_lm(config.model_path, DTYPES[config.precision])
        restore_buffers(model)
        module = TargetLogprobs(model, config.packed, num_tokens)
        self.engine = FrozenEngine(module, config, context)
        check_now(self.engine, module)
        self.temperature = temperature

    def hold(self, level: Level) -> None:
        """See `FrozenEngine.hold`."""
        self.engine.hold(level)

    def logprobs(self, rollout: RolloutBatch, micro_batches: MicroBatches) -> Tensor:
        """[rows, R] log-probs of the response tokens, 0 on padding."""
        return response_logprobs(self.engine, rollout, micro_batches, self.temperature)

    def evaluate(self, batch: TokenBatch, micro_batches: MicroBatches) -> dict[str, float]:
        """Sums over this rank's rows: `nll` and `num_targets`."""
        return evaluate_nll(self.engine, pick(batch, micro_batches))
