"""Generation with transformers: a decoding loop over the model's KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_dist.core.batches import FINISHED, TRUNCATED, PromptBatch, RolloutBatch, length_mask, pad_rows
from rlhf_dist.core.random import uniforms
from rlhf_dist.rollout.sampling import sample_tokens


class HFEngine:
    """Samples responses from a causal LM.

    Its own loop rather than `generate()`, for three things that PPO needs: counter-based sampling (the same tokens on any
    split of a batch), the log-prob of each token under the distribution it was drawn from, and no [B, R, V] tensor.
    """

    def __init__(
        self,
        model: Any,
        stop_token_ids: list[int],
        *,
        max_response_tokens: int,
        temperature: float,
        seed: int,
        top_p: float = 1.0,
        num_tokens: int | None = None,
    ) -> None:
        """`num_tokens`: ids from here on are never drawn (rows of a padded vocabulary that no token has)."""
        self.model = model.eval()
        self.stop_token_ids = torch.tensor(stop_token_ids)
        self.max_response_tokens = max_response_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.num_tokens = num_tokens
        self.seed = seed

    @torch.no_grad()
    def generate(self, prompts: PromptBatch, *, stream: str, iteration: int, policy_version: int) -> RolloutBatch:
        """One response a prompt; ends at a stop token (kept) or at `max_response_tokens`."""
        device = next(self.model.parameters()).device
        noise = uniforms(self.seed, stream, iteration, prompts.sample_ids, self.max_response_tokens).to(device)
        tokens, logprobs, lengths = self._decode(prompts.to(device), noise)
        finished = torch.isin(tokens.gather(1, lengths[:, None] - 1).squeeze(1), self.stop_token_ids)
        return RolloutBatch(
            tokens=_join(prompts, tokens, lengths),
            prompt_lengths=prompts.lengths,
            response_lengths=lengths,
            rollout_logprobs=torch.where(length_mask(lengths, tokens.shape[1]), logprobs, 0.0),
            finish_reasons=torch.where(finished, FINISHED, TRUNCATED),
            policy_version=policy_version,
        )

    def _decode(self, prompts: PromptBatch, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """([B, R] tokens, [B, R] log-probs, [B] lengths), on the CPU. Rows leave the batch when they end."""
        device = noise.device
        stop = self.stop_token_ids.to(device)
        # Left padding puts every row's last prompt token in the last column, where decoding continues.
        width = prompts.tokens.shape[1]
        shift = (torch.arange(width, device=device)[None, :] - (width - prompts.lengths)[:, None]) % width
        inputs = prompts.tokens.gather(1, shift)
        mask = length_mask(prompts.lengths, width).flip(1)
        active = torch.arange(len(prompts), device=device)
        out_tokens = torch.zeros(len(prompts), self.max_response_tokens, dtype=torch.long, device=device)
        out_logprobs = torch.zeros(len(prompts), self.max_response_tokens, device=device)
        lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
        cache = DynamicCache(config=self.model.config)
        for t in range(self.max_response_tokens):
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
            logits = self.model(
                input_ids=inputs,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1, : self.num_tokens]
            tokens, logprobs = sample_tokens(logits, noise[active, t], self.temperature, self.top_p)
            out_tokens[active, t], out_logprobs[active, t], lengths[active] = tokens, logprobs, t + 1
            going = ~torch.isin(tokens, stop)
            if not going.any():
                break
            if not going.all():
                active, tokens, mask = active[going], tokens[going], mask[going]
                cache.batch_select_indices(going.nonzero().squeeze(1))
            inputs = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        longest = int(lengths.max())
        return out_tokens[:, :longest].cpu(), out_logprobs[:, :longest].cpu(), lengths.cpu()


def _join(prompts: PromptBatch, responses: Tensor, lengths: Tensor) -> Tensor:
    """[B, T]: prompt, response, padding."""
    rows = [
        torch.cat([prompt[:n], response[:m]])
        for prompt, n, response, m in zip(
            prompts.tokens, prompts.lengths.tolist(), responses, lengths.tolist(), strict=True
        )
    ]
    return pad_rows(rows)
