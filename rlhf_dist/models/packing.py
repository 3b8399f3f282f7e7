"""Sequences end to end in one row, without padding, and the check that a model keeps them apart.

A packed batch is one row whose position ids restart at 0 with each sequence. From such a row alone (no attention mask, no
cache) transformers derives block-diagonal causal attention (`masking_utils.find_packed_sequence_indices`), and
flash attention the sequences' borders. That is a convention, not a contract: an architecture with a mask of its own (ALiBi,
recurrent state, convolutions) may ignore it, and would then let a sequence read the one before it, silently.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.core.batches import length_mask, pad_rows
from rlhf_dist.core.errors import ModelError

TOLERANCE = {torch.float64: 5e-4, torch.float32: 5e-4}
TOLERANCE_HALF = 5e-2
"""Largest ‖packed − padded‖ / ‖padded‖ of a token's hidden state, by the parameters' dtype. The two passes have other shapes,
and so other kernels: wide enough for how these round, and for wrong positions to be seen, not for every leak."""

LEAK_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5}
LEAK_TOLERANCE_HALF = 1e-3
"""Largest relative change of a token's hidden state when other sequences of its row change, by the parameters' dtype. Both
passes have the same shapes, so that where nothing leaks nothing moves: 0 for dense architectures; 1e-6 in fp32 where a mixture
of experts multiplies matrices of other heights. Newly initialized architectures that leak: from 3e-4 in fp32, 3e-3 in bf16."""

_ROUNDING_MARGIN = 10
_PROBE_LENGTHS = (5, 3, 6, 2, 4, 1, 3, 5)


@dataclass(frozen=True)
class PackingProbe:
    """What a model does with packed sequences; each number is the largest ‖a − b‖ / ‖b‖ of a token's last hidden state."""

    deviation: float
    """Packed against padded."""
    leak: float
    """A row against itself with every other sequence replaced, in the sequences that stayed."""
    rounding: float
    """A row against itself with the last sequence replaced, in those before it: what moves in a causal model is rounding."""


def model_inputs(tokens: Tensor, lengths: Tensor, packed: bool) -> dict[str, Any]:
    """What a Hugging Face model takes.

    Args:
        tokens: [B, T] int64, padded on the right.
        lengths: [B] int64.
        packed: one row of N = Σ lengths tokens instead of B rows of T.

    Returns:
        `input_ids` and `position_ids` [1, N], or `input_ids` and `attention_mask` [B, T].
    """
    kept = length_mask(lengths, tokens.shape[1])
    if not packed:
        return {"input_ids": tokens, "attention_mask": kept.long(), "use_cache": False}
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return {"input_ids": tokens[kept][None], "position_ids": positions[kept][None], "use_cache": False}


def unpack(flat: Tensor, lengths: Tensor, width: int) -> Tensor:
    """[N, ...] of a packed row → [B, width, ...], 0 on padding. Carries gradients."""
    kept = length_mask(lengths, width)
    out = torch.zeros(*kept.shape, *flat.shape[1:], dtype=flat.dtype, device=flat.device)
    return out.masked_scatter(kept.reshape(*kept.shape, *[1] * (flat.dim() - 1)), flat)


def check_packing(model: Any, device: torch.device) -> None:
    """Reject a model that does not keep packed sequences apart. Collective under ZeRO-3.

    Raises:
        ModelError: the model takes no position ids, attends within chunks of the row, lets one sequence read another, or
            gives packed sequences other hidden states than they have alone.
    """
    name = type(model).__name__
    accepted = inspect.signature(model.base_model.forward).parameters
    if "position_ids" not in accepted and all(p.kind is not p.VAR_KEYWORD for p in accepted.values()):
        raise ModelError(f"packed is true but {name} takes no position ids, which packing needs; set packed: false")
    _refuse_chunks(model)
    dtype = next(model.parameters()).dtype
    tolerance = TOLERANCE.get(dtype, TOLERANCE_HALF)
    probe = probe_packing(model, device)
    allowed = min(max(LEAK_TOLERANCE.get(dtype, LEAK_TOLERANCE_HALF), _ROUNDING_MARGIN * probe.rounding), tolerance)
    if not probe.leak <= allowed:
        raise ModelError(
            f"packed is true but {name} does not keep packed sequences apart: hidden states of one move by {probe.leak:.2%} "
            f"when others change, and {allowed:.2g} is the most that rounding in {dtype} does; set packed: false"
        )
    if not probe.deviation <= tolerance:
        raise ModelError(
            f"packed is true but {name} does not treat packed sequences as it does padded ones: its hidden states deviate by "
            f"{probe.deviation:.2%}, and {tolerance:.2%} is the most that rounding in {dtype} does; set packed: false"
        )


def _refuse_chunks(model: Any) -> None:
    """No probe of a few tokens can see chunks of thousands (Llama 4: 8,192)."""
    config = model.config.get_text_config(decoder=True)
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None or "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ModelError(
            f"packed is true but {type(model).__name__} attends within chunks (attention_chunk_size is {chunk}), which "
            "transformers counts from the start of a row, and packing needs counted from that of each sequence; "
            "set packed: false"
        )


@torch.no_grad()
def probe_packing(model: Any, device: torch.device) -> PackingProbe:
    """Four forward skips a few short sequences, on every rank. Collective under ZeRO-3."""
    was_training = model.training
    model.eval()
    vocab_size: int = model.get_input_embeddings().num_embeddings
    lengths = torch.tensor(_PROBE_LENGTHS)
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    ids = torch.linspace(1, vocab_size - 1, len(owner)).long()
    others = (ids - 1 + vocab_size // 2) % max(vocab_size - 1, 1) + 1

    def hidden(ids: Tensor, packed: bool = True) -> Tensor:
        """[N, hidden] float64, in the order of `ids`."""
        tokens, on_device = pad_rows(list(ids.split(list(_PROBE_LENGTHS)))).to(device), lengths.to(device)
        # The first entry of a backbone's output is its last hidden state.
        out = model.base_model(**model_inputs(tokens, on_device, packed))[0]
        return (out[0] if packed else out[length_mask(on_device, tokens.shape[1])]).double().cpu()

    def moved(replaced: Tensor) -> float:
        """By how much the other sequences' hidden states change."""
        return _deviation(hidden(torch.where(replaced, others, ids))[~replaced], packed[~replaced])

    packed = hidden(ids)
    probe = PackingProbe(
        deviation=_deviation(packed, hidden(ids, packed=False)),
        leak=moved(owner % 2 == 0),
        rounding=moved(owner == len(lengths) - 1),
    )
    model.train(was_training)
    return probe


def _deviation(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-12)).max())
