"""Packed forward passes equal padded ones, and models for which they would not are rejected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import VOCAB_SIZE, token_batch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Qwen2Config,
    RwkvConfig,
    XGLMConfig,
)

from rlhf_dist.core.batches import TokenBatch, length_mask
from rlhf_dist.core.errors import ModelError
from rlhf_dist.models.forward import ForwardPass, ScalarHead, TargetLogprobs
from rlhf_dist.models.packing import (
    LEAK_TOLERANCE,
    LEAK_TOLERANCE_HALF,
    TOLERANCE,
    TOLERANCE_HALF,
    check_packing,
    model_inputs,
    probe_packing,
    unpack,
)

LENGTHS = [9, 4, 1, 13, 2, 7]
CPU = torch.device("cpu")

_IDS: dict[str, Any] = {
    "num_labels": 1,
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_NEOX: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA: dict[str, Any] = _NEOX | {"num_key_value_heads": 2, "max_position_embeddings": 64}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GPT2_DROPOUTS: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

AGREE: dict[str, Any] = {
    "llama": LlamaConfig(**_LLAMA, **_IDS),
    "qwen2": Qwen2Config(**_LLAMA, **_IDS),
    "mistral, sliding window of 4": MistralConfig(**_LLAMA, **_IDS, sliding_window=4, head_dim=8),
    "gpt2": GPT2Config(**_GPT2, **_GPT2_DROPOUTS, **_IDS),
    "gpt_neox": GPTNeoXConfig(**_NEOX, **_IDS, max_position_embeddings=64),
    "mixtral": MixtralConfig(**_LLAMA, **_IDS, num_local_experts=4),
}
LEAK: dict[str, Any] = {
    "bloom, ALiBi": BloomConfig(hidden_size=32, n_layer=2, n_head=4, **_IDS),
    "falcon, ALiBi": FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, **_IDS),
    "falcon, RoPE": FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False, **_IDS),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, **_IDS
    ),
    "openai-gpt": OpenAIGPTConfig(**_GPT2, **_IDS),
    "xglm": XGLMConfig(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64, **_IDS),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **_IDS),
    "rwkv": RwkvConfig(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, **_IDS),
    "lfm2, convolution": Lfm2Config(**_LLAMA, **_IDS, layer_types=["conv", "full_attention"]),
}


def ragged_batch() -> TokenBatch:
    """Rows of `LENGTHS`, random targets; the row of one token has none, as nothing predicts it."""
    return token_batch(LENGTHS)


def build(config: Any, auto_class: Any = AutoModelForCausalLM, **kwargs: Any) -> Any:
    """Weights wide enough for every token and position to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class.from_config(config, **kwargs)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.12)
    return model


