"""Vocabularies whose tokenizer and embeddings differ: rows without a token are never drawn, tokens without a row get one."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from support.tiny import (
    hosted,
    prompt_batch,
    save_tiny_lm,
    save_tiny_rm,
    tiny_tokenizer,
    token_batch,
    trained,
    whole_weights,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from rlhf_dist.config.hosting import FrozenModel
from rlhf_dist.core.errors import ModelError
from rlhf_dist.distributed.role_groups import ReferenceRole
from rlhf_dist.distributed.rollout_engines import RolloutRole
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.distributed.workers.reference import ReferenceWorker
from rlhf_dist.distributed.workers.rollout import RolloutWorker
from rlhf_dist.models.loading import load_model_config
from rlhf_dist.models.vocabulary import check_embeddings, num_token_ids
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.policy_worker import PolicyWorker
from rlhf_dist.ppo.roles import PolicyRole
from rlhf_dist.reward.worker import PreferenceModelWorker
from rlhf_dist.rollout.config import RolloutConfig
from rlhf_dist.sft.roles import LanguageModelRole

NUM_TOKENS = num_token_ids(tiny_tokenizer())
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with half as many rows again as its tokenizer has tokens."""
    return save_tiny_lm(tmp_path_factory.mktemp("padded") / "lm", vocab_size=NUM_TOKENS * 3 // 2)


def test_rows_without_a_token_are_masked_in_sampling_logprobs_and_entropies(padded: Path):
    """A plain loop over the rows that have a token is the independent truth."""
    rollouts = hosted(
        RolloutWorker,
        config=RolloutConfig(max_response_tokens=12, temperature=TEMPERATURE),
        model_path=str(padded),
        precision="fp32",
    )
    with rollouts as group:
        rollout = RolloutRole(group, 4).generate(prompt_batch([5, 3, 7, 4] * 8), stream="train", iteration=0).result()
    assert int(rollout.tokens.max()) < NUM_TOKENS
    model = AutoModelForCausalLM.from_pretrained(padded, dtype=torch.float32)
    expected = torch.zeros_like(rollout.rollout_logprobs)
    for i, (n, m) in enumerate(zip(rollout.prompt_lengths.tolist(), rollout.response_lengths.tolist(), strict=True)):
        with torch.no_grad():
            logits = model(rollout.tokens[i : i + 1, : n + m]).logits[0, n - 1 : n + m - 1, :NUM_TOKENS]
        log_p = torch.log_softmax(logits / TEMPERATURE, -1)
        expected[i, :m] = log_p.gather(1, rollout.tokens[i, n : n + m, None]).squeeze(1)
    settings = PPOSettings(self_checks=False)
    policy = hosted(PolicyWorker, config=trained(padded), num_steps=1, temperature=TEMPERATURE, settings=settings)
    frozen = FrozenModel(model_path=str(padded), precision="fp32")
    reference = hosted(ReferenceWorker, config=frozen, temperature=TEMPERATURE, num_tokens=NUM_TOKENS)
    torch.testing.assert_close(rollout.rollout_logprobs, expected)
    with policy as group:
        torch.testing.assert_close(PolicyRole(group, 4).logprobs(rollout).result(), expected)
    with reference as group:
        torch.testing.assert_close(ReferenceRole(group, 4).logprobs(rollout).result(), expected)


def test_tokens_without_a_row_are_told_before_a_run(tmp_path: Path):
    path = save_tiny_lm(tmp_path / "small", vocab_size=NUM_TOKENS - 7)
    with pytest.raises(ModelError, match=rf"{NUM_TOKENS - 7} tokens.*{NUM_TOKENS - 1}; remedy"):
        check_embeddings(load_model_config(str(path)), tiny_tokenizer(), "trained", "remedy")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_missing_rows_are_the_mean_of_the_others_and_are_trained(stage: int, tied: bool, tmp_path: Path):
    path = save_tiny_lm(tmp_path / "small", vocab_size=NUM_TOKENS - 7, tie_word_embeddings=tied)
    before = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    batch = token_batch([9, 6])
    batch.tokens[0, 4] = NUM_TOKENS - 2
    with hosted(
        LanguageModelWorker, config=trained(path, zero_stage=stage, resize_embeddings=True), num_steps=2
    ) as group:
        grown = whole_weights(group)
        role = LanguageModelRole(group, 2)
        role.update(batch, 0).result()
        role.save(tmp_path)
        trained_weights = whole_weights(group)
    for name, module in (("model.embed_tokens.weight", before.model.embed_tokens), ("lm_head.weight", before.lm_head)):
        if tied and name.startswith("lm_head"):
            continue
        old = module.weight.detach()
        assert torch.equal(grown[name][: len(old)], old)
        torch.testing.assert_close(grown[name][len(old) :], old.mean(0).expand(7, -1))
        assert not torch.equal(trained_weights[name][NUM_TOKENS - 2], grown[name][NUM_TOKENS - 2])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert saved.config.vocab_size == saved.model.embed_tokens.num_embeddings == NUM_TOKENS
    assert torch.equal(saved.model.embed_tokens.weight, trained_weights["model.embed_tokens.weight"])
    assert (saved.lm_head.weight is saved.model.embed_tokens.weight) == tied


def test_new_rows_have_to_be_trained(tmp_path: Path):
    """They are all equal: a frozen one could not be told from another."""
    with pytest.raises(ValueError, match="resize_embeddings is true and freeze"):
        trained(tmp_path, resize_embeddings=True, freeze={"embeddings": True})


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_under_adapters_embeddings_and_head_are_trained_whole(stage: int, tied: bool, tmp_path: Path):
    path = save_tiny_lm(tmp_path / "small", vocab_size=NUM_TOKENS - 7, tie_word_embeddings=tied)
    batch = token_batch([9, 6])
    batch.tokens[0, 4] = NUM_TOKENS - 2
    config = trained(path, zero_stage=stage, resize_embeddings=True, lora={"rank": 4})
    with hosted(LanguageModelWorker, config=config, num_steps=2) as group:
        role = LanguageModelRole(group, 2)
        for step in range(2):  # B is 0 before the first
            role.update(batch, step).result()
        role.save(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    old, rows = before.model.embed_tokens.weight.detach(), saved.model.embed_tokens.weight.detach()
    assert len(rows) == NUM_TOKENS
    assert not torch.equal(rows[NUM_TOKENS - 2], rows[NUM_TOKENS - 3])
    assert not torch.equal(rows[: len(old)], old)
    assert not torch.equal(
        saved.model.layers[0].self_attn.q_proj.weight, before.model.layers[0].self_attn.q_proj.weight
    )
    # What is beside it gives the same model to plain peft, on a base whose embeddings were resized.
    before.resize_token_embeddings(NUM_TOKENS, mean_resizing=False)
    adapted = peft.PeftModel.from_pretrained(before, tmp_path / "adapter").eval()
    ids = torch.arange(3, NUM_TOKENS, 11)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, saved(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eos_is_new", [False, True])
def test_new_stop_tokens_are_saved(eos_is_new: bool, tmp_path: Path):
    """ChatML on a base model: plain `generate` has to stop at its end of turn."""
    path = save_tiny_lm(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = AutoConfig.from_pretrained(path).vocab_size
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if eos_is_new:
        tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer.save_pretrained(path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end >= rows
    with hosted(LanguageModelWorker, config=trained(path, resize_embeddings=True), num_steps=1) as group:
        LanguageModelRole(group, 2).save(tmp_path).result()
    saved = GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id
    assert end in (saved if isinstance(saved, list) else [saved])


@pytest.mark.parametrize("stage", [0, 3])
def test_a_scalar_head(stage: int, tmp_path: Path):
    path = save_tiny_rm(tmp_path / "small", vocab_size=NUM_TOKENS - 7)
    config = trained(path, zero_stage=stage, resize_embeddings=True)
    with hosted(PreferenceModelWorker, config=config, num_steps=1) as group:
        group.call("save", tmp_path).result()
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    rows = saved.model.embed_tokens.weight.detach()
    torch.testing.assert_close(rows[-7:], rows[:-7].mean(0).expand(7, -1))
