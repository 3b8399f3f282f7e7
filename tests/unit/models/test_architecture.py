"""Sizes and operations of models, from their configs alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import save_tiny_lm
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rlhf_dist.core.errors import ModelError
from rlhf_dist.models.architecture import architecture

CONFIGS = Path(__file__).resolve().parents[3] / "launch" / "recipes" / "model_configs"


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.2-1b", 1.24), ("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.6)], ids=str
)
def test_the_known_models_have_the_sizes_they_are_known_for(name: str, billions: float):
    model = architecture(str(CONFIGS / name))
    assert model.num_parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_a_scalar_head_takes_the_place_of_the_language_models():
    language, scalar = (architecture(str(CONFIGS / "llama-3.1-8b"), kind) for kind in (False, True))
    # An output matrix of 128,256 rows less, one row of 4,096 more.
    assert language.num_parameters - scalar.num_parameters == 128256 * 4096 - 4096


def test_optimizer_groups_hold_every_parameter_once(tiny_lm: Path):
    model = architecture(str(tiny_lm))
    decay, no_decay = model.groups
    assert sum(decay) + sum(no_decay) == model.num_parameters
    assert sorted(no_decay) == [64] * 5  # two norms a layer, and the last


@pytest.mark.parametrize("tied", [False, True])
def test_operations_are_those_that_torch_counts(tied: bool, tmp_path: Path):
    """torch counts each matrix product as it runs; it takes attention for whole, where a causal one is half."""
    path = str(save_tiny_lm(tmp_path / "lm", tie_word_embeddings=tied))
    model, rows, length = architecture(path), 2, 24
    real = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        real(input_ids=torch.ones(rows, length, dtype=torch.long))
    attention = model.forward_flops(rows, length, 0) - rows * length * model.body_flops_per_token
    assert counter.get_total_flops() == model.forward_flops(rows, length, length) + attention


def test_a_missing_config_is_rejected(tmp_path: Path):
    with pytest.raises(ModelError, match="no model at"):
        architecture(str(tmp_path / "nothing"))
