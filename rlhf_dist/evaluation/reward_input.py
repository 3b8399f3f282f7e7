"""Responses as the reward model was trained to read them: in its own chat template, and its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.core.batches import TRUNCATED, RolloutBatch, SequenceBatch, pad_rows
from rlhf_dist.core.errors import ModelError
from rlhf_dist.data.encoding import encode_rendered
from rlhf_dist.data.rendering import render_conversation, stop_token_ids

RewardInput = Callable[[RolloutBatch], SequenceBatch]
"""What a reward model scores of a rollout."""


def as_generated(rollout: RolloutBatch) -> SequenceBatch:
    """The tokens themselves."""
    return rollout.sequences


class Rendered:
    """Renders prompts and responses again, for a reward model of another template or tokenizer.

    A response's text is what its tokens decode to without the token that ended it; a truncated response is not ended in the
    reward model's template either.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        tokenizer: Any,
        stop_tokens: Sequence[int],
        reward_tokenizer: Any,
        limit: int | None,
    ) -> None:
        """
        Args:
            datasets: prompts that responses are to, with their records.
            tokenizer: of the policy.
            stop_tokens: of the policy.
            reward_tokenizer: of the reward model, with its template.
            limit: the reward model's context in tokens, where it has one.
        """
        self._datasets = datasets
        self._place_of: dict[bytes, tuple[int, int]] = {}
        """Data set and item of each prompt, by its tokens."""
        for number, dataset in enumerate(datasets):
            for item in range(len(dataset)):
                self._place_of[_key(dataset.batch([item]).tokens[0])] = number, item
        self._tokenizer = tokenizer
        self._stops = set(stop_tokens)
        self._reward_tokenizer = reward_tokenizer
        self._reward_stops = set(stop_token_ids(reward_tokenizer))
        self._limit = limit

    def __call__(self, rollout: RolloutBatch) -> SequenceBatch:
        """
        Raises:
            ModelError: a sequence is longer than the reward model's context.
        """
        rendered = [self._rendered(rollout, row) for row in range(len(rollout))]
        rows = []
        for found, reason in zip(
            encode_rendered(self._reward_tokenizer, rendered), rollout.finish_reasons.tolist(), strict=True
        ):
            if isinstance(found, Exception):
                raise ModelError(f"a response cannot be rendered in the reward model's template: {found}") from found
            ids = found[0][:-1] if reason == TRUNCATED and found[0][-1] in self._reward_stops else found[0]
            if self._limit is not None and len(ids) > self._limit:
                raise ModelError(
                    f"a prompt and its response have {len(ids)} tokens in the reward model's template, more than its context "
                    f"of {self._limit}; lower data.max_length_tokens"
                )
            rows.append(torch.tensor(ids))
        return SequenceBatch(pad_rows(rows), torch.tensor([len(row) for row in rows]))

    def _rendered(self, rollout: RolloutBatch, row: int) -> Any:
        n, m = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        tokens = rollout.tokens[row].tolist()
        response = tokens[n : n + m]
        if response[-1] in self._stops:
            response = response[:-1]
        number, item = self._place_of[_key(rollout.tokens[row, :n])]
        record = self._datasets[number].records[item]
        messages, tools = record.messages, record.tools
        said = {"role": "assistant", "content": str(self._tokenizer.decode(response, skip_special_tokens=True))}
        # The template may cut what a policy writes (its reasoning): it did so when the reward model was trained.
        return render_conversation(self._reward_tokenizer, [*messages, said], [len(messages)], tools, may_cut=True)


def _key(tokens: Tensor) -> bytes:
    return tokens.numpy().astype(np.int32).tobytes()
