"""What is frozen, what is adapted, and what is rejected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import tiny_config
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_dist.config.freeze import FreezeConfig, LoRAConfig
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.models.adapters import add_adapters, has_adapters, initialize_adapters, plain_parameters
from rlhf_dist.models.freeze import apply_freeze, count_parameters


def frozen(model) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def lm(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(tiny_config(**changes))


def test_embeddings_and_the_lowest_layers():
    model = lm(num_hidden_layers=3)
    apply_freeze(model, FreezeConfig(embeddings=True, num_layers=2))
    assert frozen(model) == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("model.embed", "model.layers.0", "model.layers.1"))
    }
    trained, rest = count_parameters(model)
    assert {part: tensors for part, (tensors, _) in trained.items()} == {"layers": 9, "rest": 1, "head": 1}
    assert {part: tensors for part, (tensors, _) in rest.items()} == {"layers": 18, "embeddings": 1}
    sizes = [elements for side in (trained, rest) for _, elements in side.values()]
    assert sum(sizes) == sum(p.numel() for p in model.parameters())


def test_gpt2_has_embeddings_of_positions_too():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=8))
    apply_freeze(model, FreezeConfig(embeddings=True, num_layers=1))
    names = {name for name, _ in model.named_parameters()}
    assert frozen(model) == {
        n for n in names if n.startswith(("transformer.wte", "transformer.wpe", "transformer.h.0."))
    }


def test_all_but_the_head():
    model, scalar = lm(), LlamaForSequenceClassification(tiny_config(num_labels=1))
    for each, head in ((model, "lm_head.weight"), (scalar, "score.weight")):
        apply_freeze(each, FreezeConfig(all_but_head=True))
        assert {name for name, p in each.named_parameters() if p.requires_grad} == {head}


def test_a_tied_head_is_the_embedding():
    model = lm(tie_word_embeddings=True)
    apply_freeze(model, FreezeConfig(all_but_head=True))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"model.embed_tokens.weight"}
    assert count_parameters(model)[0].keys() == {"embeddings"}
    model = lm(tie_word_embeddings=True)
    apply_freeze(model, FreezeConfig(embeddings=True))
    assert not model.lm_head.weight.requires_grad


def test_more_layers_than_there_are():
    with pytest.raises(ConfigError, match=r"freeze.num_layers is 3 but the model has 2 layers; lower it to at most 2"):
        apply_freeze(lm(), FreezeConfig(num_layers=3))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r"names 'q_prj', which no layer of Llama\w+ is called; its linear layers are called down_proj"),
        (["norm"], "names 'norm', but model.norm is a LlamaRMSNorm; adapters are for linear layers only"),
        (["embed_tokens"], "model.embed_tokens is a Embedding; adapters are for linear"),
        (["q_proj", "lm_head"], "the head, which is also the embedding; leave it out"),
    ],
)
def test_targets_that_cannot_be_adapted(targets: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        add_adapters(lm(tie_word_embeddings=True), LoRAConfig(target_modules=tuple(targets)))


def test_a_scalar_head_is_trained_whole_or_not_at_all():
    scalar = LlamaForSequenceClassification(tiny_config(num_labels=1))
    with pytest.raises(ConfigError, match="the head, which is trained whole anyway"):
        add_adapters(scalar, LoRAConfig(target_modules=("score",)))
    add_adapters(scalar, LoRAConfig(rank=2))
    trained, rest = count_parameters(scalar)
    assert trained == {
        "adapters": (28, 2 * sum(sum(p.shape) for n, p in scalar.named_parameters() if "base_layer" in n)),
        "head": (1, 64),
    }
    assert rest.keys() == {"embeddings", "layers", "rest"}


def test_an_untied_head_can_be_adapted():
    model = lm()
    add_adapters(model, LoRAConfig(rank=2, target_modules=("lm_head",)))
    assert [p.name for p in plain_parameters(model) if p.down is not None] == ["lm_head.weight"]


def test_first_weights_depend_on_seed_and_name_and_on_nothing_drawn_before():
    found = []
    for seed, drawn_before in ((0, 0), (0, 7), (1, 0)):
        torch.manual_seed(3)
        model = lm()
        torch.rand(drawn_before)
        state = torch.get_rng_state()
        add_adapters(model, LoRAConfig(rank=4))
        initialize_adapters(model, seed)
        assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
        found.append({p.name: p.down.detach().clone() for p in plain_parameters(model) if p.down is not None})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not any(torch.equal(found[0][name], found[2][name]) for name in found[0])
    a, b = found[0]["model.layers.0.self_attn.q_proj.weight"], found[0]["model.layers.1.self_attn.q_proj.weight"]
    assert not torch.equal(a, b)
    everything = torch.cat([tensor.flatten() * tensor.shape[1] ** 0.5 for tensor in found[0].values()])
    assert everything.abs().max() <= 1
    assert everything.mean().abs() < 0.05
    assert everything.std().item() == pytest.approx(3**-0.5, rel=0.05)  # of U(-1, 1)


def test_a_plain_model_is_told_from_an_adapted_one(tmp_path: Path):
    model = lm()
    names = [name for name, _ in model.named_parameters()]
    assert not has_adapters(model)
    assert [p.name for p in plain_parameters(model)] == names
    add_adapters(model, LoRAConfig())
    assert has_adapters(model)
    assert [p.name for p in plain_parameters(model)] == names
