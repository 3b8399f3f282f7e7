"""The two forward passes of RLHF. Here, and only here, positions are shifted: the logits at t−1 predict token t."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.core.batches import length_mask
from rlhf_dist.core.logprobs import taken_logprobs
from rlhf_dist.models.packing import check_packing, model_inputs, unpack


class ForwardPass(nn.Module):
    """A Hugging Face model that runs padded or packed (see `models.packing`); the result is the same."""

    def __init__(self, model: Any, packed: bool = False) -> None:
        super().__init__()
        self.model = model
        self.packed = packed
        self._unchecked = packed

    def inputs(self, tokens: Tensor, lengths: Tensor) -> dict[str, Any]:
        """What the model takes. Before its first packed batch, the model is checked.

        Raises:
            ModelError: see `check_packing`.
        """
        if self._unchecked:
            check_packing(self.model, tokens.device)
            self._unchecked = False
        return model_inputs(tokens, lengths, self.packed)

    def smallest_batch(self) -> tuple[Tensor, ...]:
        """Arguments of `forward`."""
        return torch.zeros(1, 2, dtype=torch.long), torch.tensor([2])


class TargetLogprobs(ForwardPass):
    """A causal LM that returns log-probs of chosen tokens of right-padded sequences.

    Args:
        num_tokens: ids from here on are masked: rows of a padded vocabulary that no token has. None masks nothing.
    """

    def __init__(self, model: Any, packed: bool = False, num_tokens: int | None = None) -> None:
        super().__init__(model, packed)
        self.num_tokens = num_tokens
        self._can_slice = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(
        self, tokens: Tensor, lengths: Tensor, target_mask: Tensor, temperature: float = 1.0, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs at the targets, and entropies if asked for.

        Args:
            tokens: [B, T] int64, padded on the right.
            lengths: [B] int64.
            target_mask: [B, T] bool; True at t asks for log p(token t | tokens < t); N ≥ 1 are True. Column 0 is False:
                nothing predicts a first token. `TokenBatch` sees to that, since a look here would wait for the GPU.
            temperature: divides the logits.
            with_entropy: whether to compute entropies.

        Returns:
            ([N] fp32, [N] fp32 or None) in row-major order of `target_mask`.
        """
        inputs = self.inputs(tokens, lengths)
        # Only logits that some row needs are computed: a vocabulary of 150,000 makes prompts' logits the largest tensor.
        if self.packed:
            kept = length_mask(lengths, tokens.shape[1])
            keep = target_mask[kept].nonzero().squeeze(1) - 1
            logits = self._logits(inputs, keep)[0]
        else:
            first = int(target_mask.any(0).to(torch.uint8).argmax())
            keep = torch.arange(first - 1, tokens.shape[1] - 1, device=tokens.device)
            logits = self._logits(inputs, keep)[target_mask[:, first:]]
        logits = logits[..., : self.num_tokens]
        return taken_logprobs(logits, tokens[target_mask], temperature, with_entropy=with_entropy)

    def smallest_batch(self) -> tuple[Tensor, ...]:
        """Arguments of `forward`."""
        return *super().smallest_batch(), torch.tensor([[False, True]])

    def _logits(self, inputs: dict[str, Any], keep: Tensor) -> Tensor:
        """[rows, len(keep), V] logits at the positions `keep` of every row."""
        if self._can_slice:
            return self.model(**inputs, logits_to_keep=keep).logits
        return self.model(**inputs).logits[:, keep]


class ScalarHead(ForwardPass):
    """A sequence-classification model that returns its scalar at every position."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[B, T] fp32: the head applied to the hidden state at each position (which has seen tokens ≤ t), 0 on padding.

        Args:
            tokens: [B, T] int64, padded on the right.
            lengths: [B] int64.
        """
        hidden = self.model.base_model(**self.inputs(tokens, lengths)).last_hidden_state
        scalars = self.model.score(hidden).float().squeeze(-1)
        if self.packed:
            return unpack(scalars[0], lengths, tokens.shape[1])
        return torch.where(length_mask(lengths, tokens.shape[1]), scalars, 0.0)


def check_now(engine: Any, module: ForwardPass) -> None:
    """Have a packed model checked when it is hosted rather than at its first batch. Collective under ZeRO-3.

    Args:
        engine: what runs `module`: anything with `device` and `infer`.
        module: not yet run.

    Raises:
        ModelError: see `check_packing`.
    """
    if module.packed:
        engine.infer(*(argument.to(engine.device) for argument in module.smallest_batch()))


def response_target_mask(prompt_lengths: Tensor, response_lengths: Tensor, width: int) -> Tensor:
    """[B, width] bool, True on the response tokens of [prompt, response, padding]."""
    return length_mask(prompt_lengths + response_lengths, width) & ~length_mask(prompt_lengths, width)


def scatter_responses(flat: Tensor, response_mask: Tensor) -> Tensor:
    """[N] values of response tokens in row-major order → [B, R], 0 outside `response_mask`. Carries gradients."""
    return torch.zeros(response_mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(response_mask, flat)


def state_values(scalars: Tensor, prompt_lengths: Tensor, response_mask: Tensor) -> Tensor:
    """[B, T] scalars at every position → [B, R] value of the state *before* each response token.

    The state before response token t is the prompt and t response tokens, whose last position is prompt_length − 1 + t.
    """
    num_responses = response_mask.shape[1]
    positions = prompt_lengths[:, None] - 1 + torch.arange(num_responses, device=scalars.device)[None, :]
    picked = scalars.gather(1, positions.clamp(max=scalars.shape[1] - 1))
    return torch.where(response_mask, picked, 0.0)


def last_token_scores(scalars: Tensor, lengths: Tensor) -> Tensor:
    """[B, T] scalars → [B], the one at each sequence's last token."""
    return scalars.gather(1, lengths[:, None] - 1).squeeze(1)
