"""Parameters, gradients and optimizer states: what is planned is what real engines hold, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import census
from support.tiny import save_tiny_lm, tiny_tokenizer, trained

from rlhf_dist.models.architecture import architecture
from rlhf_dist.planning.sharding import Held, Sharding, average_bytes, trained_states

DS_CONFIGS = Path(__file__).resolve().parents[3] / "ds_configs"
CROSSED = [("llama", stage, precision) for stage in range(4) for precision in ("fp32", "bf16", "fp16")]
OTHERS = [("tied", 0, "fp32"), ("tied", 1, "bf16"), ("tied", 2, "fp32"), ("tied", 3, "bf16"), ("scalar", 1, "bf16")]
OTHERS += [("scalar", 3, "fp32"), ("gpt2", 0, "bf16"), ("gpt2", 2, "bf16"), ("gpt2", 3, "bf16")]
OFFLOADED = [("llama", 2, "zero2_offload"), ("tied", 3, "zero3_offload"), ("llama", 2, "torch_adamw")]
OFFLOADED += [
    ("llama", stage, f"zero{stage}_offload:{precision}") for stage in (2, 3) for precision in ("fp32", "fp16")
]
SMALL_GROUPS = ("llama", 3, "small")
PARTLY: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 5, "alpha": 10.0}},
    "lora_names": {"lora": {"rank": 3, "target_modules": ["q_proj", "down_proj"]}},
    "layers": {"freeze": {"num_layers": 1, "embeddings": True}},
    "head": {"freeze": {"all_but_head": True}},
}
"""What is trained in part."""
PARTS = [
    ("llama", stage, f"{part} {precision}")
    for stage in range(4)
    for part, precision in (("lora", "fp32"), ("lora", "bf16"), ("layers", "fp32"), ("layers", "bf16"))
]
PARTS += [
    ("scalar", 2, "lora_names bf16"),
    ("scalar", 3, "lora bf16"),
    ("scalar", 1, "head fp32"),
    ("scalar", 3, "head bf16"),
]
PARTS += [("tied", 2, "layers fp32"), ("tied", 3, "head bf16"), ("gpt2", 2, "lora bf16"), ("gpt2", 3, "layers fp32")]
PARTS += [("llama", 2, "lora zero2_offload"), ("llama", 3, "layers zero3_offload"), ("llama", 3, "lora small")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Widths that no number of ranks divides, so that padding shows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models")
    odd: dict[str, Any] = {
        "hidden_size": 36,
        "intermediate_size": 55,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    }
    tokenizer = tiny_tokenizer()
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=35, n_layer=2, n_head=5, n_positions=64))
    gpt2.save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return {
        "llama": save_tiny_lm(folder / "llama", **odd),
        "tied": save_tiny_lm(folder / "tied", tie_word_embeddings=True, **odd),
        "scalar": save_tiny_lm(folder / "scalar", **odd),
        "gpt2": folder / "gpt2",
    }


def case_of(name: str, stage: int, kind: str, models: dict[str, Path], folder: Path) -> dict[str, Any]:
    """`kind`: a precision; a file of ds_configs/ (`:` and a precision but bf16); `torch_adamw`: offloaded, stepped by torch;
    or `small`: shards in many tensors, nothing persistent, a small bucket."""
    case: dict[str, Any] = {"path": str(models[name]), "scalar": name == "scalar", "zero_stage": stage}
    if " " in kind:
        part, kind = kind.split(" ")
        case |= PARTLY[part]
    if kind in ("fp32", "bf16", "fp16"):
        return case | {"precision": kind}
    kind, _, precision = kind.partition(":")
    if kind == "small":
        path = folder / "small.json"
        section = {
            "stage": 3,
            "sub_group_size": 2000,
            "stage3_param_persistence_threshold": 40,
            "reduce_bucket_size": 5000,
        }
        path.write_text(json.dumps({"zero_optimization": section}), encoding="utf-8")
    elif kind == "torch_adamw":
        path = folder / "torch_adamw.json"
        content = json.loads((DS_CONFIGS / "zero2_offload.json").read_text(encoding="utf-8"))
        path.write_text(json.dumps(content | {"zero_force_ds_cpu_optimizer": False}), encoding="utf-8")
    else:
        path = DS_CONFIGS / f"{kind}.json"
    return case | {"precision": precision or "bf16", "ds_config_path": str(path)}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_byte_is_planned(num_ranks: int, models: dict[str, Path], tmp_path: Path):
    named = [*CROSSED, *OTHERS, *OFFLOADED, SMALL_GROUPS, *PARTS]
    check(named, num_ranks, models, tmp_path)


def check(named: list[tuple[str, int, str]], num_ranks: int, models: dict[str, Path], tmp_path: Path) -> None:
    """Each case's plan against its census."""
    cases = [case_of(*name, models, tmp_path) for name in named]
    wrong = []
    for name, case, ranks in zip(named, cases, census.take(cases, num_ranks), strict=True):
        settings = {key: value for key, value in case.items() if key not in ("path", "scalar")}
        config = trained(Path(case["path"]), **settings)
        sharding = Sharding.of(config, num_ranks)
        model = architecture(case["path"], case["scalar"], config.freeze, config.lora)
        for rank, seen in enumerate(ranks):
            states = trained_states(model, sharding, rank)
            at_rest = {
                "parameters": states.parameters.total,
                # On a CPU, the host memory of an offloaded shard is the device's, too: a lone rank has no copy.
                "persistent": states.persistent.total if num_ranks > 1 else 0,
                "gradients": states.gradients_kept.total,
                "optimizer": states.optimizer.total,
                "buffers": states.buffers.total,
                "average": (Held() if case["scalar"] or config.lora else average_bytes(model, sharding)).total,
            }
            boundary = at_rest | {"gradients": states.gradients.total}
            for when, planned in (("boundary", boundary), ("after", at_rest)):
                held = {purpose: size for purpose, size in seen[when].items() if purpose != "other"}
                if held != planned:
                    wrong.append((name, num_ranks, rank, when, planned, held))
                # Batches, losses, rotary frequencies, norms: nothing that grows with the model.
                assert seen[when]["other"] < 4096, (name, rank, when, seen[when])
    assert not wrong, "\n".join(map(str, wrong))
