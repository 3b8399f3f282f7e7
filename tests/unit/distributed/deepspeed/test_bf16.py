"""bf16 with fp32 master weights: every ZeRO stage takes the same steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import hosted, token_batch, trained, worker_of

from rlhf_dist.distributed.deepspeed import zero
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.sft.roles import LanguageModelRole

LM = LanguageModelWorker
BATCHES = [token_batch([9, 4, 13, 6, 7], seed=step) for step in range(3)]


def _train(tiny_lm: Path, stage: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    config = trained(tiny_lm, zero_stage=stage, precision="bf16", optimizer={"weight_decay": 0.5})
    with hosted(LM, config=config, num_steps=3) as group:
        role = LanguageModelRole(group, 5)
        losses = [role.update(batch, step).result().metrics["sft/loss"] for step, batch in enumerate(BATCHES)]
        model = worker_of(group).model
        whole = {name: t.float() for bucket in zero.whole_parameters(model, 1) for name, t in bucket.items()}
    return losses, whole


def test_stages_agree_from_the_first_step(tiny_lm: Path) -> None:
    """Without ZeRO, DeepSpeed used to count a trial step of its own as Adam's first."""
    losses, expected = _train(tiny_lm, 2)
    for stage in (0, 1, 3):
        stage_losses, found = _train(tiny_lm, stage)
        assert stage_losses == pytest.approx(losses, rel=2e-3), stage
        for name in expected:
            # bf16 keeps 8 bits of a parameter; a step of 1e-3 that is a quarter too short would show in the mean.
            assert (found[name] - expected[name]).abs().mean() < 1e-4, (stage, name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_many_micro_batches_add_up_in_fp32(tiny_lm: Path, stage: int) -> None:
    """Hundreds of gradients added in bf16 would lose the small ones."""
    batch = token_batch([5 + i % 9 for i in range(192)], seed=9)
    norms = []
    for micro_batch_size in (192, 1):
        config = trained(tiny_lm, zero_stage=stage, precision="bf16")
        with hosted(LM, config=config, num_steps=1) as group:
            norms.append(
                LanguageModelRole(group, micro_batch_size).update(batch, 0).result().metrics["train/grad_norm"]
            )
    assert norms[1] == pytest.approx(norms[0], rel=2e-3)