def as_initialized(config: Any, dtype: torch.dtype) -> Any:
    """Weights as transformers draws them: so small that a leak is, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)


def gradients(module: ForwardPass, loss: torch.Tensor) -> list[torch.Tensor]:
    used = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, used, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(used, found, strict=True)]


def assert_same_gradients(packed: list[torch.Tensor], padded: list[torch.Tensor]) -> None:
    scale = max(float(g.norm()) for g in padded)
    assert scale > 0
    for a, b in zip(packed, padded, strict=True):
        assert float((a - b).norm()) <= 1e-5 * scale


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", AGREE)
def test_logprobs_entropies_and_gradients_are_those_of_padded_passes(name: str, attention: str):
    model = build(AGREE[name], attn_implementation=attention)
    batch = ragged_batch()
    inputs = (batch.tokens, batch.lengths, batch.loss_mask, 0.7, True)
    weights = torch.linspace(-1, 1, batch.num_targets)
    results = []
    for packed in (True, False):
        module = TargetLogprobs(model, packed)
        logprobs, entropy = module(*inputs)
        results.append((logprobs, entropy, gradients(module, (logprobs * weights + 0.1 * entropy).sum())))
    for k in range(2):
        assert torch.allclose(results[0][k], results[1][k], rtol=1e-5, atol=2e-5)
    assert_same_gradients(results[0][2], results[1][2])


@pytest.mark.parametrize("name", [name for name in AGREE if name != "gpt_neox"])  # its class has no head named `score`
def test_scalars_and_gradients_are_those_of_padded_passes(name: str):
    model = build(AGREE[name], AutoModelForSequenceClassification)
    batch = ragged_batch()
    weights = torch.linspace(-1, 1, batch.tokens.numel()).reshape(batch.tokens.shape)
    results = []
    for packed in (True, False):
        module = ScalarHead(model, packed)
        scalars = module(batch.tokens, batch.lengths)
        results.append((scalars, gradients(module, (scalars * weights).sum())))
    padded = results[1][0]
    assert torch.allclose(results[0][0], padded, rtol=1e-5, atol=1e-5 * float(padded.detach().abs().max()))
    assert not padded[~length_mask(batch.lengths, batch.tokens.shape[1])].any()
    assert_same_gradients(results[0][1], results[1][1])


@torch.no_grad()
def test_garbage_in_padding_changes_no_bit():
    model, reward = build(AGREE["llama"]), build(AGREE["llama"], AutoModelForSequenceClassification)
    batch = ragged_batch()
    kept = length_mask(batch.lengths, batch.tokens.shape[1])
    garbage = torch.where(kept, batch.tokens, 251)
    wide = nn.functional.pad(garbage, (0, 5), value=VOCAB_SIZE + 9)  # not even a token
    mask = nn.functional.pad(batch.loss_mask, (0, 5))
    base = TargetLogprobs(model, True)(batch.tokens, batch.lengths, batch.loss_mask)[0]
    assert torch.equal(TargetLogprobs(model, True)(wide, batch.lengths, mask)[0], base)
    scalars = ScalarHead(reward, True)(wide, batch.lengths)
    assert torch.equal(scalars[:, :-5], ScalarHead(reward, True)(batch.tokens, batch.lengths))
    assert not scalars[~length_mask(batch.lengths, wide.shape[1])].any()


@torch.no_grad()
def test_a_sequence_does_not_see_its_neighbors():
    module = TargetLogprobs(build(AGREE["llama"]), packed=True)
    batch = ragged_batch()
    base = module(batch.tokens, batch.lengths, batch.loss_mask)[0].split(batch.loss_mask.sum(1).tolist())
    tokens = batch.tokens.clone()
    tokens[1, :4] = torch.tensor([251, 252, 253, 254])
    changed = module(tokens, batch.lengths, batch.loss_mask)[0].split(batch.loss_mask.sum(1).tolist())
    assert [torch.equal(a, b) for a, b in zip(base, changed, strict=True)] == [True, False, True, True, True, True]


def test_only_logits_of_targets_are_computed():
    model = build(AGREE["llama"])
    module = TargetLogprobs(model, packed=True)
    batch = ragged_batch()
    seen = []
    hook = model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape)))
    module(batch.tokens, batch.lengths, batch.loss_mask)
    hook.remove()
    assert seen == [(1, batch.num_targets, VOCAB_SIZE)]


@torch.no_grad()
def test_a_model_that_cannot_slice_its_logits_gives_the_same():
    lm = build(AGREE["gpt2"])

    class WithoutSlicing(nn.Module):
        base_model = lm.base_model
        config = lm.config
        get_input_embeddings = lm.get_input_embeddings

        def __init__(self):
            super().__init__()
            self.lm = lm

        def forward(self, input_ids, position_ids, use_cache):
            return lm(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    batch = ragged_batch()
    inputs = (batch.tokens, batch.lengths, batch.loss_mask)
    sliced, whole = TargetLogprobs(lm, True)(*inputs)[0], TargetLogprobs(WithoutSlicing(), True)(*inputs)[0]
    assert torch.allclose(sliced, whole, atol=1e-5)


@pytest.mark.parametrize("name", LEAK)
def test_models_whose_packed_sequences_leak_are_rejected_at_the_first_pass(name: str):
    model = build(LEAK[name])
    batch = ragged_batch()
    inputs = (batch.tokens, batch.lengths, batch.loss_mask)
    message = rf"{type(model).__name__} does not keep packed sequences apart: .* by \d.*; set packed: false"
    with pytest.raises(ModelError, match=message):
        TargetLogprobs(model, packed=True)(*inputs)
    TargetLogprobs(model, packed=False)(*inputs)  # and padded they run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEAK)
def test_leaks_are_seen_in_newly_initialized_models(name: str, dtype: torch.dtype):
    """Bloom, OpenAI-GPT, XGLM and LFM2 deviate from padded passes by less than rounding may; replacing a neighbor tells."""
    with pytest.raises(ModelError, match="does not keep packed sequences apart: hidden states of one move by"):
        check_packing(as_initialized(LEAK[name], dtype), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", AGREE)
def test_rounding_is_no_leak(name: str, dtype: torch.dtype):
    for model in (as_initialized(AGREE[name], dtype), build(AGREE[name]).to(dtype)):
        check_packing(model, CPU)
        probe = probe_packing(model, CPU)
        # A fifth of what is allowed: deeper models and other kernels round to more.
        assert probe.leak <= 0.2 * LEAK_TOLERANCE.get(dtype, LEAK_TOLERANCE_HALF)
        assert probe.deviation < (0.02 * TOLERANCE[dtype] if dtype in TOLERANCE else 0.5 * TOLERANCE_HALF)


def noisy(model: Any, scale: float) -> Any:
    """A model whose rounding depends on the whole row, as with kernels chosen by how many tokens an expert gets."""

    def round_otherwise(_module: Any, _args: Any, kwargs: Any, out: Any) -> Any:
        row = int((kwargs["input_ids"] * torch.arange(1, kwargs["input_ids"].shape[1] + 1)).sum())
        out["last_hidden_state"] *= 1 + scale * torch.randn(out[0].shape, generator=torch.Generator().manual_seed(row))
        return out

    model.base_model.register_forward_hook(round_otherwise, with_kwargs=True)
    return model


def test_what_moves_before_a_change_is_rounding_and_sets_the_measure():
    check_packing(noisy(build(AGREE["llama"]), 5e-5), CPU)
    with pytest.raises(ModelError, match="does not keep packed sequences apart"):
        check_packing(noisy(build(LEAK["bloom, ALiBi"]), 5e-5), CPU)


def test_a_model_that_looks_ahead_cannot_pass_its_leak_off_as_rounding():
    model = noisy(build(AGREE["llama"]), 0.1)
    assert probe_packing(model, CPU).rounding > 0.05
    with pytest.raises(ModelError, match="does not keep packed sequences apart"):
        check_packing(model, CPU)


def test_attention_within_chunks_of_the_row_is_rejected():
    """Chunks are longer than the probe, which cannot tell."""
    config = Llama4TextConfig(
        **_LLAMA, **_IDS, intermediate_size_mlp=48, head_dim=8, num_local_experts=2, attention_chunk_size=32
    )
    model = build(config)
    probe = probe_packing(model, CPU)
    assert max(probe.leak, probe.deviation) < LEAK_TOLERANCE[torch.float32]
    with pytest.raises(ModelError, match=r"Llama4ForCausalLM .*attention_chunk_size is 32\).*; set packed: false"):
        check_packing(model, CPU)


def test_absolute_positions_that_do_not_restart_are_rejected():
    """A model that reads position ids for its mask only: nothing leaks, and packed sequences are still wrong."""
    model = build(AGREE["gpt2"])
    embed = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda positions: embed(torch.arange(positions.shape[-1])[None])
    with pytest.raises(
        ModelError, match=r"GPT2LMHeadModel does not treat packed sequences as it does padded ones: .* by"
    ):
        check_packing(model, CPU)


def test_a_model_without_position_ids_is_rejected():
    class Plain(nn.Module):
        def forward(self, input_ids, attention_mask, use_cache): ...

    model = Plain()
    model.base_model = model
    with pytest.raises(ModelError, match="Plain takes no position ids"):
        check_packing(model, CPU)


def test_the_check_runs_once_and_leaves_the_mode_as_it_was():
    module = TargetLogprobs(build(AGREE["llama"]), packed=True).train()
    passes = []
    module.model.model.register_forward_hook(lambda _m, _i, _o: passes.append(module.model.training))
    batch = token_batch([3, 2])
    for _ in range(2):
        module(batch.tokens, batch.lengths, batch.loss_mask)
    assert passes == [False] * 4 + [True] * 2


def test_position_ids_restart_and_rows_come_back():
    tokens = torch.tensor([[5, 6, 7], [8, 0, 0], [9, 4, 0]])
    lengths = torch.tensor([3, 1, 2])
    inputs = model_inputs(tokens, lengths, packed=True)
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert "attention_mask" not in inputs  # with one, transformers would not look at the positions
    assert torch.equal(unpack(inputs["input_ids"][0], lengths, 3), tokens)
