"""A model built under ZeRO-3 is the model that a plain load gives, buffers included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import generator, hosted, save_tiny_lm, trained, worker_of
from transformers import AutoModelForCausalLM

from rlhf_dist.core.batches import length_mask
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker

LM = LanguageModelWorker


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rope_frequencies_survive_zero_init(tmp_path: Path, precision: str) -> None:
    """`zero.Init` used to leave them in bf16, off by more than a radian at position 1,000."""
    path = save_tiny_lm(tmp_path / "lm", max_position_embeddings=1024)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    tokens = torch.randint(4, 290, (1, 1000), generator=generator(0))
    lengths, mask = torch.tensor([1000]), length_mask(torch.tensor([1000]), 1000).clone()
    mask[:, 0] = False
    with torch.no_grad():
        log_p = torch.log_softmax(plain(tokens).logits[0, :-1].float(), -1)
    expected = log_p.gather(1, tokens[0, 1:, None]).squeeze(1)
    with hosted(LM, config=trained(path, zero_stage=3, precision=precision), num_steps=1) as group:
        worker = worker_of(group)
        found, _ = worker.engine.infer(tokens, lengths, mask)
        buffers = dict(worker.model.named_buffers())
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffers[name], buffer), name
        assert buffers[name].dtype == buffer.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5 if precision == "fp32" else 2e-2, rtol=0)
