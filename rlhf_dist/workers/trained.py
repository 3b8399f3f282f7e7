"""What every trained model's worker does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.algo.random import derived_seed
from rlhf_dist.batches import Experience, SequenceBatch, TokenBatch
from rlhf_dist.config import TrainedModel
from rlhf_dist.engine import distributed, zero
from rlhf_dist.engine.distributed import RankContext
from rlhf_dist.engine.saving import save_pretrained
from rlhf_dist.engine.train import TrainEngine, train_ds_config
from rlhf_dist.models.forward import ScalarHead, TargetLogprobs
from rlhf_dist.models.loading import DTYPES, load_causal_lm, load_scalar_model

IDLE_TOKENS = TokenBatch(
    tokens=torch.zeros(1, 2, dtype=torch.long), lengths=torch.tensor([2]), loss_mask=torch.tensor([[False, True]])
)
IDLE_SEQUENCE = SequenceBatch(IDLE_TOKENS.tokens, IDLE_TOKENS.lengths)
IDLE_EXPERIENCE = Experience(
    tokens=IDLE_TOKENS.tokens,
    prompt_lengths=torch.ones(1, dtype=torch.long),
    response_lengths=torch.ones(1, dtype=torch.long),
    **{name: torch.zeros(1, 1) for name in ("old_logprobs", "old_values", "advantages", "returns")},
)
"""What an idle micro-batch runs on: the smallest batch with one target."""

MicroBatches = list[list[int]]


def pick(batch: Any, micro_batches: MicroBatches) -> list[Any]:
    """Micro-batches of rows; None for an idle one."""
    return [batch.rows(rows) if rows else None for rows in micro_batches]


class TrainedWorker:
    """A model under ZeRO, on one rank."""

    def __init__(
        self, module: nn.Module, config: TrainedModel, context: RankContext, num_steps: int, tokenizer: Any
    ) -> None:
        self.context = context
        self.tokenizer = tokenizer
        self.engine = TrainEngine(module, config, context, num_steps)

    @property
    def model(self) -> Any:
        """The Hugging Face model inside."""
        return self.engine.module.model

    def seed_dropout(self, update: int) -> None:
        """Dropout, where a model has any, is a function of (seed, update, rank): a resumed run draws the same."""
        torch.manual_seed(derived_seed(self.context.seed, "dropout", update, self.context.rank))

    def save_checkpoint(self, path: Path) -> None:
        """Write this rank's shard."""
        self.engine.save_checkpoint(path)

    def load_checkpoint(self, path: Path) -> None:
        """Read this rank's shard."""
        self.engine.load_checkpoint(path)

    def save_model(self, path: Path) -> None:
        """Write model and tokenizer in Hugging Face format."""
        is_main = self.context.rank == 0
        save_pretrained(self.model, path, is_main=is_main)
        if is_main:
            self.tokenizer.save_pretrained(path)
        distributed.barrier()


def build_causal_lm(config: TrainedModel, context: RankContext) -> TargetLogprobs:
    """A causal LM ready for `TrainEngine`: sharded while loading under ZeRO-3."""
    with zero.sharded_init(train_ds_config(config)):
        # fp32: DeepSpeed casts to the compute precision itself and keeps its master weights from these.
        return TargetLogprobs(load_causal_lm(config.model_path, DTYPES["fp32"]))


def build_scalar_model(config: TrainedModel, context: RankContext, pad_token_id: int | None) -> ScalarHead:
    """A scalar model ready for `TrainEngine`.

    A new head is drawn from (seed, stream) rather than left to the loader, whose draws depend on the ZeRO stage. Its
    scale 1/√(d+1) is that of Stiennon et al. 2020.
    """
    with zero.sharded_init(train_ds_config(config)):
        model, head_is_new = load_scalar_model(config.model_path, DTYPES["fp32"], pad_token_id)
    if head_is_new:
        head = model.score
        generator = torch.Generator().manual_seed(derived_seed(context.seed, "scalar head", 0))
        width = head.in_features
        zero.assign(head.weight, torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)
        if head.bias is not None:
            zero.assign(head.bias, torch.zeros(1))
    return ScalarHead(model)


def flat_rows(outputs: list[Tensor | None], micro_batches: MicroBatches, num_rows: int) -> Tensor:
    """Outputs of micro-batches ([n_i, R_i]) put back into the order of the rank's rows: [num_rows, max R]."""
    width = max((o.shape[1] for o in outputs if o is not None), default=0)
    result = torch.zeros(num_rows, width)
    for output, rows in zip(outputs, micro_batches, strict=True):
        if output is not None:
            result[torch.tensor(rows), : output.shape[1]] = output.float().cpu()
    return result
