"""A real vLLM engine against `hf`: the same tokens in fp32, whatever the batch, and after weight updates."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.tiny import prompt_batch, save_tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.core.batches import PromptBatch, RolloutBatch
from rlhf_dist.core.errors import TrainingError
from rlhf_dist.models.loading import skeleton
from rlhf_dist.rollout.config import RolloutConfig, SamplingConfig
from rlhf_dist.rollout.hf import HFEngine
from rlhf_dist.rollout.weights import Arrivals

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

LIMIT, NUM_TOKENS = 14, 290
PROMPTS = prompt_batch([5, 2, 9, 1, 7, 3, 5, 8, 2, 6, 40, 33])
STOP = list(range(2, 30))
"""Enough stop tokens for rows to end at many different positions."""


@pytest.fixture(scope="module", params=["untied", "tied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, HFEngine]]:
    """A vLLM engine, and `hf` with the same weights."""
    from rlhf_dist.rollout.vllm import VLLMEngine

    path = tmp_path_factory.mktemp(request.param)
    save_tiny_lm(path, tie_word_embeddings=request.param == "tied", num_attention_heads=2)  # 16 wide heads: not on CPUs
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    hf = HFEngine(model, STOP, seed=11, num_tokens=NUM_TOKENS, tokenizer=AutoTokenizer.from_pretrained(path))
    vllm = VLLMEngine(
        str(path),
        STOP,
        {name: parameter.shape for name, parameter in skeleton(str(path)).named_parameters()},
        precision="fp32",
        seed=11,
        device="cpu",
        max_sequences=8,  # fewer than prompts
        max_length_tokens=64,
        num_tokens=NUM_TOKENS,
        stop_texts=True,
    )
    yield vllm, hf
    vllm.close()


def responses(rollout: RolloutBatch) -> list[list[int]]:
    return [
        rollout.tokens[i, n : n + m].tolist()
        for i, (n, m) in enumerate(zip(rollout.prompt_lengths.tolist(), rollout.response_lengths.tolist(), strict=True))
    ]


def both(pair: tuple[Any, HFEngine], prompts: PromptBatch = PROMPTS, **sampling: Any) -> list[RolloutBatch]:
    settings = RolloutConfig(engine="vllm", **({"max_response_tokens": LIMIT} | sampling))
    return [engine.generate(prompts, settings, stream="rollout", iteration=3) for engine in pair]


def agree(one: RolloutBatch, other: RolloutBatch) -> None:
    assert responses(one) == responses(other)
    for name in ("tokens", "prompt_lengths", "response_lengths", "finish_reasons"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.rollout_logprobs.shape == other.rollout_logprobs.shape
    assert torch.allclose(one.rollout_logprobs, other.rollout_logprobs, atol=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_p": 0.8},
        {"top_k": 5},
        {"min_p": 0.1},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "min_p": 0.02},
        {"stop_token_ids": (99, 100, 101, 102, 103)},
    ],
    ids=str,
)
def test_tokens_and_logprobs_are_those_of_hf(pair: tuple[Any, HFEngine], sampling: dict[str, Any]):
    vllm, hf = both(pair, **sampling)
    agree(vllm, hf)
    assert len(set(hf.response_lengths.tolist())) > 3


def test_any_order_and_any_batch(pair: tuple[Any, HFEngine]):
    vllm, _ = pair
    settings = SamplingConfig(max_response_tokens=LIMIT)
    whole = vllm.generate(PROMPTS, settings, stream="rollout", iteration=3)
    for rows in ([3], [11, 0, 5], list(range(11, -1, -1))):
        part = vllm.generate(PROMPTS.rows(rows), settings, stream="rollout", iteration=3)
        assert responses(part) == [responses(whole)[row] for row in rows]


def test_responses_to_one_prompt_differ_and_are_those_of_hf(pair: tuple[Any, HFEngine]):
    rows = [10, 10, 10, 11, 10, 11]
    shared = PromptBatch(PROMPTS.tokens[rows], PROMPTS.lengths[rows], torch.arange(6))
    vllm, hf = both(pair, shared, temperature=0.9)
    agree(vllm, hf)
    assert len({tuple(response) for response in responses(vllm)}) > 3


def test_stop_texts(pair: tuple[Any, HFEngine]):
    _, hf = both(pair)
    text = pair[1].tokenizer.decode(max(responses(hf), key=len))
    stop = next(text[i : i + 2] for i in range(2, len(text)) if len(text[i : i + 2].strip()) == 2)
    vllm, cut = both(pair, stop=(stop,))
    agree(vllm, cut)
    assert responses(cut) != responses(hf)


def test_after_weight_updates_tokens_are_those_of_the_new_weights(pair: tuple[Any, HFEngine]):
    vllm, hf = pair
    before = responses(both(pair)[0])
    for version in (1, 2):
        with torch.no_grad():
            for i, parameter in enumerate(hf.model.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * version + i))
                parameter.add_(0.05 * noise)
        names = dict(hf.model.named_parameters())
        halves = [dict(list(names.items())[:3]), dict(list(names.items())[3:])]
        sums = Arrivals({name: p.shape for name, p in names.items()})
        for bucket in halves:
            vllm.load_bucket({name: p.detach().clone() for name, p in bucket.items()})
            for name, p in bucket.items():
                sums.take(name, p.detach())
        assert vllm.finish_update(version) == sums.finish()
        assert vllm.policy_version == version
        mine, reference = both(pair)
        assert mine.policy_version == version
        agree(mine, reference)
        assert responses(mine) != before
        before = responses(mine)
        greedy, reference = both(pair, top_k=1)
        agree(greedy, reference)


def test_a_parameter_of_another_model_is_rejected(pair: tuple[Any, HFEngine]):
    vllm, _ = pair
    for bucket in ({"no.such": torch.zeros(2)}, {"model.norm.weight": torch.zeros(3)}):
        with pytest.raises(TrainingError, match=next(iter(bucket))):
            vllm.load_bucket(bucket)
    with pytest.raises(TrainingError, match="did not arrive"):
        vllm.finish_update(9)
