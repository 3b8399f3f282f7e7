"""Adapters and frozen layers in real engines: what moves, what is saved, what peft and transformers read, what resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.bench import read_weights
from support.tiny import (
    experience_batch,
    hosted,
    prompt_batch,
    random_rows,
    save_tiny_lm,
    token_batch,
    trained,
    whole_weights,
    worker_of,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.core.batches import PreferenceBatch
from rlhf_dist.distributed.deepspeed import zero
from rlhf_dist.distributed.rollout_engines import GroupWeightSync, RolloutRole
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.distributed.workers.rollout import RolloutWorker
from rlhf_dist.models.loading import load_causal_lm
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.policy_worker import PolicyWorker
from rlhf_dist.ppo.roles import PolicyRole
from rlhf_dist.reward.roles import PreferenceModelRole
from rlhf_dist.reward.worker import PreferenceModelWorker
from rlhf_dist.rollout.config import RolloutConfig
from rlhf_dist.sft.roles import LanguageModelRole

LM, RM = LanguageModelWorker, PreferenceModelWorker
POLICY, ROLLOUT = PolicyWorker, RolloutWorker
BATCHES = [token_batch([5, 7, 6, 4], seed=step) for step in range(3)]
PAIRS = PreferenceBatch.of([random_rows([5, 9], 0), random_rows([3, 4], 1), random_rows([6, 7], 2)])
LORA = {"lora": {"rank": 3, "alpha": 12.0}}
LAYERS = {"freeze": {"num_layers": 1, "embeddings": True}}
PARTS = {"lora": LORA, "layers": LAYERS, "head": {"freeze": {"all_but_head": True}}}
FAST = {"learning_rate": 2e-2, "weight_decay": 0.3, "schedule": "constant", "warmup_fraction": 0.0}
"""Steps that show, and a decay that would show in what has no gradient."""


def taught(path: Path, part: dict[str, Any], group: Any, num_steps: int = 3) -> LanguageModelRole:
    role = LanguageModelRole(group, 2)
    for step in range(num_steps):
        role.update(BATCHES[step], step).result()
    return role


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_resumes_bit_for_bit_and_what_is_frozen_comes_from_the_checkpoint(
    tiny_lm: Path, tmp_path: Path, part: str, stage: int, precision: str
):
    settings = {"zero_stage": stage, "precision": precision, "optimizer": FAST} | PARTS[part]
    other = save_tiny_lm(tmp_path / "other", seed=9)
    with hosted(LM, config=trained(tiny_lm, **settings), num_steps=3) as group:
        start = whole_weights(group)
        role = taught(tiny_lm, PARTS[part], group, 2)
        role.save_checkpoint(tmp_path / "step").result()
        last = role.update(BATCHES[2], 2).result()
        expected = whole_weights(group)
    moved = {name for name, tensor in expected.items() if not torch.equal(tensor, start[name])}
    frozen = expected.keys() - moved
    assert moved
    head_only, lora = part == "head", part == "lora"
    assert moved == {
        name
        for name in start
        if (name == "lm_head.weight" if head_only else "_proj." in name if lora else True)
        and (part != "layers" or not name.startswith(("model.embed_tokens", "model.layers.0.")))
    }
    # From another model's weights: all that counts must come out of the checkpoint, frozen parameters included.
    with hosted(LM, config=trained(other, **settings), num_steps=3) as group:
        assert not torch.equal(whole_weights(group)["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
        role = LanguageModelRole(group, 2)
        role.load_checkpoint(tmp_path / "step").result()
        again = role.update(BATCHES[2], 2).result()
        actual = whole_weights(group)
    assert again == last
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert all(torch.equal(actual[name], start[name]) for name in frozen)


@pytest.mark.parametrize(("stage", "precision", "tolerance"), [(0, "fp32", 1e-4), (2, "bf16", 0.05), (3, "fp32", 1e-4)])
def test_a_reward_models_adapter_merged_and_in_peft_gives_the_same_scores(
    tiny_lm: Path, tmp_path: Path, stage: int, precision: str, tolerance: float
):
    """From a language model, so that its head is new, and is in both."""
    config = trained(tiny_lm, zero_stage=stage, precision=precision, optimizer=FAST, **LORA)
    with hosted(RM, config=config, num_steps=4) as group:
        role = PreferenceModelRole(group, 2)
        before = role.score_pairs(PAIRS).result()
        for step in range(4):
            role.update(PAIRS, step).result()
        scores = role.score_pairs(PAIRS).result()
        role.save(tmp_path).result()
    assert (scores - before).abs().max() > 10 * tolerance
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype="auto")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_lm, num_labels=1, dtype=plain.dtype)
    base.config.pad_token_id = plain.config.pad_token_id
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    tensors = read_weights(tmp_path / "model")
    assert not any("lora" in name or "base_layer" in name for name in tensors)
    assert tensors.keys() == dict(plain.named_parameters()).keys()
    assert plain.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    with torch.no_grad():
        for i in range(len(PAIRS)):
            for j in range(2):
                tokens = PAIRS.tokens[i, j, : PAIRS.lengths[i, j]][None]
                for model in (plain, adapted.eval()):
                    assert model(tokens).logits.item() == pytest.approx(scores[i, j].item(), abs=tolerance)
    config_file = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config_file["base_model_name_or_path"] == str(tiny_lm)
    assert (config_file["task_type"], config_file["modules_to_save"]) == ("SEQ_CLS", ["score"])


@pytest.mark.parametrize("stage", [1, 3])
def test_a_language_models_adapter_is_peft_s(tiny_lm: Path, tmp_path: Path, stage: int):
    config = trained(tiny_lm, zero_stage=stage, optimizer=FAST, **LORA)
    with hosted(LM, config=config, num_steps=3) as group:
        role = taught(tiny_lm, LORA, group)
        role.save(tmp_path).result()
        weights = whole_weights(group)
    saved = read_weights(tmp_path / "model")
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items())
    base = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert torch.allclose(parameter, saved[name], atol=1e-6), name
    assert load_causal_lm(str(tmp_path / "model"), torch.float32).config.architectures == ["LlamaForCausalLM"]


def test_gpt2_whose_matrices_are_transposed(tmp_path: Path):
    from support.tiny import tiny_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, initializer_range=0.2
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    settings = trained(tmp_path / "gpt2", zero_stage=2, optimizer=FAST, **LORA)
    with hosted(LM, config=settings, num_steps=3) as group:
        role = taught(tmp_path / "gpt2", LORA, group)
        sums = role.evaluate(BATCHES[0]).result()
        role.save(tmp_path).result()
    with hosted(LM, config=trained(tmp_path / "model"), num_steps=1) as group:
        merged = LanguageModelRole(group, 2).evaluate(BATCHES[0]).result()
    assert merged["nll"] == pytest.approx(sums["nll"], rel=1e-5)
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    whole = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    saved = read_weights(tmp_path / "model")
    assert all(torch.allclose(p, saved[name], atol=1e-6) for name, p in whole.named_parameters())


def test_an_adapter_starts_as_nothing_and_frozen_parameters_are_not_the_optimizers(tiny_lm: Path):
    with hosted(LM, config=trained(tiny_lm), num_steps=1) as group:
        plain = LanguageModelRole(group, 2).evaluate(BATCHES[0]).result()
    for part in PARTS.values():
        with hosted(LM, config=trained(tiny_lm, **part), num_steps=1) as group:
            assert LanguageModelRole(group, 2).evaluate(BATCHES[0]).result() == plain
            worker = worker_of(group)
            owned = {id(p) for g in worker.engine._engine.optimizer.param_groups for p in g["params"]}
            assert owned == {id(p) for p in worker.model.parameters() if p.requires_grad}


def test_a_model_without_adapters_has_none_to_save(tiny_lm: Path, tmp_path: Path):
    with hosted(LM, config=trained(tiny_lm), num_steps=1) as group:
        LanguageModelRole(group, 2).save(tmp_path).result()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_of_adapters_is_on_in_training_only_and_drawn_by_the_step(tiny_lm: Path, checkpointing: bool):
    config = trained(
        tiny_lm, gradient_checkpointing=checkpointing, optimizer=FAST, lora={"rank": 3, "alpha": 12.0, "dropout": 0.5}
    )
    results = []
    for _ in range(2):
        with hosted(LM, config=config, num_steps=3) as group:
            role = taught(tiny_lm, {}, group)
            assert role.evaluate(BATCHES[0]).result() == role.evaluate(BATCHES[0]).result()
            results.append(whole_weights(group))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    with hosted(LM, config=trained(tiny_lm, optimizer=FAST, **LORA), num_steps=3) as group:
        taught(tiny_lm, {}, group)
        without = whole_weights(group)
    assert any(not torch.equal(results[0][name], without[name]) for name in without)


@pytest.mark.parametrize("part", [LORA, LAYERS])
@pytest.mark.parametrize("stage", [2, 3])
def test_rollouts_come_from_the_policy_with_its_adapters_merged(tiny_lm: Path, part: dict[str, Any], stage: int):
    prompts = prompt_batch([4, 2, 6, 3])
    experience = experience_batch([3, 6, 2, 4, 5], [4, 2, 7, 1, 3], seed=1)
    config = trained(tiny_lm, zero_stage=stage, optimizer=FAST, **part)
    settings = PPOSettings(self_checks=False, ema_decay=None if "lora" in part else 0.9)
    rollout = RolloutConfig(max_response_tokens=6)
    with (
        hosted(POLICY, config=config, num_steps=8, temperature=1.0, settings=settings) as policy,
        hosted(ROLLOUT, config=rollout, model_path=str(tiny_lm), precision="fp32") as engine,
    ):
        role, rollouts = PolicyRole(policy, 2), RolloutRole(engine, 3)
        sync = GroupWeightSync(policy, rollouts.engines)
        stale = rollouts.generate(prompts, stream="rollout", iteration=0).result()
        role.update(experience, [torch.tensor([4, 0, 2]), torch.tensor([1, 3])] * 2, None).result()
        assert not torch.allclose(role.logprobs(stale).result(), stale.rollout_logprobs, atol=1e-2)
        sync.push(1).result()
        fresh = rollouts.generate(prompts, stream="rollout", iteration=0).result()
        assert torch.allclose(role.logprobs(fresh).result(), fresh.rollout_logprobs, atol=1e-4)
        if part is LAYERS:
            model, average = worker_of(policy).model, worker_of(policy).engine.average
            averaged = {name: t.clone() for bucket in average.whole_parameters(1) for name, t in bucket.items()}
            current = {name: t.clone() for bucket in zero.whole_parameters(model, 1) for name, t in bucket.items()}
            same = {name for name, tensor in current.items() if torch.equal(averaged[name], tensor)}
            assert same == {n for n in current if n.startswith(("model.embed_tokens", "model.layers.0."))}
