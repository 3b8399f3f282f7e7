"""bf16 with fp32 master weights: every ZeRO stage takes the same steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import hosted, token_batch, trained, worker_of

from rlhf_dist.cluster.proxies import LanguageModelRole
from rlhf_dist.engine import zero

LM = "language_model:LanguageModelWorker"
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
