"""Loading: what a directory may hold, and the rejections."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import save_tiny_lm, save_tiny_rm
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from rlhf_dist.core.errors import ModelError
from rlhf_dist.models.loading import (
    check_weights,
    context_length,
    load_causal_lm,
    load_model_config,
    load_scalar_model,
    without_dropout,
)
from rlhf_dist.run.checks import check_model


def test_a_reward_model_keeps_its_head_and_a_language_model_gets_a_new_one(tiny_lm: Path, tiny_rm: Path):
    reward, head_is_new = load_scalar_model(str(tiny_rm), torch.float32, pad_token_id=5)
    assert not head_is_new
    assert reward.config.pad_token_id == 5
    model, head_is_new = load_scalar_model(str(tiny_lm), torch.float32, pad_token_id=None)
    assert head_is_new
    assert model.score.out_features == 1


@pytest.mark.parametrize("architectures", [None, ["LlamaForRewardModel"], ["LlamaForTokenClassification"]])
def test_a_scalar_head_that_is_there_is_kept_whatever_the_config_calls_the_model(
    architectures: list[str] | None, tiny_rm: Path, tmp_path: Path
):
    path = shutil.copytree(tiny_rm, tmp_path / "rm")
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) | {"architectures": architectures}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    check_weights(str(path), scalar=True)
    model, head_is_new = load_scalar_model(str(path), torch.float32, pad_token_id=None)
    assert not head_is_new
    assert torch.equal(model.score.weight, load_file(tiny_rm / "model.safetensors")["score.weight"])


def test_the_dtype_is_the_one_asked_for(tiny_lm: Path):
    assert {p.dtype for p in load_causal_lm(str(tiny_lm), torch.bfloat16).parameters()} == {torch.bfloat16}


def test_context_length(tiny_lm: Path):
    assert context_length(load_model_config(str(tiny_lm))) == 128


@pytest.mark.parametrize("load", [load_model_config, lambda p: load_causal_lm(p, torch.float32)])
def test_a_folder_without_a_model_is_rejected(load, tmp_path: Path):
    with pytest.raises(ModelError, match=r"Give a directory that holds config\.json"):
        load(str(tmp_path))


def test_a_folder_without_weights_is_rejected(tiny_lm: Path, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((tiny_lm / "config.json").read_bytes())
    with pytest.raises(ModelError, match="safetensors"):
        load_causal_lm(str(tmp_path), torch.float32)


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path: Path):
    path = save_tiny_rm(tmp_path / "three", num_labels=3)
    with pytest.raises(ModelError):
        load_scalar_model(str(path), torch.float32, None)


def test_a_reward_model_is_no_language_model(tiny_rm: Path):
    with pytest.raises(ModelError):
        load_causal_lm(str(tiny_rm), torch.float32)


def test_tied_embeddings_are_not_missing_weights(tmp_path: Path):
    model = load_causal_lm(str(save_tiny_lm(tmp_path / "tied", tie_word_embeddings=True)), torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_without_dropout_gives_the_same_output_in_training_mode(tmp_path: Path):
    path = save_tiny_lm(tmp_path / "dropout", attention_dropout=0.5)
    model = load_causal_lm(str(path), torch.float32).train()
    tokens = torch.arange(2, 12)[None]
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    without_dropout(model)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    assert without_dropout(nn.Sequential(nn.Dropout(0.5)))[0].p == 0


@pytest.mark.parametrize("load", [load_causal_lm, lambda path, dtype: load_scalar_model(path, dtype, None)])
@pytest.mark.parametrize("kind", ["lm", "rm"])
def test_weights_of_other_names_are_no_model(
    kind: str, load: Callable[..., Any], tiny_lm: Path, tiny_rm: Path, tmp_path: Path
):
    """A wrapper's prefix on every name: transformers would leave all weights random and only log it."""
    source = {"lm": tiny_lm, "rm": tiny_rm}[kind]
    path = shutil.copytree(source, tmp_path / "wrapped")
    weights = load_file(path / "model.safetensors")
    save_file(
        {f"module.{name}": tensor for name, tensor in weights.items()}, path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"missing .*unexpected .*'module\.'"):
        load(str(path), torch.float32)
    for scalar in (False, True):  # before anything is started
        with pytest.raises(ModelError, match=r"missing .*unexpected .*'module\.'"):
            check_weights(str(path), scalar=scalar)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_backbone_of_which_a_part_is_missing_or_left_over_is_no_model(change: str, tiny_lm: Path, tmp_path: Path):
    path = shutil.copytree(tiny_lm, tmp_path / "changed")
    weights = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    else:
        name = name.replace("layers.1", "layers.7")
        weights[name] = torch.zeros(2, 2)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    for load in (load_causal_lm, lambda path, dtype: load_scalar_model(path, dtype, None)):
        with pytest.raises(ModelError, match=rf"1 {change} \({re.escape(name)}\)"):
            load(str(path), torch.float32)
    for scalar in (False, True):
        with pytest.raises(ModelError, match=rf"1 {change} \({re.escape(name)}\)"):
            check_weights(str(path), scalar=scalar)


