"""What a training pass keeps for its backward pass, counted by running the model's own code on the meta device.

Nothing is computed and nothing allocated: autograd records which tensors it would keep, and their sizes are added up. So every
architecture of transformers is counted as it is written. Attention alone is replaced: on the meta device torch would pick the
quadratic fallback, where GPUs and CPUs have a fused kernel that keeps its inputs, its output and a row of numbers a head.

`tests/bench/plan_activations.py` measures real passes against this; its table is in `tests/bench/README.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rlhf_dist.config.freeze import FreezeConfig, LoRAConfig
from rlhf_dist.core.logprobs import CHUNK_POSITIONS, taken_logprobs
from rlhf_dist.models.architecture import ALL_TRAINED, ELEMENT_BYTES, Architecture, architecture, meta_model

ERROR_BAND = (-0.20, 0.05)
"""By how much the peak of a real training pass may lie below or above the estimate, relative to it. Measured were 18 % to 1 %
below."""


@dataclass(frozen=True)
class TrainingPass:
    """A forward and backward pass over one micro-batch."""

    model_path: str
    scalar: bool
    precision: str
    rows: int
    """Sequences."""
    length: int
    """Tokens of each: the longest that the run allows."""
    num_targets: int
    """Positions over all rows whose log-probs are computed."""
    packed: bool = False
    """One row of rows x length tokens."""
    checkpointing: bool = False
    """Keep each layer's input only, and compute the layer once more in the backward pass."""
    entropy: bool = False
    """Whether entropies are computed, too (PPO)."""
    freeze: FreezeConfig = ALL_TRAINED
    lora: LoRAConfig | None = None
    """What is trained: nothing is kept for what no trained parameter comes before."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.rows * self.length


@dataclass(frozen=True)
class Activations:
    """Bytes of a training pass on one rank, besides parameters and their gradients."""

    saved: int
    """Kept by the layers for the backward pass."""
    logits: int
    """Kept of logits and log-probs."""
    working_logits: int
    """On top of both while the log-probs' gradients are taken."""
    working_layer: int
    """On top of `saved` while a layer's gradients are taken: its insides, and with checkpointing the layer once more."""

    @property
    def peak(self) -> int:
        """At the most at the same time. Logits are gone when the layers' turn comes."""
        return self.saved + max(self.logits + self.working_logits, self.working_layer)


@lru_cache(maxsize=4096)
def training_activations(run: TrainingPass) -> Activations:
    """Bytes of a training pass.

    Raises:
        ModelError: see `meta_model`.
    """
    model, size = architecture(run.model_path, run.scalar), ELEMENT_BYTES[run.precision]
    saved = _saved_by_layers(run, run.checkpointing)
    again = _saved_by_layers(run, False) // model.num_layers if run.checkpointing else 0
    inside = run.num_tokens * (2 * model.intermediate_size * size + 2 * model.hidden_size * 4)
    logits = 0 if run.scalar else _saved_by_logprobs(run, model.vocab_size)
    return Activations(saved, logits, _working_logits(run, model), again + inside)


def inference_bytes(model: Architecture, precision: str, rows: int, length: int, num_targets: int, packed: bool) -> int:
    """At the most during a forward pass without gradients: a layer's insides and the mask, or logits and the log-probs of a
    part of them."""
    size, tokens = ELEMENT_BYTES[precision], rows * length
    layer = tokens * (size * (4 * model.hidden_size + 3 * model.intermediate_size) + 4 * model.hidden_size)
    layer += _mask_entries(rows, length, packed) * (1 + size)
    if model.scalar:
        return layer
    # Logits, those that are picked of them, and the fp32 work on a chunk.
    logits = 2 * num_targets * model.vocab_size * size
    logits += 3 * 4 * min(num_targets, CHUNK_POSITIONS) * model.vocab_size
    return max(layer, tokens * model.hidden_size * size + logits)


def _mask_entries(rows: int, length: int, packed: bool) -> int:
    return (rows * length) ** 2 if packed else rows * length**2


def _working_logits(run: TrainingPass, model: Architecture) -> int:
    """In fp32 for a chunk: its logits again, log-probs and gradients. In the compute precision for all of them: gradients as
    they come chunk by chunk, and joined."""
    if run.scalar:
        return 0
    entries = run.num_targets * model.vocab_size * ELEMENT_BYTES[run.precision]
    chunk = min(run.num_targets, CHUNK_POSITIONS) * model.vocab_size * 4
    if run.num_targets > CHUNK_POSITIONS:
        return max(2 * entries, entries + (5 if run.entropy else 4) * chunk)
    return max(2 * entries, (3 if run.entropy else 2) * chunk)


class _Kept:
    """Sums the memory of all tensors that autograd keeps, each piece of memory once, without parameters and buffers."""

    def __init__(self, model: Any) -> None:
        self._known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._alive: list[Tensor] = []  # or another tensor could get the address
        self.num_bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._alive.append(tensor)
            self.num_bytes += storage.nbytes()
        return tensor


def kept_bytes(model: Any, forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps of `forward` for its backward pass, besides `model`'s own."""
    kept = _Kept(model)
    with saved_tensors_hooks(kept, lambda tensor: tensor):
        output = forward()
    del output
    return kept.num_bytes


class _FusedAttention(torch.autograd.Function):
    """Keeps what the fused kernels keep; computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
        logsumexp = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        # A boolean mask is turned into one of numbers, anew in each layer.
        bias = mask.to(query.dtype) if mask is not None else None
        ctx.save_for_backward(query, key, value, out, logsumexp, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("sizes only")


class _AttentionSizes(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            mask = (kwargs or {}).get("attn_mask", args[3] if len(args) > 3 else None)
            return _FusedAttention.apply(*args[:3], mask)
        return func(*args, **(kwargs or {}))


@lru_cache(maxsize=1024)
def _saved_by_layers(run: TrainingPass, checkpointing: bool) -> int:
    """Of everything before the head, at the longest sequences; a mask is assumed, as batches have padding."""
    model = meta_model(run.model_path, run.scalar, run.precision, run.freeze, run.lora).train()
    rows, length = (1, run.num_tokens) if run.packed else (run.rows, run.length)
    ids = torch.empty(rows, length, dtype=torch.long, device="meta")
    mask = torch.empty(rows, 1, length, length, dtype=torch.bool, device="meta")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        with _AttentionSizes():
            return kept_bytes(
                model,
                lambda: model.base_model(
                    input_ids=ids, attention_mask=mask, position_ids=torch.empty_like(ids), use_cache=False
                ),
            )
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()


def _saved_by_logprobs(run: TrainingPass, vocab_size: int) -> int:
    """Of the head's output and the log-probs taken from it."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[ELEMENT_BYTES[run.precision]]
    logits = torch.empty(run.num_targets, vocab_size, dtype=dtype, device="meta", requires_grad=True)
    taken = torch.empty(run.num_targets, dtype=torch.long, device="meta")
    kept = _Kept(torch.nn.Module())
    with saved_tensors_hooks(kept, lambda tensor: tensor):
        taken_logprobs(logits, taken, with_entropy=run.entropy)
    return kept.num_bytes
