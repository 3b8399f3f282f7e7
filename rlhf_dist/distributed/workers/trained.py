"""What every trained model's worker does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.config.hosting import TrainedModel
from rlhf_dist.core.offload import Level
from rlhf_dist.core.random import derived_seed
from rlhf_dist.data.chat_template import stop_token_ids
from rlhf_dist.distributed.deepspeed import process_group as distributed
from rlhf_dist.distributed.deepspeed import zero
from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.deepspeed.saving import save_adapter, save_pretrained, try_saving
from rlhf_dist.distributed.deepspeed.train import TrainEngine, train_init
from rlhf_dist.models.adapters import add_adapters, initialize_adapters
from rlhf_dist.models.forward import ForwardPass, ScalarHead, TargetLogprobs, check_now
from rlhf_dist.models.freeze import apply_freeze
from rlhf_dist.models.generation_config import save_stop_tokens
from rlhf_dist.models.loading import DTYPES, load_causal_lm, load_scalar_model, restore_buffers
from rlhf_dist.models.vocabulary import num_token_ids


class TrainedWorker:
    """A model under ZeRO, on one rank."""

    def __init__(
        self, module: ForwardPass, config: TrainedModel, context: RankContext, num_steps: int, tokenizer: Any
    ) -> None:
        self.context = context
        self.config = config
        self.tokenizer = tokenizer
        self.engine = TrainEngine(module, config, context, num_steps)
        check_now(self.engine, module)
        if context.rank == 0:
            try_saving(self.model, tokenizer)

    @property
    def model(self) -> Any:
        """The Hugging Face model inside."""
        return self.engine.module.model

    def seed_dropout(self, update: int) -> None:
        """Dropout, where a model has any, is a function of (seed, update, rank): a resumed run draws the same."""
        torch.manual_seed(derived_seed(self.context.seed, "dropout", update, self.context.rank))

    def hold(self, level: Level) -> None:
        """See `TrainEngine.hold`."""
        self.engine.hold(level)

    def save_checkpoint(self, path: Path) -> None:
        """Write this rank's shard."""
        self.engine.save_checkpoint(path)

    def load_checkpoint(self, path: Path) -> None:
        """Read this rank's shard."""
        self.engine.load_checkpoint(path)

    def save(self, folder: Path) -> None:
        """Write `folder`/model with its tokenizer, and `folder`/adapter where the model has adapters. Collective."""
        self.save_weights(folder / "model")
        if self.config.lora is not None:
            is_main = self.context.rank == 0
            save_adapter(self.model, self.config.lora, self.config.model_path, folder / "adapter", is_main=is_main)
        distributed.barrier()

    def save_weights(self, path: Path, parts: Iterator[dict[str, Tensor]] | None = None) -> None:
        """Write the model in Hugging Face format with its tokenizer; `parts`: with these weights, as in `save_pretrained`."""
        is_main = self.context.rank == 0
        save_pretrained(self.model, path, is_main=is_main, parts=parts)
        if is_main:
            self.tokenizer.save_pretrained(path)


def build_causal_lm(config: TrainedModel, context: RankContext, tokenizer: Any) -> TargetLogprobs:
    """A causal LM ready for `TrainEngine`: sharded while loading under ZeRO-3. As saved, it stops where its rollouts do."""
    distributed.join_process_group(context)
    with train_init(config, context):
        # In the compute precision: DeepSpeed casts to it before its optimizer copies the fp32 master weights.
        model = load_causal_lm(config.model_path, DTYPES[config.precision])
    restore_buffers(model)
    _choose_trained(model, config, context, tokenizer)
    save_stop_tokens(model, stop_token_ids(tokenizer))  # of the grown vocabulary
    return TargetLogprobs(model, config.packed)


def build_scalar_model(config: TrainedModel, context: RankContext, tokenizer: Any) -> ScalarHead:
    """A scalar model ready for `TrainEngine`.

    A new head is drawn from (seed, stream) rather than left to the loader, whose draws depend on the ZeRO stage. Its
    scale 1/√(d+1) is that of Stiennon et al. 2020.
    """
    distributed.join_process_group(context)
    with train_init(config, context):
        model, head_is_new = load_scalar_model(config.model_path, DTYPES[config.precision], tokenizer.pad_token_id)
    restore_buffers(model)
    if tokenizer.pad_token_id == num_token_ids(tokenizer) - 1:
        zero.grow_embeddings(model, num_token_ids(tokenizer))  # for a pad token that was added
    if head_is_new:
        head = model.score
        generator = torch.Generator().manual_seed(derived_seed(context.seed, "scalar head", 0))
        width = head.in_features
        zero.assign(head.weight, torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)
        if head.bias is not None:
            zero.assign(head.bias, torch.zeros(1))
    _choose_trained(model, config, context, tokenizer)
    return ScalarHead(model, config.packed)


def _choose_trained(model: Any, config: TrainedModel, context: RankContext, tokenizer: Any) -> None:
    """Grow the embeddings where that is asked for, freeze what is not trained, and put adapters into the model where there are
    to be some: the same on every rank. DeepSpeed shards what is whole in a sharded model when it takes the model over."""
    if config.resize_embeddings:
        zero.grow_embeddings(model, num_token_ids(tokenizer))
    apply_freeze(model, config.freeze)
    if config.lora is not None:
        add_adapters(model, config.lora, train_embeddings=config.resize_embeddings)
        initialize_adapters(model, context.seed)
