"""Packed workers under ZeRO: the same numbers as padded ones, and a rejection while they are hosted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import hosted, rollout_batch, tiny_tokenizer, token_batch, trained, worker_of
from transformers import BloomConfig, BloomForCausalLM, BloomForSequenceClassification

from rlhf_dist.config.hosting import FrozenModel
from rlhf_dist.core.errors import ModelError
from rlhf_dist.distributed.deepspeed import zero
from rlhf_dist.distributed.partition import MicroBatching
from rlhf_dist.distributed.role_groups import ReferenceRole, RewardRole
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.distributed.workers.reference import ReferenceWorker
from rlhf_dist.distributed.workers.reward import RewardWorker
from rlhf_dist.ppo.roles import ValueRole
from rlhf_dist.ppo.value_worker import ValueWorker
from rlhf_dist.sft.roles import LanguageModelRole

LM, REFERENCE, REWARD = LanguageModelWorker, ReferenceWorker, RewardWorker
BATCHES = [token_batch([9, 4, 13, 6, 7], seed=step) for step in range(3)]
ROLLOUT = rollout_batch([3, 6, 2, 4], [4, 2, 7, 1])
BUDGET = MicroBatching(size=1, tokens=16, packed=True)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_packed_training_under_a_token_budget_ends_where_padded_training_ends(tiny_lm: Path, stage: int):
    results = []
    for packed, limit in ((True, BUDGET), (False, MicroBatching(2))):
        config = trained(tiny_lm, zero_stage=stage, packed=packed, gradient_checkpointing=packed)
        with hosted(LM, config=config, num_steps=3) as group:
            role = LanguageModelRole(group, limit)
            reports = [role.update(batch, step).result().metrics for step, batch in enumerate(BATCHES)]
            model = worker_of(group).model
            weights = {name: t.clone() for bucket in zero.whole_parameters(model, 1) for name, t in bucket.items()}
        results.append(([r["sft/loss"] for r in reports], [r["train/grad_norm"] for r in reports], weights))
    packed, padded = results
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)
    assert packed[1] == pytest.approx(padded[1], rel=1e-4)
    for name, tensor in padded[2].items():
        difference = (packed[2][name] - tensor).abs()
        assert difference.mean() < 1e-6, name
        assert difference.max() < 3e-4, name  # Adam turns a gradient of 1e-9 into a full step


@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_models_give_the_same_packed(tiny_lm: Path, tiny_rm: Path, stage: int):
    logprobs, scores = [], []
    for packed in (True, False):
        limit = MicroBatching(size=3, packed=packed)
        settings = {"precision": "fp32", "zero_stage": stage, "packed": packed}
        with hosted(REFERENCE, config=FrozenModel(model_path=str(tiny_lm), **settings)) as group:
            logprobs.append(ReferenceRole(group, limit).logprobs(ROLLOUT).result())
        with hosted(REWARD, config=FrozenModel(model_path=str(tiny_rm), **settings)) as group:
            scores.append(RewardRole(group, limit).score(ROLLOUT.sequences).result())
    assert torch.allclose(*logprobs, atol=1e-5)
    assert torch.allclose(*scores, rtol=1e-5, atol=1e-5)


def test_values_are_the_same_packed(tiny_rm: Path):
    values = []
    for packed in (True, False):
        config = trained(tiny_rm, zero_stage=3, packed=packed)
        with hosted(ValueWorker, config=config, num_steps=1, clip_range=0.2) as group:
            values.append(ValueRole(group, BUDGET if packed else 4).values(ROLLOUT).result())
    assert torch.allclose(*values, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose attention (ALiBi) knows nothing of positions that restart: `lm` and `rm`."""
    folder, tokenizer = tmp_path_factory.mktemp("bloom"), tiny_tokenizer()
    shape: dict[str, Any] = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "num_labels": 1}
    config = BloomConfig(vocab_size=len(tokenizer), initializer_range=0.12, **shape)
    for name, model in (("lm", BloomForCausalLM(config)), ("rm", BloomForSequenceClassification(config))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_cannot_be_packed_is_rejected_while_it_is_hosted(bloom: Path, stage: int, precision: str):
    settings = {"zero_stage": stage, "precision": precision, "packed": True}
    hosts = [
        (LM, {"config": trained(bloom / "lm", **settings), "num_steps": 1}),
        (REFERENCE, {"config": FrozenModel(model_path=str(bloom / "lm"), **settings)}),
        (REWARD, {"config": FrozenModel(model_path=str(bloom / "rm"), **settings)}),
    ]
    for worker, kwargs in hosts:
        with pytest.raises(ModelError, match="does not keep packed sequences apart"), hosted(worker, **kwargs):
            pass
