"""The PTX term beside the PPO loss in a real step of the policy, against plain torch and against DeepSpeed-Chat's rule.

DeepSpeed-Chat's numbers are derived from its rule, not recorded. With an unsupervised data set it doubles
`gradient_accumulation_steps_actor`, since each iteration runs backward twice (PPO, then PTX). DeepSpeed divides every backward
pass by that number, although each of the two losses has only half as many: both end at half weight, and switching PTX on
halves the PPO loss whatever γ is. Here each loss has its own count.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import experience_batch, hosted, random_rows, rollout_batch, trained, worker_of
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rlhf_dist.core.batches import Experience, TokenBatch
from rlhf_dist.core.steps import StepReport, StepShare
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.policy_worker import PolicyWorker
from rlhf_dist.ppo.roles import PolicyRole

TEMPERATURE = 0.8
PTX_COEF = 27.8
"""InstructGPT's γ."""
# As many tokens in every micro-batch: DeepSpeed-Chat's mean of micro-batches' means is then the mean over tokens, too.
PROMPTS, RESPONSES = [3, 6, 2], [4, 4, 4]
EXPERIENCE = experience_batch(PROMPTS, RESPONSES, seed=1)
PTX = TokenBatch(
    torch.stack(random_rows([6, 6, 6], seed=2)), torch.tensor([6, 6, 6]), torch.tensor([[False] + [True] * 5] * 3)
)
MICRO_BATCHES = [[0], [1], [2]]
Gradient = dict[str, Tensor]


def policy(path: Path, stage: int = 0) -> Any:
    config = trained(path, zero_stage=stage)
    settings = PPOSettings(ptx_coef=PTX_COEF)
    return hosted(PolicyWorker, config=config, num_steps=2, temperature=TEMPERATURE, settings=settings)


def step_of(group: Any, with_ptx: bool, measure_terms: bool = False) -> StepReport:
    """The policy's first, on responses of its own."""
    rollout = rollout_batch(PROMPTS, RESPONSES, seed=1)
    fields = {**vars(EXPERIENCE), "old_logprobs": PolicyRole(group, 1).logprobs(rollout).result()}
    share = StepShare(
        micro_batches=MICRO_BATCHES,
        num_tokens=sum(RESPONSES),
        ptx_micro_batches=MICRO_BATCHES if with_ptx else [],
        num_ptx_targets=PTX.num_targets if with_ptx else 0,
    )
    texts = [PTX] if with_ptx else None
    (report,) = worker_of(group).update_ppo(Experience(**fields), [share], texts, 0.0, measure_terms)
    assert not report.aborted
    return report


def gradient_of_step(path: Path, with_ptx: bool) -> Gradient:
    """What the optimizer finds when the step is taken."""
    found: Gradient = {}
    with policy(path) as group:
        worker = worker_of(group)

        def step() -> None:
            found.update({name: p.grad.clone() for name, p in worker.model.named_parameters()})

        worker.engine._engine.step = step
        step_of(group, with_ptx)
    return found


def micro_batch_losses(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Of PPO at a ratio of 1, where its gradient is that of −A log π, and of PTX: each the mean over one sequence's tokens."""
    ppo, ptx = [], []
    for row, (n, m) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        log_p = torch.log_softmax(model(EXPERIENCE.tokens[row : row + 1, : n + m]).logits[0] / TEMPERATURE, -1)
        taken = [log_p[t - 1, EXPERIENCE.tokens[row, t]] for t in range(n, n + m)]
        ppo.append(-(torch.stack(taken) * EXPERIENCE.advantages[row, :m]).mean())
        log_p = torch.log_softmax(model(PTX.tokens[row : row + 1]).logits[0], -1)
        ptx.append(-torch.stack([log_p[t - 1, PTX.tokens[row, t]] for t in range(1, 6)]).mean())
    return ppo, ptx


def plain_gradient(path: Path, ppo_weight: float, ptx_weight: float) -> Gradient:
    """Of both losses' sums over micro-batches, by autograd."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ppo, ptx = micro_batch_losses(model)
    (ppo_weight * torch.stack(ppo).sum() + ptx_weight * torch.stack(ptx).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}  # pyright: ignore[reportReturnType]


def norm(gradient: Gradient) -> float:
    return float(torch.cat([g.flatten() for g in gradient.values()]).norm())


def assert_same(actual: Gradient, expected: Gradient) -> None:
    """To fp32 rounding, measured against the largest entry."""
    assert actual.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert_close(
            actual[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=lambda said, name=name: f"{name}: {said}"
        )


def test_switching_ptx_on_adds_its_gradient_and_changes_nothing_else(tiny_lm: Path):
    num = len(MICRO_BATCHES)
    assert_same(gradient_of_step(tiny_lm, with_ptx=False), plain_gradient(tiny_lm, 1 / num, 0))
    assert_same(gradient_of_step(tiny_lm, with_ptx=True), plain_gradient(tiny_lm, 1 / num, PTX_COEF / num))


def test_deepspeed_chat_would_halve_both_losses(tiny_lm: Path):
    num = len(MICRO_BATCHES)
    accumulation = 2 * num
    theirs_without = plain_gradient(tiny_lm, 1 / num, 0)
    theirs_with = plain_gradient(tiny_lm, 1 / accumulation, PTX_COEF / accumulation)
    ours_without, ours_with = (gradient_of_step(tiny_lm, with_ptx) for with_ptx in (False, True))
    assert_same({name: 2 * g for name, g in theirs_with.items()}, ours_with)
    assert_same(theirs_without, ours_without)
    # γ → 0 gives the gradient without PTX back here, and half of it there.
    ptx = plain_gradient(tiny_lm, 0, PTX_COEF / num)
    assert norm({name: g - ptx[name] for name, g in ours_with.items()}) == pytest.approx(norm(ours_without), rel=1e-3)
    left = norm({name: g - ptx[name] / 2 for name, g in theirs_with.items()})
    assert left == pytest.approx(norm(ours_without) / 2, rel=1e-3)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_norm_of_the_ppo_gradient_does_not_know_of_ptx(tiny_lm: Path, stage: int):
    with policy(tiny_lm, stage) as group:
        without = step_of(group, with_ptx=False)
    with policy(tiny_lm, stage) as group:
        report = step_of(group, with_ptx=True, measure_terms=True)
    assert report.term_grad_norms["ppo"] == pytest.approx(without.grad_norm, rel=1e-6)
    ptx = norm(plain_gradient(tiny_lm, 0, 1 / len(MICRO_BATCHES)))
    assert report.term_grad_norms["ptx"] == pytest.approx(PTX_COEF * ptx, rel=1e-4)
    assert report.grad_norm != pytest.approx(without.grad_norm, rel=0.1)
