# pyright: reportMissingImports=false, reportUntypedBaseClass=false
"""What this project adds to vLLM: its own draws, and a way for weights to come in. Imported by vLLM's engine; vLLM is optional.

Written for vLLM's V1 model runner (seen with 0.32).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from rlhf_dist.core.random import uniforms
from rlhf_dist.rollout.config import SamplingConfig
from rlhf_dist.rollout.sampling import sample_tokens

DRAW = "rlhf_dist_draw"
"""Key of a request's `Draw` in `SamplingParams.extra_args`."""


class Kind(NamedTuple):
    """What rows must share to be drawn in one call; a `sampling.Distribution`."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    num_tokens: int | None
    """Ids from here on are never drawn."""

    @classmethod
    def of(cls, sampling: SamplingConfig, num_tokens: int | None) -> Kind:
        """The kind of a request."""
        return cls(sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, num_tokens)


@dataclass(frozen=True)
class Draw:
    """What the tokens of a response are drawn by."""

    seed: int
    stream: str
    iteration: int
    sample_id: int
    max_response_tokens: int
    kind: Kind


class _Row:
    """A request under way."""

    def __init__(self, draw: Draw, response: list[int]) -> None:
        numbers = uniforms(draw.seed, draw.stream, draw.iteration, [draw.sample_id], draw.max_response_tokens)
        self._uniforms: list[float] = numbers[0].tolist()
        # vLLM appends to this list. Its length is the position, also where a preempted draw is repeated.
        self._response = response
        self.kind = draw.kind

    @property
    def uniform(self) -> float:
        """Of the token to be drawn now."""
        return self._uniforms[min(len(self._response), len(self._uniforms) - 1)]


class CounterDraws(LogitsProcessor):
    """Draws the next token with counter-based uniforms, and leaves it as the only one, its logit replaced by its log-prob.

    vLLM then takes it greedily, and with `logprobs_mode="processed_logits"` reports that log-prob. A response thus is a
    function of (weights, seed, stream, iteration, sample id) whatever the batch, up to the rounding of the kernels.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        """vLLM makes it."""
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """It decides the argmax."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests through vLLM's persistent batch."""
        process_dict_updates(self._rows, batch_update, _new_row)

    def apply(self, logits: Tensor) -> Tensor:
        """[B, V] fp32, changed in place."""
        kinds: dict[Kind, list[int]] = {}
        for index in sorted(self._rows):
            if index < len(logits):
                kinds.setdefault(self._rows[index].kind, []).append(index)
        for kind, indices in kinds.items():
            numbers = torch.tensor([self._rows[index].uniform for index in indices], dtype=torch.float64)
            rows = torch.tensor(indices, device=logits.device)
            part = logits if len(indices) == len(logits) else logits[rows]
            tokens, logprobs = sample_tokens(part[:, : kind.num_tokens], numbers.to(logits.device), kind)
            logits[rows] = -torch.inf
            logits[rows, tokens] = logprobs
        return logits


def _new_row(params: Any, _prompt: list[int] | None, response: list[int]) -> _Row | None:
    draw = (params.extra_args or {}).get(DRAW)
    return None if draw is None else _Row(draw, response)


@dataclass
class _Nothing(WeightTransferInitInfo):
    """There is nothing to agree on."""


@dataclass
class _Bucket(WeightTransferUpdateInfo):
    """Some whole parameters."""

    tensors: dict[str, Tensor] = field(default_factory=dict)


class BucketTransfer(WeightTransferEngine[_Nothing, _Bucket]):
    """A backend of vLLM's weight transfer that is handed the parameters: names as in the Hugging Face model, unsharded; vLLM
    fuses, shards and packs them."""

    init_info_cls = _Nothing
    update_info_cls = _Bucket

    def init_transfer_engine(self, init_info: _Nothing) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Make parameters whole again that a device has packed."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _Bucket) -> None:
        """Load a bucket."""
        self.model.load_weights(update_info.tensors.items())

    def finish_weight_update(self) -> None:
        """Pack them anew. vLLM's reload leaves a tied head on the old weights: it is tied again."""
        finalize_layerwise_reload(self.model, self.model_config)
        if not self.model_config.hf_text_config.tie_word_embeddings:
            return
        modules = list(self.model.modules())
        (embedding, *_) = [
            m for m in modules if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)
        ]
        with set_current_vllm_config(self.vllm_config):
            for head in (m for m in modules if isinstance(m, ParallelLMHead)):
                head.tie_weights(embedding)
                head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Nothing was opened."""
