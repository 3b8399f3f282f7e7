"""Responses as the reward model was trained to read them: in its own chat template, and its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.config.data import DataSettings
from rlhf_dist.core.batches import FINISHED, TRUNCATED, RolloutBatch, SequenceBatch, pad_rows
from rlhf_dist.core.errors import DataError, ModelError
from rlhf_dist.data.chat_template import Message, stop_token_ids
from rlhf_dist.data.datasets import PromptDataset
from rlhf_dist.data.encoding import encode_rendered
from rlhf_dist.data.records import Prompt
from rlhf_dist.data.rendering import Rendered as Rendering
from rlhf_dist.data.rendering import render_conversation
from rlhf_dist.data.tokenization import used_prompt

RewardInput = Callable[[RolloutBatch], SequenceBatch]
"""What a reward model scores of a rollout."""


def as_generated(rollout: RolloutBatch) -> SequenceBatch:
    """The tokens themselves."""
    return rollout.sequences


class Rendered:
    """Renders prompts and responses again, for a reward model of another template or tokenizer.

    A response's text is what its tokens decode to without the token that ended it; a truncated response is not ended in the
    reward model's template either. Prompts are arranged and cut as they were for the policy.
    """

    def __init__(
        self,
        datasets: Sequence[PromptDataset],
        tokenizer: Any,
        settings: DataSettings,
        reward_tokenizer: Any,
        limit: int | None,
    ) -> None:
        """
        Args:
            datasets: prompts that responses are to, with their records.
            tokenizer: of the policy.
            settings: how the prompts were tokenized, with their limit as `max_length_tokens`.
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
        self._settings = settings
        self._reward_tokenizer = reward_tokenizer
        self._reward_stops = set(stop_token_ids(reward_tokenizer))
        self._limit = limit

    def check(self, max_response_tokens: int) -> None:
        """Try every prompt, before anything is started.

        Raises:
            ModelError: one that the reward model's template does not support, or that leaves no room for a response.
        """
        for number, item in self._place_of.values():
            record = self._datasets[number].records[item]
            said = {"role": "assistant", "content": "x"}
            [found] = encode_rendered(self._reward_tokenizer, [self._in_template(record, said)])
            num_tokens = 0 if isinstance(found, DataError) else found[1].index(True) + max_response_tokens
            if self._limit is not None and num_tokens > self._limit:
                raise ModelError(
                    f"{record.location}: the prompt and a response of {max_response_tokens} tokens have {num_tokens} in the "
                    f"reward model's template, more than its context of {self._limit}; lower data.max_length_tokens or "
                    "rollout.max_response_tokens"
                )

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

    def _rendered(self, rollout: RolloutBatch, row: int) -> Rendering:
        n, m = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        number, item = self._place_of[_key(rollout.tokens[row, :n])]
        response = rollout.tokens[row, n : n + m].tolist()
        if rollout.finish_reasons[row] == FINISHED:
            response = response[:-1]
        text = str(self._tokenizer.decode(response, skip_special_tokens=True))
        return self._in_template(self._datasets[number].records[item], {"role": "assistant", "content": text})

    def _in_template(self, record: Prompt, said: Message) -> Rendering:
        messages = used_prompt(record, self._tokenizer, self._settings)
        try:
            # The template may cut what a policy writes (its reasoning): it did so when the reward model was trained.
            return render_conversation(
                self._reward_tokenizer, [*messages, said], [len(messages)], record.tools, may_cut=True
            )
        except DataError as error:
            raise ModelError(
                f"{record.location}: the prompt cannot be rendered in the reward model's template: {error}"
            ) from error


def _key(tokens: Tensor) -> bytes:
    return tokens.numpy().astype(np.int32).tobytes()
