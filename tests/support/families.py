"""Tiny random models of the architectures that people bring, each with a template that behaves like its family's own.

`python tests/support/publish_tables.py families` runs SFT, a reward model and PPO with each, and writes the table of
tests/README.md from what it saw.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist import ModelError, run_ppo, run_reward, run_sft
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.sft.config import SFTConfig
from support.tiny import tiny_tokenizer

LLAMA3 = (
    "{% for m in messages %}<|start|>{{ m.role }}\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)
QWEN2 = (  # a system message of its own where there is none
    "{% if messages[0].role != 'system' %}<|start|>system\nBe helpful.<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
QWEN3 = (  # the last turn only has its reasoning, an empty one too
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MISTRAL = (  # the system turn is put before the first user text, roles alternate
    "{% set system = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ system if loop.first }}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
GEMMA = (  # no system turn, roles alternate, the assistant is the model
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
PHI3 = (  # EOS ends a conversation that ends in a turn
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
OLMO2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content }}{{ eos_token }}"
    "{% if not loop.last %}\n{% endif %}{% else %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SMALL_HEADS = {"head_dim": 16, "query_pre_attn_scalar": 16}
MIXTURE = {"num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """An architecture."""

    model_type: str
    template: str | None = None
    """None: the built-in one, as for base models."""
    settings: dict[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "Llama": Family("llama", LLAMA3),
    "Qwen2": Family("qwen2", QWEN2),
    "Qwen3": Family("qwen3", QWEN3, {"head_dim": 16}),
    "Mistral": Family("mistral", MISTRAL, {"sliding_window": 32}),
    "Gemma 2": Family("gemma2", GEMMA, SMALL_HEADS | {"sliding_window": 32}),
    "Gemma 3": Family("gemma3_text", GEMMA, SMALL_HEADS | {"sliding_window": 32}),
    "Phi-3": Family("phi3", PHI3),
    "GPT-NeoX": Family("gpt_neox"),
    "GPT-2": Family("gpt2", None, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "OPT": Family("opt", None, {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Falcon": Family("falcon", None, {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "OLMo 2": Family("olmo2", OLMO2),
    "Mixtral": Family("mixtral", MISTRAL, MIXTURE | {"num_local_experts": 4, "sliding_window": None}),
    "Qwen3-MoE": Family("qwen3_moe", QWEN3, MIXTURE | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}),
}


def save_family(name: str, path: Path, *, scalar: bool = False, seed: int = 0) -> Path:
    """A random model of a family with its tokenizer, in Hugging Face format."""
    family = FAMILIES[name]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    if family.template is not None:
        tokenizer.chat_template = family.template
    settings = {
        "vocab_size": len(tokenizer)
        + 8,  # padded, as published models are; Qwen2's tokenizer class adds a token of its own
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.1,
    }
    if scalar:
        settings["num_labels"] = 1
    config = AutoConfig.for_model(family.model_type, **settings | family.settings)
    auto_class: Any = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@dataclass
class Seen:
    """What ran with a family; an entry is "" (it ran), or why not."""

    sft: dict[bool, str] = field(default_factory=dict)
    """Packed → how it went."""
    reward: dict[bool, str] = field(default_factory=dict)
    ppo: dict[bool, str] = field(default_factory=dict)


def try_family(name: str, folder: Path) -> Seen:
    """SFT, a reward model from its result, and PPO with both, padded and packed.

    PPO checks by itself that rollouts have the log-probs of the training forward pass. Saved models are loaded with plain
    transformers, without missing or unexpected names.
    """
    base = save_family(name, folder / "base")
    seen = Seen()
    for packed in (False, True):
        place = folder / ("packed" if packed else "padded")
        place.mkdir()
        seen.sft[packed] = _tried(lambda place=place, packed=packed: _sft(base, place, packed))
        seen.reward[packed] = _tried(lambda place=place, packed=packed: _reward(base, place, packed))
        if not (seen.sft[packed] or seen.reward[packed]):
            seen.ppo[packed] = _tried(lambda place=place, packed=packed: _ppo(place, packed))
        else:
            seen.ppo[packed] = seen.sft[packed] or seen.reward[packed]
    return seen


def _tried(run: Callable[[], None]) -> str:
    try:
        run()
    except ModelError as error:
        return str(error)
    return ""


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _chat(i: int) -> list[dict[str, str]]:
    said = [("user", f"say {i}"), ("assistant", f"good {i}"), ("user", "again"), ("assistant", "calm " * (1 + i % 3))]
    return [{"role": role, "content": content.strip()} for role, content in said]


def _common(place: Path, name: str) -> dict[str, Any]:
    return {"run_dir": str(place / name), "cluster": "inline", "device": "cpu", "checkpoint": {"at_end": False}}


def _trained(path: Path, packed: bool) -> dict[str, Any]:
    optimizer = {"learning_rate": 1e-3}
    return {
        "model_path": str(path),
        "precision": "fp32",
        "zero_stage": 2,
        "micro_batch_size": 2,
        "packed": packed,
        "optimizer": optimizer,
    }


def _sft(base: Path, place: Path, packed: bool) -> None:
    data = _write(place / "chats.jsonl", [{"messages": _chat(i)} for i in range(6)])
    config = {
        "model": _trained(base, packed),
        "data": {"train": [{"path": data, "kind": "messages"}], "max_length_tokens": 120},
        "sft": {"batch_size": 3, "num_steps": 2},
    }
    run_sft(SFTConfig.model_validate(_common(place, "sft") | config))
    _loads(AutoModelForCausalLM, place / "sft" / "model")


def _reward(base: Path, place: Path, packed: bool) -> None:
    rows = [{"prompt": _chat(i)[:3], "chosen": "good calm", "rejected": f"bad {i}"} for i in range(6)]
    config = {
        "model": _trained(base, packed),
        "data": {
            "train": [{"path": _write(place / "pairs.jsonl", rows), "kind": "preference"}],
            "max_length_tokens": 120,
        },
        "reward": {"batch_size": 3, "num_steps": 2},
    }
    run_reward(RewardConfig.model_validate(_common(place, "reward") | config))
    _loads(AutoModelForSequenceClassification, place / "reward" / "model")


def _ppo(place: Path, packed: bool) -> None:
    prompts = _write(place / "prompts.jsonl", [{"prompt": _chat(i)[:3]} for i in range(4)])
    policy, reward = place / "sft" / "model", place / "reward" / "model"
    config = {
        "policy": _trained(policy, packed),
        "value": _trained(reward, packed),
        "reference": {"precision": "fp32", "packed": packed},
        "reward": {"model_path": str(reward), "precision": "fp32", "packed": packed},
        "rollout": {"max_response_tokens": 8},
        "data": {"prompts": [{"path": prompts, "kind": "prompt"}], "max_length_tokens": 120},
        "ppo": {"num_iterations": 2, "prompts_per_iteration": 4, "mini_batch_size": 2},
    }
    run_ppo(PPOConfig.model_validate(_common(place, "ppo") | config))
    _loads(AutoModelForCausalLM, place / "ppo" / "model")


def _loads(auto_class: Any, path: Path) -> None:
    _, info = auto_class.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"], sorted(info["missing_keys"])
    assert not info["unexpected_keys"], sorted(info["unexpected_keys"])


def table(folder: Path) -> str:
    """The rows of tests/README.md."""
    lines = ["| family | architecture | SFT | reward model | PPO | packed |", "| --- | --- | --- | --- | --- | --- |"]
    for number, (name, family) in enumerate(FAMILIES.items()):
        (folder / str(number)).mkdir()
        seen = try_family(name, folder / str(number))
        cells = ["no" if how else "yes" for how in (seen.sft[False], seen.reward[False], seen.ppo[False])]
        packed = "yes" if not (seen.sft[True] or seen.reward[True] or seen.ppo[True]) else "not supported"
        lines.append(f"| {name} | `{family.model_type}` | {' | '.join(cells)} | {packed} |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"
