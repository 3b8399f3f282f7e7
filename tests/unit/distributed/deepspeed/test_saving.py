"""Models written in Hugging Face format, whole or gathered from shards, load as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.tiny import hosted, random_rows, save_tiny_lm, trained, worker_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from rlhf_dist.core.errors import ModelError
from rlhf_dist.distributed.deepspeed import zero
from rlhf_dist.distributed.deepspeed.saving import save_pretrained
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.reward.worker import PreferenceModelWorker

LM, RM = LanguageModelWorker, PreferenceModelWorker


def whole(model) -> dict[str, torch.Tensor]:
    return {name: t.clone() for bucket in zero.whole_parameters(model, 1) for name, t in bucket.items()}


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_language_model_loads_and_is_equal(tmp_path: Path, stage: int, tied: bool):
    source = save_tiny_lm(tmp_path / "source", tie_word_embeddings=tied)
    with hosted(LM, config=trained(source, zero_stage=stage), num_steps=1) as group:
        expected = whole(worker_of(group).model)
        group.call("save", tmp_path).result()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    actual = dict(model.named_parameters())
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id == model.config.eos_token_id


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("worker", [LM, RM])
def test_a_bf16_model_is_saved_as_bf16_whatever_the_stage(tiny_lm: Path, tmp_path: Path, stage: int, worker: str):
    config = trained(tiny_lm, zero_stage=stage, precision="bf16")
    with hosted(worker, config=config, num_steps=1) as group:
        group.call("save", tmp_path).result()
    assert json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.parametrize("stage", [2, 3])
def test_a_new_scalar_head_is_saved_and_gives_the_same_scores(tiny_lm: Path, tmp_path: Path, stage: int):
    with hosted(RM, seed=4, config=trained(tiny_lm, zero_stage=stage), num_steps=1) as group:
        expected = whole(worker_of(group).model)
        group.call("save", tmp_path).result()
        row = random_rows([9], seed=2)[0][None]
        score = worker_of(group).engine.infer(row, torch.tensor([9]))[0, 8]
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(model.score.weight, expected["score.weight"])
    assert model.config.num_labels == 1
    assert model(row).logits.item() == pytest.approx(score.item(), abs=1e-5)


def test_the_new_head_depends_on_the_seed_and_not_on_the_stage(tiny_lm: Path):
    heads = []
    for seed, stage in ((4, 0), (4, 3), (5, 0)):
        with hosted(RM, seed=seed, config=trained(tiny_lm, zero_stage=stage), num_steps=1) as group:
            heads.append(whole(worker_of(group).model)["score.weight"])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std() == pytest.approx(65**-0.5, rel=0.3)


def test_many_shards_have_an_index_that_names_every_weight(tiny_lm: Path, tmp_path: Path):
    with hosted(LM, config=trained(tiny_lm, zero_stage=3), num_steps=1) as group:
        model = worker_of(group).model
        expected = whole(model)
        save_pretrained(model, tmp_path, is_main=True, shard_bytes=40_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) >= 3
    assert files == sorted(set(index["weight_map"].values()))
    assert all(name.endswith(f"-of-{len(files):05d}.safetensors") for name in files)
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in expected.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_what_could_not_be_saved_is_told_before_the_first_step(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(self: GenerationConfig, *_: Any, **__: Any) -> None:
        raise ValueError("GenerationConfig is invalid: made up for 7")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", fails)
    with pytest.raises(ModelError, match="made up for 7"), hosted(LM, config=trained(tiny_lm), num_steps=1):
        pass


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
def test_a_source_whose_generation_config_transformers_would_not_save(
    tiny_lm: Path, tmp_path: Path, stage: int, lora: Any
):
    path = shutil.copytree(tiny_lm, tmp_path / "published")
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}), encoding="utf-8")
    with hosted(LM, config=trained(path, zero_stage=stage, lora=lora), num_steps=1) as group:
        group.call("save", tmp_path).result()
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (saved.temperature, saved.top_p, saved.do_sample) == (0.6, 0.9, True)
