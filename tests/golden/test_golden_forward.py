"""The project's forward passes against TRL's, with the recorded weights and tokens: shifts, positions, padding, temperature.

TRL pads prompts on the left, the project pads on the right, and neither may matter.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from golden_data import ppo_run
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_dist.core.batches import length_mask, pad_rows
from rlhf_dist.models.forward import (
    ScalarHead,
    TargetLogprobs,
    last_token_scores,
    response_target_mask,
    scatter_responses,
    state_values,
)

assert_near = functools.partial(assert_close, rtol=1e-4, atol=1e-5)
"""fp32 forward passes whose padding is on the other side."""

RUN = ppo_run("k1")


@pytest.fixture(params=[False, True], ids=["padded", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    return request.param


def recorded_model(role: str) -> Any:
    assert RUN.models is not None
    config, weights = RUN.models["config"], RUN.models["weights"][role]
    if role in ("policy", "reference"):
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.lm_head.bias = torch.nn.Parameter(torch.empty(config["vocab_size"]))
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**config | {"num_labels": 1}))
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return model.eval()


def sequences() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens [B, T] padded on the right, prompt lengths [B], lengths [B])."""
    assert RUN.models is not None
    pad = RUN.models["config"]["pad_token_id"]
    prompts = [[token for token in query if token != pad] for query in RUN.models["queries"]]
    responses = [r[:n].tolist() for r, n in zip(RUN.rollout["responses"], RUN.lengths, strict=True)]
    rows = [p + r for p, r in zip(prompts, responses, strict=True)]
    prompt_lengths = torch.tensor([len(p) for p in prompts])
    assert len(set(prompt_lengths.tolist())) > 2
    return pad_rows(rows, pad), prompt_lengths, prompt_lengths + RUN.lengths


@pytest.mark.parametrize(("role", "recorded"), [("policy", "logprobs"), ("reference", "ref_logprobs")])
@torch.no_grad()
def test_logprobs_of_response_tokens(role, recorded, packed):
    tokens, prompt_lengths, lengths = sequences()
    targets = response_target_mask(prompt_lengths, RUN.lengths, tokens.shape[1])
    module = TargetLogprobs(recorded_model(role), packed)
    logprobs, _ = module(tokens, lengths, targets, RUN.config["temperature"])
    mask = RUN.response_mask
    assert_near(scatter_responses(logprobs, mask)[mask], RUN.rollout[recorded][mask])


@torch.no_grad()
def test_scores_are_read_at_the_last_token(packed):
    tokens, _, lengths = sequences()
    scalars = ScalarHead(recorded_model("reward"), packed)(tokens, lengths)
    assert_near(last_token_scores(scalars, lengths), RUN.rollout["scores_raw"])


@torch.no_grad()
def test_values_are_of_the_state_before_each_token(packed):
    """And, where TRL records it, of the state after the last one."""
    tokens, prompt_lengths, lengths = sequences()
    scalars = ScalarHead(recorded_model("value"), packed)(tokens, lengths)
    values = state_values(scalars, prompt_lengths, length_mask(RUN.lengths + 1, RUN.response_mask.shape[1] + 1))
    assert_near(values[:, :-1][RUN.mask_p1], RUN.rollout["values"][RUN.mask_p1])
