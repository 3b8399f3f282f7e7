"""The moving average of the weights, against one kept by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import hosted, token_batch, trained, whole_weights, worker_of
from transformers import AutoModelForCausalLM

from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.sft.roles import LanguageModelRole

LM = LanguageModelWorker
BATCHES = [token_batch([9, 4, 13], seed=step) for step in range(4)]
DECAY = 0.75


def averaged(group) -> dict[str, torch.Tensor]:
    parts = worker_of(group).engine.average.whole_parameters(1)
    return {name: t.clone() for bucket in parts for name, t in bucket.items()}


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_the_average_is_that_of_the_weights_after_every_step(tiny_lm: Path, tmp_path: Path, stage: int, precision: str):
    with hosted(LM, config=trained(tiny_lm, zero_stage=stage, precision=precision), num_steps=4) as group:
        worker, role = worker_of(group), LanguageModelRole(group, 2)
        worker.engine.keep_average(DECAY)
        expected = {name: t.float() for name, t in whole_weights(group).items()}
        for step, batch in enumerate(BATCHES):
            role.update(batch, step).result()
            for name, t in whole_weights(group).items():
                expected[name] = DECAY * expected[name] + (1 - DECAY) * t.float()
        actual, current = averaged(group), whole_weights(group)
        worker.save_weights(tmp_path / "average", worker.engine.average.whole_parameters(2**20))
        assert all(torch.equal(t, current[name]) for name, t in whole_weights(group).items())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "average")
    assert saved.dtype == next(iter(actual.values())).dtype
    for name, tensor in expected.items():
        # In bf16 the average is rounded once, when it is read.
        assert torch.allclose(actual[name].float(), tensor, rtol=1e-6 if precision == "fp32" else 2**-8, atol=1e-7)
        assert torch.equal(saved.get_parameter(name), actual[name])
    assert any(not torch.equal(actual[name], current[name]) for name in actual)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_average_continues_bit_for_bit(tiny_lm: Path, tmp_path: Path, stage: int):
    results = []
    for resumed in (False, True):
        with hosted(LM, config=trained(tiny_lm, zero_stage=stage), num_steps=4) as group:
            role = LanguageModelRole(group, 2)
            worker_of(group).engine.keep_average(DECAY)
            if resumed:
                role.load_checkpoint(tmp_path / "model").result()
            else:
                for step in range(2):
                    role.update(BATCHES[step], step).result()
                role.save_checkpoint(tmp_path / "model").result()
            for step in (2, 3):
                role.update(BATCHES[step], step).result()
            results.append(averaged(group))
    assert all(torch.equal(results[0][name], t) for name, t in results[1].items())


def test_a_checkpoint_without_an_average_is_rejected(tiny_lm: Path, tmp_path: Path):
    with hosted(LM, config=trained(tiny_lm), num_steps=4) as group:
        role = LanguageModelRole(group, 2)
        role.save_checkpoint(tmp_path / "model").result()
        worker_of(group).engine.keep_average(DECAY)
        with pytest.raises(RunFolderError, match="no average of the weights"):
            role.load_checkpoint(tmp_path / "model").result()
