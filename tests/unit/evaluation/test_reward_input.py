"""A reward model of another template or tokenizer reads the text as it was trained to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support.tiny import save_tiny_rm, tiny_tokenizer
from transformers import AutoTokenizer

from rlhf_dist.config.data import DataSettings, DataSource
from rlhf_dist.core.batches import FINISHED, TRUNCATED, RolloutBatch, pad_rows
from rlhf_dist.core.errors import ModelError
from rlhf_dist.data.loading import load_prompts
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.evaluation.build import prepare
from rlhf_dist.evaluation.config import EvalConfig
from rlhf_dist.evaluation.reward_input import Rendered, as_generated
from rlhf_dist.models.loading import load_model_config
from rlhf_dist.quickstart.tokenizer import train_tokenizer
from rlhf_dist.run.checks import own_tokenizer

PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
OWN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
OWN += "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
OWN += "{% if add_generation_prompt %}[assistant] {% endif %}"


def with_template(tokenizer, template: str):
    tokenizer.chat_template = template
    return tokenizer


def test_in_its_own_template_and_tokens(tmp_path: Path):
    tokenizer = with_template(tiny_tokenizer(), PLAIN)
    other = with_template(train_tokenizer(["calm good words only"] * 3, vocab_size=270), OWN)
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Be calm."}\n{"prompt": "Be good."}\n', encoding="utf-8")
    prompts = load_prompts(
        [DataSource(path=str(file), kind="prompt")], tokenizer, 50, DataSettings(), keep_records=True
    )
    batch = prompts.batch([1, 0])
    said = [tokenizer("so it is")["input_ids"] + [tokenizer.eos_token_id], tokenizer("cut of")["input_ids"]]
    rows = [
        torch.cat([row[:n], torch.tensor(ids)]) for row, n, ids in zip(batch.tokens, batch.lengths, said, strict=True)
    ]
    rollout = RolloutBatch(
        tokens=pad_rows(rows),
        prompt_lengths=batch.lengths,
        response_lengths=torch.tensor([len(ids) for ids in said]),
        rollout_logprobs=torch.zeros(2, max(map(len, said))),
        finish_reasons=torch.tensor([FINISHED, TRUNCATED]),
        policy_version=0,
    )
    assert as_generated(rollout).tokens is rollout.tokens
    read = Rendered([prompts], tokenizer, DataSettings(max_length_tokens=50), other, limit=None)
    read.check(max_response_tokens=4)
    found = read(rollout)
    texts = [other.decode(row[:n]) for row, n in zip(found.tokens, found.lengths.tolist(), strict=True)]
    assert texts == ["[user] Be good.[assistant] so it is</s>", "[user] Be calm.[assistant] cut of"]
    ids = other(texts[0].removesuffix("</s>"), add_special_tokens=False)["input_ids"]
    assert found.tokens[0, : found.lengths[0]].tolist() == [*ids, other.eos_token_id]
    # Order and number of rows are the rollout's.
    one = read(dataclasses.replace(rollout.rows(torch.tensor([1]))))
    assert torch.equal(one.tokens[0, : one.lengths[0]], found.tokens[1, : found.lengths[1]])


REJECTED = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
NO_SYSTEM = OWN.replace("[{{ m.role }}]", REJECTED + "[{{ m.role }}]")
LONG = " ".join(f"w{i}" for i in range(40))


def prompts_of(tmp_path: Path, tokenizer, messages, **settings):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": messages}) + "\n", encoding="utf-8")
    wanted = DataSettings(**settings)
    source = DataSource(path=str(file), kind="prompt")
    return load_prompts([source], tokenizer, wanted.max_length_tokens, wanted, keep_records=True), wanted


def test_what_the_reward_model_cannot_read_is_told_before_the_start(tmp_path: Path):
    chat = [{"role": "system", "content": "S."}, {"role": "user", "content": "Be calm."}]
    other, tokenizer = with_template(tiny_tokenizer(), NO_SYSTEM), with_template(tiny_tokenizer(), PLAIN)
    prompts, settings = prompts_of(tmp_path, tokenizer, chat, max_length_tokens=60)
    with pytest.raises(ModelError, match=r"prompts\.jsonl:1: .*no system"):
        Rendered([prompts], tokenizer, settings, other, limit=None).check(4)
    prompts, settings = prompts_of(tmp_path, tokenizer, chat, max_length_tokens=60, system="merge_into_user")
    Rendered([prompts], tokenizer, settings, other, limit=None).check(4)
    with pytest.raises(ModelError, match=r"prompts\.jsonl:1: .* context of 30"):
        Rendered([prompts], tokenizer, settings, other, limit=30).check(20)


def test_it_reads_the_prompt_as_it_was_cut(tmp_path: Path):
    tokenizer, other = with_template(tiny_tokenizer(), PLAIN), with_template(tiny_tokenizer(), OWN)
    chat = [
        {"role": "user", "content": "old"},
        {"role": "assistant", "content": "o"},
        {"role": "user", "content": LONG},
    ]
    prompts, settings = prompts_of(tmp_path, tokenizer, chat, max_length_tokens=80, on_too_long="truncate_left")
    batch = prompts.batch([0])
    said = torch.tensor([*tokenizer("yes")["input_ids"], tokenizer.eos_token_id])
    rollout = RolloutBatch(
        tokens=torch.cat([batch.tokens[0], said])[None],
        prompt_lengths=batch.lengths,
        response_lengths=torch.tensor([len(said)]),
        rollout_logprobs=torch.zeros(1, len(said)),
        finish_reasons=torch.tensor([FINISHED]),
        policy_version=0,
    )
    found = Rendered([prompts], tokenizer, settings, other, limit=None)(rollout)
    text = other.decode(found.tokens[0])
    kept = text.removeprefix("[user] ").removesuffix("[assistant] yes</s>")
    assert LONG.endswith(kept)
    assert kept in tokenizer.decode(batch.tokens[0])
    assert 10 < len(kept) < len(LONG)


def test_eval_reads_preferences_as_the_reward_model_does(tmp_path: Path, tiny_lm: Path):
    """Whether a policy is evaluated beside it or not."""
    rm = save_tiny_rm(tmp_path / "rm")
    with_template(tiny_tokenizer(), OWN).save_pretrained(rm)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n", encoding="utf-8")
    common = {
        "run_dir": str(tmp_path / "run"),
        "reward": {"model_path": str(rm)},
        "data": {"preferences": [{"path": str(pairs), "kind": "preference"}], "max_length_tokens": 64},
        "rollout": {"max_response_tokens": 4},
    }
    policy = {"policy": {"model_path": str(tiny_lm)}}
    alone, both = (prepare(EvalConfig.model_validate(common | more)) for more in ({}, policy))
    assert alone.data["preferences"].fingerprint == both.data["preferences"].fingerprint
    assert both.run_summary["the reward model reads"] == "text in its own chat template"


def test_a_reward_model_without_a_template_beside_a_policy_with_one(tmp_path: Path):
    rm = save_tiny_rm(tmp_path / "rm")
    assert AutoTokenizer.from_pretrained(rm).chat_template is None
    policy = with_template(tiny_tokenizer(), OWN)
    with pytest.raises(ModelError, match=r"rm' has no chat template.*reward_template"):
        own_tokenizer(str(rm), load_model_config(str(rm)), policy)
    builtin = load_tokenizer(str(rm))
    assert own_tokenizer(str(rm), load_model_config(str(rm)), builtin) is None
    builtin.save_pretrained(rm)  # as runs do
    assert own_tokenizer(str(rm), load_model_config(str(rm)), policy) is not None


QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
R1 += "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"


@pytest.mark.parametrize(("template", "again"), [(OWN, False), (QWEN3, True), (R1, True)])
def test_a_template_that_has_finished_turns_otherwise_than_generated_ones_is_rendered_again(
    template: str, again: bool, tmp_path: Path
):
    """Policy and reward model have the same template; the latter was trained on finished turns."""
    rm = save_tiny_rm(tmp_path / "rm")
    with_template(tiny_tokenizer(), template).save_pretrained(rm)
    policy = load_tokenizer(str(rm))
    assert (own_tokenizer(str(rm), load_model_config(str(rm)), policy) is not None) == again
