"""Configuration of sampling and of the rollout engines."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_dist.config.base import Count, Fraction, Positive, PositiveInt, Result, Schema
from rlhf_dist.config.hosting import (
    Placement,
    Precision,
)


class SamplingConfig(Schema):
    """How a response is drawn; every engine understands all of it."""

    max_response_tokens: Result[PositiveInt] = 128
    """Longest response in tokens; one that reaches it without an end is truncated."""
    temperature: Result[Positive] = 1.0
    """Softmax temperature. The same temperature enters every log-prob of PPO (behavior, old, new, reference)."""
    top_p: Result[float] = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens only, as many as make up this probability; 1 draws from all."""
    top_k: Result[Count] = 0
    """Draw from this many of the likeliest tokens; 0 from all."""
    min_p: Result[Fraction] = 0.0
    """Draw from tokens at least this times as likely as the likeliest; 0 draws from all."""
    stop: Result[tuple[str, ...]] = ()
    """Texts that end a response; the text that ended it is part of it."""
    stop_token_ids: Result[tuple[Count, ...]] = ()
    """Tokens that end a response, beside those of the model and its chat template."""

    @field_validator("stop")
    @classmethod
    def _stops_hold_text(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("stop holds an empty text, which is found before every response; remove it")
        return stop

    @property
    def cuts_tokens_off(self) -> bool:
        """Whether some tokens are never drawn (top_p, top_k, min_p)."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


class RolloutConfig(Placement, SamplingConfig):
    """Generation of responses."""

    engine: Result[Literal["hf", "vllm"]] = "hf"
    """Generation engine: `hf` generates with transformers, exactly as the policy computes; `vllm` with vLLM, which is faster
    and rounds differently."""
    draws: Result[Literal["counter", "engine"]] = "counter"
    """What tokens are drawn with. `counter`: this project's counter-based random numbers, so that a response is a function of
    weights, seed and sample, whatever the batch and the number of engines; `engine`: vLLM's own sampler, which is faster."""
    precision: Result[Precision | None] = None
    """Precision of the engine's weights; null takes the policy's."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks that share one vLLM engine, each with a part of every weight matrix; they lie on one node. Must divide
    `num_ranks`."""
    batch_size: PositiveInt = 64
    """Sequences generated at the same time by one engine."""
    num_chunks: PositiveInt = 1
    """Parts in which an iteration's prompts are generated: one is scored while the next is generated. Changes speed, never the
    result."""
    weight_transport: Literal["auto", "store", "broadcast"] = "auto"
    """How the policy's weights reach the engines: `broadcast` from rank 0 of the policy through a process group of its own
    (NCCL on GPUs, gloo on CPUs), `store` through host memory and Ray's shared-memory object store. `auto` broadcasts on GPUs,
    where policy and engines have GPUs of their own."""
    max_restarts: Count = 2
    """How often an engine that died is started again in a run; its lost prompts are generated again."""
    vllm_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `vllm.LLM`, such as {gpu_memory_utilization: 0.6}."""

    @property
    def num_engines(self) -> int:
        """Engines: groups of `tensor_parallel_size` ranks."""
        return self.num_ranks // self.tensor_parallel_size

    @property
    def ranks_together(self) -> int:
        """See `Placement`."""
        return self.tensor_parallel_size

    def sends_weights_by(self, policy: Placement, device: str, cluster: str) -> Literal["store", "broadcast"]:
        """`weight_transport` with its `auto` decided, for a policy placed like this, on `device`, hosted by `cluster`."""
        if cluster == "inline":  # one process
            return "store"
        if self.weight_transport != "auto":
            return self.weight_transport
        # NCCL takes no two ranks on one GPU.
        own_gpus = device == "cuda" and min(self.gpus_per_rank, policy.gpus_per_rank) == 1
        return "broadcast" if own_gpus else "store"

    @model_validator(mode="after")
    def _options_of_the_engine(self) -> RolloutConfig:
        if self.engine == "vllm":
            return self
        for name in ("draws", "tensor_parallel_size", "vllm_options"):
            value = getattr(self, name)
            if value != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(
                    f"{name} is {value} but engine is {self.engine}, which has no such setting; set engine to vllm, or remove "
                    f"{name}"
                )
        return self

    @model_validator(mode="after")
    def _whole_engines(self) -> RolloutConfig:
        if self.num_ranks % self.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size {self.tensor_parallel_size} does not divide num_ranks {self.num_ranks}; num_ranks is "
                "the number of engines times tensor_parallel_size"
            )
        return self
