"""Tokens that end a response: the union of what tokenizer, chat template, config and generation config say, everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny import hosted, prompt_batch, trained
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf_dist.core.batches import FINISHED
from rlhf_dist.distributed.rollout_engines import RolloutRole
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.distributed.workers.rollout import RolloutWorker
from rlhf_dist.models.generation_config import stop_tokens
from rlhf_dist.rollout.config import RolloutConfig
from rlhf_dist.sft.roles import LanguageModelRole

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def several(tiny_lm: Path, folder: Path) -> Path:
    """A model whose generation config ends at three ordinary tokens, as if they were ends of turn."""
    path = shutil.copytree(tiny_lm, folder)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [40, 41, 42]}), encoding="utf-8")
    return path


def test_rollouts_end_at_every_stop_token_of_the_model(tiny_lm: Path, tmp_path: Path):
    path = several(tiny_lm, tmp_path / "several")
    config = RolloutConfig(max_response_tokens=64, temperature=1.5)
    with hosted(RolloutWorker, config=config, model_path=str(path), precision="fp32") as group:
        rollout = RolloutRole(group, 64).generate(prompt_batch([4] * 64), stream="train", iteration=0).result()
    last = rollout.tokens.gather(1, (rollout.prompt_lengths + rollout.response_lengths - 1)[:, None]).squeeze(1)
    ended = rollout.finish_reasons == FINISHED
    assert set(last[ended].tolist()) & {40, 41, 42}
    inner = [
        token
        for row, n, m in zip(rollout.tokens, rollout.prompt_lengths, rollout.response_lengths, strict=True)
        for token in row[n : n + m - 1].tolist()
    ]
    assert not set(inner) & {40, 41, 42}
    assert bool((rollout.response_lengths[~ended] == 64).all())


@pytest.mark.parametrize("stage", [0, 3])
def test_a_saved_model_stops_in_plain_transformers_where_its_template_ends_turns(
    stage: int, tiny_lm: Path, tmp_path: Path
):
    """A base model of another EOS, trained on a template of its own: ChatML."""
    path = shutil.copytree(tiny_lm, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    vocab = tokenizer.get_vocab()
    # Two tokens that are there take the part of the marks: the vocabulary must not grow.
    names = sorted(vocab, key=vocab.__getitem__)[-2:]
    template = CHATML.replace("<|im_start|>", names[0]).replace("<|im_end|>", names[1])
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    end = vocab[names[1]]
    with hosted(LanguageModelWorker, config=trained(path, zero_stage=stage), num_steps=1) as group:
        LanguageModelRole(group, 1).save(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == [tokenizer.eos_token_id, end]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():  # a head that gives the end of turn after anything
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = 100 * model.model.norm(model.model.embed_tokens.weight[5])
    out = model.generate(torch.tensor([[5]]), do_sample=True, max_new_tokens=200)
    assert int(out[0, -1]) in (end, tokenizer.eos_token_id)
    assert out.shape[1] < 201


def test_the_tokenizers_own_come_first_and_ids_without_a_row_are_none(tiny_lm: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    model.generation_config.eos_token_id = [7, 100_000, model.config.eos_token_id]
    assert stop_tokens(model, [9, 7]) == [9, 7, model.config.eos_token_id]
