"""What a model is made of, told by its config alone: the model is built on torch's meta device, which holds no numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.config.freeze import FreezeConfig, LoRAConfig
from rlhf_dist.core.errors import ModelError
from rlhf_dist.models.adapters import add_adapters, plain_parameters
from rlhf_dist.models.freeze import Counts, apply_freeze, count_parameters
from rlhf_dist.models.loading import DTYPES, load_model_config

ELEMENT_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
"""Precision → bytes of an element."""
ALL_TRAINED = FreezeConfig()


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model."""

    model_path: str
    scalar: bool
    """With a scalar head (reward, value) in place of a language-model head."""
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape of each parameter, in the model's order; tied ones once; adapters are none of them."""
    trained: tuple[tuple[int, ...], ...]
    """Shapes of what is trained when the model is, adapters among it, in the model's order."""
    frozen: tuple[tuple[int, ...], ...]
    """Shapes of the rest."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    """Whether the language-model head is the input embedding."""
    expert_share: float
    """Share of a mixture's experts that a token passes through; 1 for a dense model."""

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return tuple(math.prod(shape) for _, shape in self.parameters)

    @cached_property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(self.sizes)

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of the parameters of each optimizer group (`engine.optimizer`: with and without weight decay) that is not
        empty."""
        decay = tuple(math.prod(shape) for shape in self.trained if len(shape) > 1)
        rest = tuple(math.prod(shape) for shape in self.trained if len(shape) <= 1)
        return tuple(group for group in (decay, rest) if group)

    @property
    def frozen_sizes(self) -> tuple[int, ...]:
        """Elements of each parameter that is not trained."""
        return tuple(math.prod(shape) for shape in self.frozen)

    @property
    def num_trained(self) -> int:
        """Elements that are trained."""
        return sum(map(sum, self.groups))

    @property
    def num_held(self) -> int:
        """Elements of all parameters and adapters."""
        return self.num_trained + sum(self.frozen_sizes)

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values that generation keeps of a token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @cached_property
    def body_flops_per_token(self) -> float:
        """Floating-point operations of a token's forward pass in the layers' matrices, without attention scores and head."""
        head = 0 if self.scalar or self.tied else self.vocab_size * self.hidden_size
        matrices = 0.0
        for name, shape in self.parameters:
            if len(shape) > 1:
                matrices += math.prod(shape) * (self.expert_share if ".experts." in name else 1.0)
        return 2 * (matrices - self.vocab_size * self.hidden_size - head)

    @property
    def head_flops_per_token(self) -> float:
        """Of one position whose logits (or scalar) are computed."""
        return 2.0 * self.hidden_size * (1 if self.scalar else self.vocab_size)

    def forward_flops(self, num_sequences: float, length: float, num_targets: float) -> float:
        """Of a forward pass over `num_sequences` of `length` tokens, with `num_targets` positions a sequence that are read."""
        # A query meets half of the tokens on average: scores and weighted values, 2 operations each.
        attention = 2 * 2 * self.num_layers * self.num_heads * self.head_dim * length / 2
        head = self.head_flops_per_token * num_targets
        return num_sequences * (length * (self.body_flops_per_token + attention) + head)


@lru_cache(maxsize=32)
def meta_model(
    model_path: str,
    scalar: bool,
    precision: str = "bf16",
    freeze: FreezeConfig = ALL_TRAINED,
    lora: LoRAConfig | None = None,
) -> Any:
    """The model on the meta device: shapes without numbers; with its adapters, and frozen where it is to be.

    Raises:
        ModelError: there is no config at `model_path`, or transformers cannot build what it describes.
        ConfigError: the model cannot be frozen or adapted like that.
    """
    config = load_model_config(model_path)
    if scalar:
        config.num_labels = 1
    auto_class: Any = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config, dtype=DTYPES[precision])
    except (ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"transformers cannot build the model that {model_path!r} describes ({str(error).splitlines()[0]}); give a "
            "decoder-only architecture that it knows"
        ) from error
    apply_freeze(model, freeze)
    if lora is not None:
        add_adapters(model, lora)
    return model


def trained_counts(
    model_path: str, scalar: bool, freeze: FreezeConfig, lora: LoRAConfig | None
) -> tuple[Counts, Counts]:
    """(trained, frozen) parameters by part (`models.freeze.count_parameters`). Errors as `meta_model`."""
    return count_parameters(meta_model(model_path, scalar, "bf16", freeze, lora))


@lru_cache(maxsize=32)
def architecture(
    model_path: str, scalar: bool = False, freeze: FreezeConfig = ALL_TRAINED, lora: LoRAConfig | None = None
) -> Architecture:
    """Sizes of the model at `model_path`, as a language model or with a scalar head.

    Args:
        freeze, lora: of a trained model.

    Raises:
        ModelError, ConfigError: see `meta_model`.
    """
    model = meta_model(model_path, scalar, "bf16", freeze, lora)
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    hidden = int(config.hidden_size)
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return Architecture(
        model_path=model_path,
        scalar=scalar,
        parameters=tuple((plain.name, tuple(plain.base.shape)) for plain in plain_parameters(model)),
        trained=tuple(tuple(p.shape) for p in model.parameters() if p.requires_grad),
        frozen=tuple(tuple(p.shape) for p in model.parameters() if not p.requires_grad),
        num_layers=int(config.num_hidden_layers),
        hidden_size=hidden,
        intermediate_size=int(getattr(config, "intermediate_size", None) or 4 * hidden),
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(head_dim),
        vocab_size=int(config.vocab_size),
        tied=not scalar and bool(getattr(config, "tie_word_embeddings", False)),
        expert_share=chosen / experts if experts and chosen else 1.0,
    )
