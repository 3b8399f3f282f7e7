"""Sequences end to end in one row, without padding, and the check that a model keeps them apart.

A packed batch is one row whose position ids restart at 0 with each sequence. From such a row alone (no attention mask, no
cache) transformers derives block-diagonal causal attention (`masking_utils.find_packed_sequence_indices`), and
flash attention the sequences' borders. That is a convention, not a contract: an architecture with a mask of its own (ALiBi,
recurrent state, convolutions) may ignore it, and would then let a sequence read the one before it, silently.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.batches import length_mask, pad_rows
from rlhf_dist.errors import ModelError

TOLERANCE = {torch.float64: 5e-4, torch.float32: 5e-4}
TOLERANCE_HALF = 5e-2
"""Largest ‖packed − padded‖ / ‖padded‖ of a token's hidden state, by the parameters' dtype. Two layers round to less than
1e-6 in fp32 and to the same bits in bf16; deeper models and other kernels to more. A leak in trained weights is of order 1."""

_PROBE_LENGTHS = (5, 3, 6)


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
    """Refuse a model that does not keep packed sequences apart. Collective under ZeRO-3.

    Raises:
        ModelError: the model takes no position ids, or its packed sequences are not what they are alone.
    """
    name = type(model).__name__
    accepted = inspect.signature(model.base_model.forward).parameters
    if "position_ids" not in accepted and all(p.kind is not p.VAR_KEYWORD for p in accepted.values()):
        raise ModelError(f"packed is true but {name} takes no position ids, which packing needs; set packed: false")
    dtype = next(model.parameters()).dtype
    tolerance = TOLERANCE.get(dtype, TOLERANCE_HALF)
    deviation = packing_deviation(model, device)
    if not deviation <= tolerance:
        raise ModelError(
            f"packed is true but {name} does not keep packed sequences apart: its hidden states deviate from those of padded "
            f"sequences by {deviation:.2%}, and {tolerance:.2%} is the most that rounding in {dtype} does; set packed: false"
        )


@torch.no_grad()
def packing_deviation(model: Any, device: torch.device) -> float:
    """Largest ‖packed − padded‖ / ‖padded‖ of a token's last hidden state, over three short sequences."""
    was_training = model.training
    model.eval()
    tokens, lengths = _probe(model.get_input_embeddings())
    tokens, lengths = tokens.to(device), lengths.to(device)
    # The first entry of a backbone's output is its last hidden state.
    padded = model.base_model(**model_inputs(tokens, lengths, packed=False))[0][length_mask(lengths, tokens.shape[1])]
    packed = model.base_model(**model_inputs(tokens, lengths, packed=True))[0][0]
    model.train(was_training)
    a, b = packed.double(), padded.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-12)).max())


def _probe(embeddings: nn.Module) -> tuple[Tensor, Tensor]:
    """[3, 6] tokens, all different, and [3] lengths; the last sequences would show what leaks from those before."""
    vocab_size: Any = embeddings.num_embeddings
    ids = torch.linspace(1, vocab_size - 1, sum(_PROBE_LENGTHS)).long()
    return pad_rows(list(ids.split(list(_PROBE_LENGTHS)))), torch.tensor(_PROBE_LENGTHS)
