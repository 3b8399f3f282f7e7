"""A reward model of another template or tokenizer reads the text as it was trained to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from support.tiny import tiny_tokenizer

from rlhf_dist.config.data import DataSettings, DataSource
from rlhf_dist.core.batches import FINISHED, TRUNCATED, RolloutBatch, pad_rows
from rlhf_dist.data.loading import load_prompts
from rlhf_dist.evaluation.reward_input import Rendered, as_generated
from rlhf_dist.quickstart.tokenizer import train_tokenizer

OWN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
OWN += "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
OWN += "{% if add_generation_prompt %}[assistant] {% endif %}"


def with_template(tokenizer, template: str):
    tokenizer.chat_template = template
    return tokenizer


def test_in_its_own_template_and_tokens(tmp_path: Path):
    tokenizer = with_template(tiny_tokenizer(), "{% for m in messages %}{{ m.content }}\n{% endfor %}")
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
    read = Rendered([prompts], tokenizer, [tokenizer.eos_token_id], other, limit=None)
    found = read(rollout)
    texts = [other.decode(row[:n]) for row, n in zip(found.tokens, found.lengths.tolist(), strict=True)]
    assert texts == ["[user] Be good.[assistant] so it is</s>", "[user] Be calm.[assistant] cut of"]
    ids = other(texts[0].removesuffix("</s>"), add_special_tokens=False)["input_ids"]
    assert found.tokens[0, : found.lengths[0]].tolist() == [*ids, other.eos_token_id]
    # Order and number of rows are the rollout's.
    one = read(dataclasses.replace(rollout.rows(torch.tensor([1]))))
    assert torch.equal(one.tokens[0, : one.lengths[0]], found.tokens[1, : found.lengths[1]])