@pytest.mark.parametrize("damage", ["cut off", "a shape", "a shard"])
def test_damaged_weights_are_no_model(damage: str, tiny_lm: Path, tmp_path: Path):
    path = shutil.copytree(tiny_lm, tmp_path / "damaged")
    file = path / "model.safetensors"
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "a shape":
        weights = load_file(file)
        save_file(weights | {"model.norm.weight": torch.zeros(3)}, file, {"format": "pt"})
    else:
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(file), "model-1.safetensors")}
        (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        file.unlink()
    with pytest.raises(ModelError):
        load_causal_lm(str(path), torch.float32)
    for scalar in (False, True):
        with pytest.raises(ModelError, match="damaged"):
            check_weights(str(path), scalar=scalar)


def test_buffers_of_older_checkpoints_are_no_weights(tiny_lm: Path, tmp_path: Path):
    path = shutil.copytree(tiny_lm, tmp_path / "old")
    weights = load_file(path / "model.safetensors")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    save_file(weights | buffers, path / "model.safetensors", {"format": "pt"})
    check_weights(str(path), scalar=False)
    load_causal_lm(str(path), torch.float32)


@pytest.mark.parametrize(
    "setting",
    [
        {"length_penalty": 2.0},
        {"pad_token_id": -1},
        {"early_stopping": True},
        {"output_scores": True},
        {"temperature": 0.0, "top_p": 0.9},
        {"temperature": 0.0, "do_sample": True},
        {"length_penalty": 2.0, "temperature": 0.7, "early_stopping": True},
    ],
    ids=str,
)
def test_published_generation_configs_can_be_saved_and_used(setting: dict[str, Any], tiny_lm: Path, tmp_path: Path):
    path = shutil.copytree(tiny_lm, tmp_path / "published")
    (path / "generation_config.json").write_text(json.dumps(setting | {"eos_token_id": 1}), encoding="utf-8")
    load_causal_lm(str(path), torch.float32).save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert bool(saved.do_sample) == ("temperature" in setting and setting["temperature"] > 0)
    assert saved.eos_token_id == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize(
    ("setting", "samples"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": False}, False),
        ({"temperature": 1.0, "top_p": 1.0}, None),
        ({"top_k": 50}, None),
        ({"temperature": 0.6, "do_sample": True}, True),
        ({"top_p": 0.9}, True),
    ],
    ids=str,
)
def test_a_model_that_decodes_greedily_goes_on_to(
    setting: dict[str, Any], samples: bool | None, tiny_lm: Path, tmp_path: Path
):
    path = shutil.copytree(tiny_lm, tmp_path / "published")
    (path / "generation_config.json").write_text(json.dumps(setting), encoding="utf-8")
    load_causal_lm(str(path), torch.float32).save_pretrained(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").do_sample == samples


@pytest.mark.parametrize(
    "setting",
    [
        {"eos_token_id": ["2"]},
        {"eos_token_id": [2, None]},
        {"eos_token_id": 2.0},
        {"pad_token_id": True},
        {"num_return_sequences": 3},
        {"cache_implementation": "odd"},
        "{",
    ],
    ids=str,
)
def test_a_generation_config_that_is_none_is_found_before_the_start(setting: Any, tiny_lm: Path, tmp_path: Path):
    path = shutil.copytree(tiny_lm, tmp_path / "published")
    text = setting if isinstance(setting, str) else json.dumps(setting)
    (path / "generation_config.json").write_text(text, encoding="utf-8")
    name = "" if isinstance(setting, str) else next(iter(setting))
    with pytest.raises(ModelError, match=rf"generation_config\.json .*{name}"):
        check_model(str(path), 64, "policy", scalar=False)
    check_model(str(tiny_lm), 64, "policy", scalar=False)


def test_good_weights_and_what_is_left_to_the_loader(tiny_lm: Path, tiny_rm: Path, tmp_path: Path):
    for path, scalar in ((tiny_lm, False), (tiny_lm, True), (tiny_rm, True)):
        check_weights(str(path), scalar=scalar)
    with pytest.raises(ModelError, match="scalar head"):
        check_weights(str(tiny_rm), scalar=False)
    config_only = shutil.copytree(tiny_lm, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    check_weights(str(config_only), scalar=False)


def test_sampling_settings_without_do_sample_can_be_saved(tiny_lm: Path, tmp_path: Path):
    """As many published models have them."""
    path = shutil.copytree(tiny_lm, tmp_path / "published")
    settings = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 7]}
    (path / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    load_causal_lm(str(path), torch.float32).save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.temperature, saved.top_p, saved.eos_token_id, saved.do_sample) == (0.6, 0.9, [1, 7], True)
