"""Generation with transformers: a decoding loop over the model's KV cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_dist.core.batches import FINISHED, TRUNCATED, PromptBatch, RolloutBatch, concat_rows, length_mask, pad_rows
from rlhf_dist.core.offload import Level, Offloadable
from rlhf_dist.core.random import uniforms
from rlhf_dist.rollout.config import SamplingConfig
from rlhf_dist.rollout.sampling import sample_tokens
from rlhf_dist.rollout.weights import WeightTarget


class HFEngine:
    """Samples responses from a causal LM; see `rollout.engine.Engine`.

    Its own loop rather than `generate()`, for three things that PPO needs: counter-based sampling (the same tokens on any
    split of a batch), the log-prob of each token under the distribution it was drawn from, and no [B, R, V] tensor.
    """

    def __init__(
        self,
        model: Any,
        stop_token_ids: Sequence[int],
        *,
        seed: int,
        num_tokens: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        """`num_tokens`: ids from here on are never drawn (rows of a padded vocabulary that no token has). `tokenizer`: needed
        for stop texts only."""
        self.model: Any = model.eval()
        self.stop_token_ids = tuple(stop_token_ids)
        self.num_tokens = num_tokens
        self.tokenizer = tokenizer
        self.seed = seed
        self.policy_version = 0
        self._target: Any = WeightTarget(model)
        self._memory = Offloadable(next(model.parameters()).device)

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingConfig,
        *,
        stream: str,
        iteration: int,
        batches: Sequence[Sequence[int]] | None = None,
    ) -> RolloutBatch:
        """See `Engine`."""
        if batches is None:
            return self._generate(prompts, sampling, stream, iteration)
        parts = [self._generate(prompts.rows(rows), sampling, stream, iteration) for rows in batches if rows]
        order = torch.tensor([row for rows in batches for row in rows])
        return concat_rows(parts).rows(torch.argsort(order))

    @torch.no_grad()
    def _generate(self, prompts: PromptBatch, sampling: SamplingConfig, stream: str, iteration: int) -> RolloutBatch:
        device = next(self.model.parameters()).device
        noise = uniforms(self.seed, stream, iteration, prompts.sample_ids, sampling.max_response_tokens).to(device)
        tokens, logprobs, lengths, finished = self._decode(prompts.to(device), noise, sampling)
        return RolloutBatch(
            tokens=join_responses(prompts, tokens, lengths),
            prompt_lengths=prompts.lengths,
            response_lengths=lengths,
            rollout_logprobs=torch.where(length_mask(lengths, tokens.shape[1]), logprobs, 0.0),
            finish_reasons=torch.where(finished, FINISHED, TRUNCATED),
            policy_version=self.policy_version,
        )

    def _decode(
        self, prompts: PromptBatch, noise: Tensor, sampling: SamplingConfig
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """([B, R] tokens, [B, R] log-probs, [B] lengths, [B] bool: ended by itself), on the CPU. Rows leave the batch when they
        end."""
        device, num = noise.device, len(prompts)
        ends = _Ends((*self.stop_token_ids, *sampling.stop_token_ids), sampling.stop, self.tokenizer, device)
        active = torch.arange(num, device=device)
        out_tokens = torch.zeros(num, sampling.max_response_tokens, dtype=torch.long, device=device)
        out_logprobs = torch.zeros(num, sampling.max_response_tokens, device=device)
        lengths = torch.zeros(num, dtype=torch.long, device=device)
        finished = torch.zeros(num, dtype=torch.bool, device=device)
        logits, mask, cache = self._prefill(prompts)
        for t in range(sampling.max_response_tokens):
            tokens, logprobs = sample_tokens(logits, noise[active, t], sampling)
            out_tokens[active, t], out_logprobs[active, t], lengths[active] = tokens, logprobs, t + 1
            ended = ends(tokens, out_tokens[active, : t + 1])
            finished[active] = ended
            if ended.all() or t + 1 == sampling.max_response_tokens:
                break
            if ended.any():
                going = ~ended
                active, tokens, mask = active[going], tokens[going], mask[going]
                cache.batch_select_indices(going.nonzero().squeeze(1))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self._forward(tokens[:, None], mask, cache)
        longest = int(lengths.max())
        return out_tokens[:, :longest].cpu(), out_logprobs[:, :longest].cpu(), lengths.cpu(), finished.cpu()

    def _prefill(self, prompts: PromptBatch) -> tuple[Tensor, Tensor, Any]:
        """([B, V] logits after each prompt, [B, T] mask, cache). Prompts that several rows share run once."""
        first, row_of = _distinct(prompts)
        width = prompts.tokens.shape[1]
        cache = DynamicCache(config=self.model.config)
        # Left padding puts every row's last prompt token in the last column, where decoding continues.
        lengths = prompts.lengths[first]
        shift = (torch.arange(width, device=lengths.device)[None, :] - (width - lengths)[:, None]) % width
        inputs = prompts.tokens[first].gather(1, shift)
        mask = length_mask(lengths, width).flip(1)
        logits = self._forward(inputs, mask, cache)
        if len(first) == len(prompts):
            return logits, mask, cache
        cache.batch_select_indices(row_of)
        return logits[row_of], mask[row_of], cache

    def _forward(self, inputs: Tensor, mask: Tensor, cache: Any) -> Tensor:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        return self.model(
            input_ids=inputs,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1, : self.num_tokens]

    def load_bucket(self, bucket: dict[str, Tensor]) -> None:
        """See `Engine`."""
        self._target.load_bucket(bucket)

    def finish_update(self, version: int) -> int:
        """See `Engine`."""
        total = self._target.finish()
        self.policy_version = version
        return total

    def hold(self, level: Level) -> None:
        """See `Engine`. A KV cache exists only while it generates."""
        self._memory.hold(level, self._tensors)

    def _tensors(self) -> Iterator[Tensor]:
        return itertools.chain(self.model.parameters(), self.model.buffers())

    def close(self) -> None:
        """See `Engine`."""
        self.model = self._target = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Ends:
    """Which rows of a batch have just ended."""

    def __init__(self, token_ids: Sequence[int], texts: Sequence[str], tokenizer: Any, device: torch.device) -> None:
        self._token_ids = torch.tensor(list(token_ids), dtype=torch.long, device=device)
        self._texts = tuple(texts)
        self._tokenizer = tokenizer
        # A character has at most four bytes, and a token at least one.
        self._tail = 4 * max(map(len, texts), default=0) + 1

    def __call__(self, tokens: Tensor, responses: Tensor) -> Tensor:
        """[n] bool.

        Args:
            tokens: [n], drawn now.
            responses: [n, t], with them; of responses alone, so that no text begins in a prompt.
        """
        ended = torch.isin(tokens, self._token_ids)
        if self._texts:
            tails = self._tokenizer.batch_decode(responses[:, -self._tail :].tolist(), skip_special_tokens=False)
            ended |= torch.tensor([any(text in tail for text in self._texts) for tail in tails], device=ended.device)
        return ended


def _distinct(prompts: PromptBatch) -> tuple[Tensor, Tensor]:
    """([D] the first row of each prompt, [B] which of them each row is)."""
    numbers: dict[tuple[int, ...], int] = {}
    first, row_of = [], []
    for row, (tokens, n) in enumerate(zip(prompts.tokens.tolist(), prompts.lengths.tolist(), strict=True)):
        number = numbers.setdefault(tuple(tokens[:n]), len(first))
        if number == len(first):
            first.append(row)
        row_of.append(number)
    device = prompts.tokens.device
    return torch.tensor(first, device=device), torch.tensor(row_of, device=device)


def join_responses(prompts: PromptBatch, tokens: Tensor, lengths: Tensor) -> Tensor:
    """[B, T]: prompt, response, padding."""
    rows = [
        torch.cat([prompt[:n], response[:m]])
        for prompt, n, response, m in zip(
            prompts.tokens, prompts.lengths.tolist(), tokens, lengths.tolist(), strict=True
        )
    ]
    return pad_rows(rows)
