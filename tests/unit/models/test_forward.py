"""The two forward passes: which logits and which hidden states are read, and that padding never matters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.tiny import random_rows, token_batch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.core.batches import length_mask, pad_rows
from rlhf_dist.models.forward import (
    ScalarHead,
    TargetLogprobs,
    last_token_scores,
    response_target_mask,
    scatter_responses,
    state_values,
)

LENGTHS = [9, 4, 13, 2, 7]


@pytest.fixture(scope="module")
def lm(tiny_lm: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_lm).double().eval()


@pytest.fixture(scope="module")
def rm(tiny_rm: Path):
    return AutoModelForSequenceClassification.from_pretrained(tiny_rm).double().eval()


def naive(lm, tokens: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """log p of the targets of one unpadded sequence, from a whole forward pass."""
    log_p = torch.log_softmax(lm(tokens[None]).logits[0] / temperature, -1)
    return torch.stack([log_p[t - 1, tokens[t]] for t in targets.nonzero().flatten()])


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_a_whole_forward_pass_of_each_sequence_alone(lm, temperature: float):
    batch = token_batch(LENGTHS)
    logprobs, entropy = TargetLogprobs(lm)(batch.tokens, batch.lengths, batch.loss_mask, temperature, with_entropy=True)
    expected = [naive(lm, batch.tokens[i, :n], batch.loss_mask[i, :n], temperature) for i, n in enumerate(LENGTHS)]
    assert torch.allclose(logprobs.double(), torch.cat(expected), atol=2e-5)
    assert len(entropy) == batch.num_targets


@torch.no_grad()
def test_batch_and_row_alone_agree_in_fp32(tiny_lm: Path):
    forward = TargetLogprobs(AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32).eval())
    batch = token_batch(LENGTHS, seed=3)
    together = forward(batch.tokens, batch.lengths, batch.loss_mask, 1.0, True)
    alone = [forward(r.tokens, r.lengths, r.loss_mask, 1.0, True) for r in (batch.rows([i]) for i in range(len(batch)))]
    for k in range(2):
        assert torch.allclose(together[k], torch.cat([pair[k] for pair in alone]), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 1, 77])  # pad, EOS (models whose pad is their EOS), an ordinary token
def test_the_token_in_padding_does_not_matter(lm, rm, padding: int):
    batch = token_batch(LENGTHS)
    kept = length_mask(batch.lengths, batch.tokens.shape[1])
    padded = torch.where(kept, batch.tokens, padding)
    for tokens in (padded, torch.nn.functional.pad(padded, (0, 4), value=padding)):
        mask = torch.nn.functional.pad(batch.loss_mask, (0, tokens.shape[1] - padded.shape[1]))
        a = TargetLogprobs(lm)(batch.tokens, batch.lengths, batch.loss_mask)[0]
        b = TargetLogprobs(lm)(tokens, batch.lengths, mask)[0]
        assert torch.allclose(a, b, atol=1e-5)
        scores = [last_token_scores(ScalarHead(rm)(t, batch.lengths), batch.lengths) for t in (batch.tokens, tokens)]
        assert torch.allclose(*scores, atol=1e-5)


@torch.no_grad()
def test_a_model_that_cannot_slice_its_logits_gives_the_same(lm):
    class WithoutSlicing(nn.Module):
        def forward(self, input_ids, attention_mask, use_cache):
            return SimpleNamespace(logits=lm(input_ids, attention_mask=attention_mask).logits)

    batch = token_batch(LENGTHS)
    inputs = (batch.tokens, batch.lengths, batch.loss_mask)
    assert torch.allclose(TargetLogprobs(WithoutSlicing())(*inputs)[0], TargetLogprobs(lm)(*inputs)[0], atol=1e-5)


@torch.no_grad()
def test_a_target_depends_on_the_tokens_before_it_only(lm):
    tokens = random_rows([10], seed=5)[0][None]
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, 6] = True
    base = TargetLogprobs(lm)(tokens, torch.tensor([10]), mask)[0]
    for position in range(10):
        changed = tokens.clone()
        changed[0, position] = 251
        moved = not torch.allclose(TargetLogprobs(lm)(changed, torch.tensor([10]), mask)[0], base, atol=1e-6)
        assert moved == (position <= 6)


def test_only_logits_that_are_needed_are_computed(lm):
    seen = []
    hook = lm.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    tokens = pad_rows(random_rows([20, 17], seed=6))
    mask = response_target_mask(torch.tensor([15, 14]), torch.tensor([5, 3]), 20)
    TargetLogprobs(lm)(tokens, torch.tensor([20, 17]), mask)
    hook.remove()
    assert seen == [6]  # the first target is at 14, the last at 19: logits 13..18


def test_response_target_mask():
    mask = response_target_mask(torch.tensor([2, 1]), torch.tensor([2, 1]), 5)
    assert mask.int().tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]]


def test_scatter_responses_puts_rows_back_and_carries_gradients():
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    flat = torch.arange(1.0, 7.0).requires_grad_()
    out = scatter_responses(flat, mask)
    assert out.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    (out * torch.arange(9.0).reshape(3, 3)).sum().backward()
    assert flat.grad.tolist() == [0, 1, 3, 6, 7, 8]


def test_state_values_are_of_the_state_before_each_token():
    scalars = torch.arange(10.0).reshape(2, 5)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    # Prompts of 2 and 4: the states before the first response tokens end at positions 1 and 3.
    assert state_values(scalars, torch.tensor([2, 4]), mask).tolist() == [[1, 2, 3], [8, 0, 0]]


@torch.no_grad()
def test_a_state_value_has_not_seen_the_token_it_judges(rm):
    tokens, prompt = random_rows([9], seed=7)[0][None], torch.tensor([4])
    mask = torch.ones(1, 5, dtype=torch.bool)
    base = state_values(ScalarHead(rm)(tokens, torch.tensor([9])), prompt, mask)
    for t in range(5):
        changed = tokens.clone()
        changed[0, 4 + t] = 251
        values = state_values(ScalarHead(rm)(changed, torch.tensor([9])), prompt, mask)
        moved = (values - base).abs()[0] > 1e-9
        assert not moved[: t + 1].any()
        assert moved[t + 1 :].all()


@torch.no_grad()
def test_scores_are_those_of_transformers(tiny_rm: Path, rm):
    rows = random_rows(LENGTHS, seed=8)
    lengths = torch.tensor(LENGTHS)
    scores = last_token_scores(ScalarHead(rm)(pad_rows(rows), lengths), lengths)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_rm).eval()
    for row, score in zip(rows, scores, strict=True):
        assert plain(row[None]).logits.item() == pytest.approx(score.item(), abs=1e-4)


@torch.no_grad()
def test_a_sequence_that_ends_in_pad_or_eos_is_scored_there(rm):
    # transformers' own pooling looks for the last token that is not pad, and misses an EOS that is also the pad token.
    row = torch.cat([random_rows([5], seed=9)[0], torch.tensor([rm.config.pad_token_id])])
    scalars = ScalarHead(rm)(row[None], torch.tensor([6]))
    assert last_token_scores(scalars, torch.tensor([6])) == scalars[0, 5]
