"""Which part of a trained model is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf_dist.config.base import Count, Positive, PositiveInt, Schema


class FreezeConfig(Schema):
    """What stays as it was loaded. What is frozen has no gradient, no optimizer state and no weight decay; it is still part of
    checkpoints and of the saved model."""

    embeddings: bool = False
    """Freeze the embeddings (of tokens, and of positions where the model has such). Where the language-model head is the same
    matrix (tied embeddings), it is frozen with them."""
    num_layers: Count = 0
    """Freeze the lowest so many transformer layers, those next to the embeddings."""
    all_but_head: bool = False
    """Train the head only: the scalar head, or the language-model head (with tied embeddings the matrix that both are)."""

    @model_validator(mode="after")
    def _said_once(self) -> FreezeConfig:
        if self.all_but_head and (self.embeddings or self.num_layers):
            other = "embeddings is true" if self.embeddings else f"num_layers is {self.num_layers}"
            raise ValueError(f"all_but_head is true and {other}, which it includes; keep one of the two")
        return self

    @property
    def any(self) -> bool:
        """Whether something is frozen."""
        return self.embeddings or self.num_layers > 0 or self.all_but_head

    def __hash__(self) -> int:
        """Plans are kept by what is trained."""
        return hash((self.embeddings, self.num_layers, self.all_but_head))


class LoRAConfig(Schema):
    """Low-rank adapters beside frozen matrices: y = W x + (alpha / rank) B A x (Hu et al. 2021, "LoRA: Low-Rank Adaptation of
    Large Language Models"). W stays as it was loaded; a scalar head is trained whole."""

    rank: PositiveInt = 16
    """Rank of B A."""
    alpha: Positive = 32.0
    """Scale of the adapters: B A is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that training sets to 0. Above 0 what is dropped depends on the
    number of ranks and on micro-batches."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear layers get an adapter: `all-linear` those of every transformer layer, or the ends of their names, such as
    [q_proj, v_proj]."""

    @field_validator("target_modules")
    @classmethod
    def _names_something(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or (not isinstance(value, str) and not all(name.strip() for name in value)):
            raise ValueError(f"target_modules is {list(value)!r}; it must name at least one layer, or be all-linear")
        return value

    def __hash__(self) -> int:
        """Plans are kept by what is trained."""
        return hash((self.rank, self.alpha, self.dropout, self.target_modules))
