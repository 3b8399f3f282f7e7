"""Real models and batches, as small as they can be: made in milliseconds, the same every time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf_dist.config.hosting import OptimizerConfig, Placement, TrainedModel
from rlhf_dist.core.batches import FINISHED, Experience, PromptBatch, RolloutBatch, TokenBatch, length_mask, pad_rows
from rlhf_dist.distributed.deepspeed import zero
from rlhf_dist.distributed.group import WorkerGroup, WorkerSpec
from rlhf_dist.distributed.inline import InlineSession
from rlhf_dist.quickstart.tokenizer import train_tokenizer

VOCAB_SIZE = 300
_TEXTS = ["calm is good; cool, calming, crime.", "Write three words that start like this.\n\ncalm, kind"] * 20


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """All bytes, two special tokens and the merges of a few words: at most `VOCAB_SIZE` entries."""
    return train_tokenizer(_TEXTS, vocab_size=VOCAB_SIZE)


def tiny_config(**changes: Any) -> LlamaConfig:
    """Two layers, width 64. Weights are drawn wide, so that distributions are far from uniform and every token and
    position matters to the outputs."""
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.12,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaConfig(**(settings | changes))


def save_tiny_lm(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A causal LM with its tokenizer in Hugging Face format."""
    return _save(LlamaForCausalLM, tiny_config(**changes), path, seed)


def save_tiny_rm(path: Path, seed: int = 1, **changes: Any) -> Path:
    """A sequence-classification model with one output, of the same vocabulary."""
    return _save(LlamaForSequenceClassification, tiny_config(**({"num_labels": 1} | changes)), path, seed)


def _save(model_class: Any, config: LlamaConfig, path: Path, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        # transformers starts the pad token's embedding at 0, which would hide what leaks from padding or idle batches.
        with torch.no_grad():
            model.get_input_embeddings().weight[config.pad_token_id].normal_(std=config.initializer_range)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def generator(seed: int) -> torch.Generator:
    """A torch generator of its own."""
    return torch.Generator().manual_seed(seed)


def random_rows(lengths: Sequence[int], seed: int) -> list[torch.Tensor]:
    """Random ordinary tokens (neither pad nor EOS)."""
    g = generator(seed)
    return [torch.randint(2, 250, (n,), generator=g) for n in lengths]


def token_batch(lengths: Sequence[int], seed: int = 0) -> TokenBatch:
    """Sequences whose first token is never a target and every other one is by chance, the last of two or more always."""
    g = generator(seed + 1000)
    tokens = pad_rows(random_rows(lengths, seed))
    mask = torch.rand(tokens.shape, generator=g) < 0.6
    mask[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = True
    mask[:, 0] = False
    return TokenBatch(tokens, torch.tensor(lengths), mask & length_mask(torch.tensor(lengths), tokens.shape[1]))


def prompt_batch(lengths: Sequence[int], seed: int = 0) -> PromptBatch:
    """Random prompts; sample ids are not their row numbers."""
    ids = torch.arange(len(lengths)) * 7 + 3
    return PromptBatch(pad_rows(random_rows(lengths, seed)), torch.tensor(lengths), ids)


def rollout_batch(prompts: Sequence[int], responses: Sequence[int], seed: int = 0) -> RolloutBatch:
    """Random prompts and responses of the given lengths."""
    total = [p + r for p, r in zip(prompts, responses, strict=True)]
    return RolloutBatch(
        tokens=pad_rows(random_rows(total, seed)),
        prompt_lengths=torch.tensor(prompts),
        response_lengths=torch.tensor(responses),
        rollout_logprobs=torch.zeros(len(total), max(responses)),
        finish_reasons=torch.full((len(total),), FINISHED),
        policy_version=0,
    )


def experience_batch(prompts: Sequence[int], responses: Sequence[int], seed: int = 0) -> Experience:
    """Random experience; old log-probs are about those of a uniform policy."""
    rollout = rollout_batch(prompts, responses, seed)
    g, mask = generator(seed + 2000), rollout.response_mask

    def noise(scale: float, shift: float = 0.0) -> torch.Tensor:
        return torch.where(mask, torch.randn(mask.shape, generator=g) * scale + shift, 0.0)

    return Experience(
        tokens=rollout.tokens,
        prompt_lengths=rollout.prompt_lengths,
        response_lengths=rollout.response_lengths,
        old_logprobs=noise(0.5, -5.0),
        old_values=noise(0.5),
        advantages=noise(1.0),
        returns=noise(1.0),
        ref_logprobs=noise(0.5, -5.0),
    )


def trained(path: Path, **changes: Any) -> TrainedModel:
    """A trained model in fp32 whose every setting shows in its weights: warm-up, decay, weight decay, clipping."""
    optimizer = {"learning_rate": 1e-3, "weight_decay": 0.1, "warmup_fraction": 0.34, "schedule": "linear"}
    optimizer |= changes.pop("optimizer", {})
    settings = {"model_path": str(path), "precision": "fp32", "zero_stage": 0, "micro_batch_size": 2} | changes
    return TrainedModel(**settings, optimizer=OptimizerConfig(**optimizer))


@contextlib.contextmanager
def hosted(worker: Callable[..., Any], seed: int = 0, **kwargs: Any) -> Iterator[WorkerGroup]:
    """A worker's class, hosted in this process with the arguments `kwargs`."""
    spec = WorkerSpec("role", Placement(), partial(worker, **kwargs))
    with InlineSession("cpu").place([spec], seed=seed, logs_dir=Path) as groups:
        yield groups["role"]


def worker_of(group: Any) -> Any:
    """The worker of a group hosted in this process."""
    return group.worker


def whole_weights(group: Any) -> dict[str, torch.Tensor]:
    """Copies of the whole parameters of a trained worker hosted in this process, by name, whatever the ZeRO stage."""
    parts = zero.whole_parameters(worker_of(group).model, 1)
    return {name: t.clone() for bucket in parts for name, t in bucket.items()}
