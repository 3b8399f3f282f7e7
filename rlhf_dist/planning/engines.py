"""What one GPU of a vLLM engine holds: its part of the weights, KV cache, activations; and how many sequences that leaves room
for. vLLM takes `gpu_memory_utilization` of a GPU when it starts, and makes all of it KV cache that it does not need otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rlhf_dist.distributed.deepspeed.saving import SHARD_BYTES
from rlhf_dist.models.architecture import ELEMENT_BYTES, Architecture
from rlhf_dist.planning.allowances import CONTEXT_BYTES, GRAPH_BYTES, NCCL_BYTES
from rlhf_dist.planning.roles import Role, Work
from rlhf_dist.planning.sharding import Held, held

BATCHED_TOKENS = 16_384
"""Tokens of a pass, which vLLM's start tries out (`max_num_batched_tokens`): its default for `vllm.LLM` on GPUs of 70 GiB and
more, half of it on smaller ones."""
UTILIZATION = 0.9
"""vLLM's default of `gpu_memory_utilization`."""
BLOCK_TOKENS = 16
"""Tokens of a block of KV cache: a sequence takes whole ones."""
_SAMPLING_BYTES = 32
"""Of each logit while tokens are drawn, beside the logit: copies in fp32, sorted and with their indices. By published profiles
of vLLM with 1,024 sequences (llm-d-benchmark: Qwen3-0.6B, Llama-3.1-8B), whose peaks of activations it meets within 10 %."""


@dataclass(frozen=True)
class EngineRank:
    """Bytes of one GPU of a vLLM engine."""

    role: Role
    model: Architecture
    weights: int
    """Its part of the matrices, and whole what every rank has: norms, and heads of keys where there are fewer than ranks."""
    token: int
    """KV cache of one token."""
    longest: int
    """Tokens of the longest prompt and response."""
    sequences: int
    """An engine's share of an iteration's responses."""

    @classmethod
    def of(cls, role: Role, work: Work) -> EngineRank:
        """A rank of a rollout role whose engine is vLLM."""
        model, size = role.architecture, ELEMENT_BYTES[role.precision]
        ranks, heads = role.tensor_parallel_size, model.num_kv_heads
        return cls(
            role,
            model,
            size * sum(_share(name, shape, ranks, heads) for name, shape in model.parameters),
            size * model.kv_elements_per_token // heads * max(1, -(-heads // ranks)),
            work.prompt + work.response,
            max(1, -(-work.responses // role.num_engines)),
        )

    @property
    def _options(self) -> dict[str, Any]:
        assert self.role.rollout is not None
        return self.role.rollout.vllm_options

    @property
    def asked_at_once(self) -> int:
        """Sequences that the engine is to have under way."""
        assert self.role.rollout is not None
        return min(self.sequences, self.role.rollout.batch_size)

    @property
    def sequence(self) -> int:
        """KV cache of a longest sequence."""
        return self.token * BLOCK_TOKENS * math.ceil(self.longest / BLOCK_TOKENS)

    @property
    def batched_tokens(self) -> int:
        """The most tokens of a pass."""
        return int(self._options.get("max_num_batched_tokens", BATCHED_TOKENS))

    @property
    def activations(self) -> int:
        """Of a layer, at as many tokens as a pass may have; what the ranks divide is what lies between two all-reduces."""
        tokens = self.batched_tokens
        model, size = self.model, ELEMENT_BYTES[self.role.precision]
        inside = 3 * model.intermediate_size // self.role.tensor_parallel_size
        return tokens * (size * (4 * model.hidden_size + inside) + 4 * model.hidden_size)

    @property
    def logits(self) -> int:
        """Of every sequence under way, gathered from all ranks, and what drawing makes of them."""
        assert self.role.rollout is not None
        size = ELEMENT_BYTES[self.role.precision] + _SAMPLING_BYTES
        return self.role.rollout.batch_size * self.model.vocab_size * size

    @property
    def allowance(self) -> int:
        """CUDA context, NCCL where there are several ranks, CUDA graphs."""
        nccl = NCCL_BYTES if self.role.tensor_parallel_size > 1 else 0
        return CONTEXT_BYTES + nccl + (0 if self._options.get("enforce_eager") else GRAPH_BYTES)

    def taken(self, gpu_memory_bytes: int) -> int:
        """Bytes that vLLM takes of a GPU, whatever it needs."""
        assert self.role.rollout is not None
        share = UTILIZATION * (1 if self.role.takes_turns else self.role.rollout.gpus_per_rank)
        return int(float(self._options.get("gpu_memory_utilization", share)) * gpu_memory_bytes)

    def fit_at_once(self, gpu_memory_bytes: int) -> int:
        """Longest sequences whose KV cache is in what is left of `taken`. Where more are under way, vLLM stops some, to compute
        them again later."""
        rest = self.taken(gpu_memory_bytes) - self.weights - self.activations - self.logits - self.allowance
        return max(0, rest // self.sequence)

    def phases(self, bucket: int) -> dict[str, dict[str, Held]]:
        """load, generate, sync → what is held then.

        Args:
            bucket: bytes of the largest bucket of a weight sync, which every rank receives whole.
        """
        weights = {"parameters": held(self.weights)}
        resting = weights | {"KV cache": held(self.asked_at_once * self.sequence)}
        # vLLM maps a checkpoint's files into memory, one after the other: no rank reads all of it.
        file = min(SHARD_BYTES, ELEMENT_BYTES[self.role.precision] * self.model.num_parameters)
        return {
            "load": weights | {"checkpoint": Held(0, file)},
            "generate": resting | {"activations": held(self.activations), "logits": held(self.logits)},
            "sync": resting | {"sync bucket": Held(bucket, bucket)},
        }


def _share(name: str, shape: tuple[int, ...], ranks: int, kv_heads: int) -> int:
    """Elements of a parameter that a rank has. (Vectors are small, and whole where they are not a part's.)"""
    if len(shape) < 2:
        return math.prod(shape)
    if ".k_proj." in name or ".v_proj." in name:
        ranks = min(ranks, kv_heads)
    return -(-math.prod(shape) // ranks)


def determinism(role: Role) -> str:
    """What holds bit for bit of a rollout role's responses, and what within rounding."""
    config = role.rollout
    assert config is not None
    if config.engine == "hf":
        return (
            "hf: responses are equal to the last bit in any batch and with any number of engines, on one kind of machine, "
            "and log-probs are the policy's"
        )
    if config.draws == "engine":
        return (
            "vllm, draws: engine: what is drawn depends on how requests meet in a batch, so that neither another layout nor "
            "the same run again need give the same responses; log-probs are the policy's up to rounding"
        )
    return (
        "vllm, draws: counter: every token is drawn with the same random number in any batch and on any layout, so that "
        "responses are equal up to how kernels round, which depends on the batch and on tensor_parallel_size; with "
        "VLLM_BATCH_INVARIANT=1 (a beta of vLLM, for GPUs of compute capability 8.0 or higher) they are equal to the last bit "
        "in any batch at one tensor_parallel_size. Log-probs are the policy's up to rounding"
    )
