"""Trained models are loaded as they compute: a second, wider copy of them would never be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import tiny_tokenizer, trained

from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.workers.trained import build_causal_lm, build_scalar_model


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_parameters_are_loaded_in_the_compute_precision(tiny_lm: Path, precision: str, dtype: torch.dtype):
    config = trained(tiny_lm, zero_stage=2, precision=precision)
    context = RankContext()
    for module in (build(config, context, tiny_tokenizer()) for build in (build_causal_lm, build_scalar_model)):
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert {b.dtype for b in module.buffers()} == {torch.float32}, "RoPE frequencies stay exact"
