"""Every assistant turn of a conversation is trained on, and nothing else, whatever format the model family has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from data_support import train_tokenizer

from rlhf_dist.config.data import DataSource, SFTData
from rlhf_dist.core.errors import DataError
from rlhf_dist.data.encoding import encode_conversation
from rlhf_dist.data.loading import load_sft
from rlhf_dist.data.reader import read_prompts, read_sequences

ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
FORMATS: dict[str, tuple[str, tuple[str, ...], str]] = {
    # Family → template, its special tokens, what a trained turn is.
    "Llama 3": (
        "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
        " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "{}<|eot_id|>",
    ),
    "Gemma": (
        "{{ bos_token }}{% for m in messages %}"
        + ALTERNATE
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
        "{{ '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        "{}<end_of_turn>",
    ),
    "Mistral": (  # a prompt ends with the user's turn, whether it is asked to or not
        "{{ bos_token }}{% for m in messages %}"
        + ALTERNATE
        + "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}{% endfor %}",
        ("[INST]", "[/INST]"),
        "{}</s>",
    ),
    "Llama 2": (
        "{% for m in messages %}"
        + ALTERNATE
        + "{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' if m.role == 'user' else ' ' + m.content | trim + ' '"
        " + eos_token }}{% endfor %}",
        (),
        " {} </s>",
    ),
    "Zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        (),
        "{}</s>",
    ),
    "Phi 3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|end|>"),
        "{}<|end|>",
    ),
    "Vicuna": (
        "{{ 'A chat.' }}{% for m in messages %}{{ ' USER: ' + m.content if m.role == 'user' else ' ASSISTANT: ' + m.content"
        " + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
        (),
        " {}</s>",
    ),
}
CHAT = [("Hi, who?", "I am it."), ("Tiếng Việt?", "Rất đẹp: ở, ữ 🌾"), ("Two\nlines?", "One\n\nTwo")]
HH = "".join(f"\n\nHuman: {question}\n\nAssistant: {answer}" for question, answer in CHAT)


def chat(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


@pytest.mark.parametrize("family", FORMATS)
def test_every_assistant_turn_of_a_format_is_trained(family: str):
    template, special, turn = FORMATS[family]
    tokenizer = train_tokenizer(*special)
    tokenizer.chat_template = template
    ids, mask = encode_conversation(tokenizer, chat(CHAT))
    trained: list[list[int]] = []
    for token, target, before in zip(ids, mask, [False, *mask], strict=False):
        if target and not before:
            trained.append([])
        if target:
            trained[-1].append(token)
    assert [tokenizer.decode(run) for run in trained] == [turn.format(answer) for _, answer in CHAT]
    untrained = tokenizer.decode([token for token, target in zip(ids, mask, strict=True) if not target])
    assert all(question in untrained for question, _ in CHAT)


def test_a_dialogue_as_text_is_the_chat_that_it_writes_out(source: Callable[..., DataSource]):
    """HH-like sets hold whole dialogues as text; the better one is a chat to learn from."""
    rows = [{"chosen": HH, "rejected": HH + " No."}, {"chosen": HH + "\n\nHuman: more", "rejected": "x"}]
    as_text = source("messages", rows, fields={"messages": "chosen"})
    records: list[Any] = list(read_sequences(as_text))
    assert list(records[0].messages) == chat(CHAT)
    assert [m["role"] for m in records[1].messages] == ["user", "assistant"] * 3 + ["user"]
    [prompt, _] = read_prompts(as_text)
    assert list(prompt.messages) == chat(CHAT)[:-1]


def test_an_hh_set_trains_on_every_answer(tokenizer: Any, source: Callable[..., DataSource]):
    train = source("messages", [{"chosen": HH}] * 2, fields={"messages": "chosen"})
    batch = load_sft(SFTData(train=(train,)), tokenizer, seed=0).train.batch([0])
    assert tokenizer.decode(batch.tokens[batch.loss_mask]) == "".join(answer + "</s>" for _, answer in CHAT)


def test_text_that_is_no_dialogue_is_invalid(source: Callable[..., DataSource]):
    with pytest.raises(DataError, match=r"data\.jsonl:1: field 'messages' is 'Assistant: hm', not a list of messages"):
        list(read_sequences(source("messages", [{"messages": "Assistant: hm"}])))
