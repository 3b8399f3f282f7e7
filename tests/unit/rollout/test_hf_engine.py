"""Generation: the same tokens on any split of a batch, and the log-probs PPO relies on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import prompt_batch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.core.batches import FINISHED, TRUNCATED, PromptBatch, RolloutBatch
from rlhf_dist.core.random import uniforms
from rlhf_dist.models.forward import TargetLogprobs, response_target_mask, scatter_responses
from rlhf_dist.rollout.config import SamplingConfig
from rlhf_dist.rollout.hf import HFEngine
from rlhf_dist.rollout.sampling import sample_tokens

PROMPTS = prompt_batch([5, 2, 9, 1, 7, 3])
LIMIT = 14
STOP = list(range(2, 42))
"""Enough stop tokens for rows to end at many different positions."""


@pytest.fixture(scope="module")
def lm(tiny_lm: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32).eval()


def generate(
    lm,
    prompts: PromptBatch,
    iteration: int = 0,
    stream: str = "rollout",
    stop: list[int] = STOP,
    batches: list[list[int]] | None = None,
    **sampling,
) -> RolloutBatch:
    engine = HFEngine(lm, stop, seed=11)
    engine.policy_version = 4
    settings = SamplingConfig(**({"max_response_tokens": LIMIT, "temperature": 0.9} | sampling))
    return engine.generate(prompts, settings, stream=stream, iteration=iteration, batches=batches)


def responses(rollout: RolloutBatch) -> list[list[int]]:
    return [
        rollout.tokens[i, n : n + m].tolist()
        for i, (n, m) in enumerate(zip(rollout.prompt_lengths.tolist(), rollout.response_lengths.tolist(), strict=True))
    ]


@torch.no_grad()
def one_by_one(lm, prompts: PromptBatch, temperature: float) -> list[list[int]]:
    """The plainest way to sample: every token from a whole forward pass over one unpadded sequence."""
    noise, out = uniforms(11, "rollout", 0, prompts.sample_ids, LIMIT), []
    for row, n in enumerate(prompts.lengths.tolist()):
        tokens, response = prompts.tokens[row, :n], []
        for t in range(LIMIT):
            token = sample_tokens(
                lm(tokens[None]).logits[:, -1], noise[row, t : t + 1], SamplingConfig(temperature=temperature)
            )[0]
            tokens, response = torch.cat([tokens, token]), [*response, int(token)]
            if response[-1] in STOP:
                break
        out.append(response)
    return out


def test_equals_sampling_one_token_at_a_time_without_cache_or_padding(lm):
    rollout = generate(lm, PROMPTS)
    assert responses(rollout) == one_by_one(lm, PROMPTS, 0.9)
    # The case is worth its name only if rows end at different times, some of them never.
    assert len(set(rollout.response_lengths.tolist())) >= 4


def test_the_record(lm):
    rollout = generate(lm, PROMPTS)
    assert rollout.policy_version == 4
    assert torch.equal(rollout.prompt_lengths, PROMPTS.lengths)
    assert rollout.tokens.shape[1] == int(rollout.lengths.max())
    assert rollout.rollout_logprobs.shape[1] == int(rollout.response_lengths.max())
    for i, response in enumerate(responses(rollout)):
        n = int(PROMPTS.lengths[i])
        assert torch.equal(rollout.tokens[i, :n], PROMPTS.tokens[i, :n])
        assert not set(response[:-1]) & set(STOP)
        ended = response[-1] in STOP
        assert rollout.finish_reasons[i] == (FINISHED if ended else TRUNCATED)
        assert ended or len(response) == LIMIT
        assert (rollout.tokens[i, n + len(response) :] == 0).all()
        assert (rollout.rollout_logprobs[i, len(response) :] == 0).all()


@pytest.mark.parametrize(
    "split", [[[0, 1, 2, 3, 4, 5]], [[5, 3, 1], [4, 2, 0]], [[0], [1], [2], [3], [4], [5]], [[2, 4], [0, 5, 1, 3]]]
)
def test_the_split_of_a_batch_changes_no_token(lm, split: list[list[int]]):
    whole = generate(lm, PROMPTS)
    for rows in split:
        part = generate(lm, PROMPTS.rows(rows))
        assert responses(part) == [responses(whole)[row] for row in rows]
        expected = whole.rows(rows)
        assert torch.allclose(part.rollout_logprobs, expected.rollout_logprobs, atol=1e-4)
        assert torch.equal(part.finish_reasons, expected.finish_reasons)


def test_the_draw_depends_on_sample_iteration_and_stream(lm):
    base = responses(generate(lm, PROMPTS))
    others = [
        responses(generate(lm, PROMPTS, iteration=1)),
        responses(generate(lm, PROMPTS, stream="eval")),
        responses(generate(lm, PromptBatch(PROMPTS.tokens, PROMPTS.lengths, PROMPTS.sample_ids + 1))),
    ]
    assert all(sum(a == b for a, b in zip(base, other, strict=True)) <= 2 for other in others)
    assert responses(generate(lm, PROMPTS)) == base


def test_the_same_prompt_gets_different_responses(lm):
    twice = PromptBatch(PROMPTS.tokens[[0, 0]], PROMPTS.lengths[[0, 0]], torch.tensor([0, 1]))
    first, second = responses(generate(lm, twice, stop=[1]))
    assert first != second


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rollout_logprobs_are_those_of_the_training_forward_pass(lm, temperature: float):
    rollout = generate(lm, PROMPTS, temperature=temperature)
    targets = response_target_mask(rollout.prompt_lengths, rollout.response_lengths, rollout.tokens.shape[1])
    flat, _ = TargetLogprobs(lm)(rollout.tokens, rollout.lengths, targets, temperature)
    expected = scatter_responses(flat, rollout.response_mask)
    assert torch.allclose(rollout.rollout_logprobs, expected, atol=1e-4)


def test_without_a_stop_token_every_response_is_truncated(lm):
    rollout = generate(lm, PROMPTS, stop=[299_999])
    assert (rollout.response_lengths == LIMIT).all()
    assert (rollout.finish_reasons == TRUNCATED).all()


def test_a_response_can_end_at_once(lm):
    rollout = generate(lm, PROMPTS, stop=list(range(300)))
    assert (rollout.response_lengths == 1).all()
    assert (rollout.finish_reasons == FINISHED).all()


def test_a_stop_token_at_the_very_limit_is_an_end(lm):
    whole = generate(lm, PROMPTS, stop=[299_999])
    last = responses(whole)[0][-1]
    first = responses(whole)[0].index(last) + 1
    rollout = generate(lm, PROMPTS.rows([0]), stop=[last], max_response_tokens=first)
    assert rollout.response_lengths.tolist() == [first]
    assert rollout.finish_reasons.tolist() == [FINISHED]


def test_batches_are_put_back_in_order(lm):
    whole, parts = generate(lm, PROMPTS), generate(lm, PROMPTS, batches=[[4, 1], [], [5], [0, 3, 2]])
    assert responses(parts) == responses(whole)
    assert torch.allclose(parts.rollout_logprobs, whole.rollout_logprobs, atol=1e-4)


def test_prompts_that_are_shared_run_once_and_change_no_token(lm, monkeypatch: pytest.MonkeyPatch):
    rows = [0, 3, 0, 0, 1, 3]
    shared = PromptBatch(PROMPTS.tokens[rows], PROMPTS.lengths[rows], torch.arange(6))
    sizes, forward = [], HFEngine._forward
    monkeypatch.setattr(
        HFEngine, "_forward", lambda self, ids, *args: sizes.append(len(ids)) or forward(self, ids, *args)
    )
    together = generate(lm, shared)
    assert sizes[:2] == [3, 6]  # three prompts are read, six responses are written
    apart = [responses(generate(lm, shared.rows([row])))[0] for row in range(6)]
    assert responses(together) == apart


def test_further_stop_tokens(lm):
    whole = generate(lm, PROMPTS, stop=[299_999])
    token = responses(whole)[0][3]
    first = responses(whole)[0].index(token) + 1
    cut = generate(lm, PROMPTS, stop=[299_999], stop_token_ids=(token,))
    assert responses(cut)[0] == responses(whole)[0][:first]
    assert cut.finish_reasons[0] == FINISHED


def test_stop_texts_end_a_response_with_the_token_that_completes_them(lm, tiny_lm: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    whole = responses(generate(lm, PROMPTS, stop=[299_999]))
    text = tokenizer.decode(whole[0])
    stop = next(text[i : i + 3] for i in range(4, len(text)) if len(text[i : i + 3].strip()) == 3)
    cut = HFEngine(lm, [299_999], seed=11, tokenizer=tokenizer).generate(
        PROMPTS, SamplingConfig(max_response_tokens=LIMIT, temperature=0.9, stop=(stop,)), stream="rollout", iteration=0
    )
    for i, (before, after) in enumerate(zip(whole, responses(cut), strict=True)):
        # The first prefix whose text holds the stop text; else all of it.
        ends = next((n for n in range(1, LIMIT + 1) if stop in tokenizer.decode(before[:n])), None)
        assert after == before[:ends], i
        assert cut.finish_reasons[i] == (TRUNCATED if ends is None else FINISHED)
    assert cut.finish_reasons[0] == FINISHED
