"""DeepSpeed configuration, sharded construction, and access to whole parameters."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.config.deepspeed import read_ds_config
from rlhf_dist.config.hosting import Precision
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.models.adapters import PlainParameter, plain_parameters
from rlhf_dist.models.vocabulary import grown

FIRST_LOSS_SCALE = 2.0**16
"""What fp16 gradients are scaled by at the start of a run. Static for DeepSpeed: `TrainEngine` moves it."""


def ds_config(
    *,
    zero_stage: int,
    precision: Precision,
    max_grad_norm: float = 0.0,
    path: Path | None = None,
    num_ranks: int = 1,
) -> dict[str, Any]:
    """The configuration DeepSpeed is started with.

    The accumulation count is 1 whatever the run does: `TrainEngine` marks the boundaries of an optimizer step by hand
    and normalizes by global counts, so DeepSpeed must not divide by anything of its own.

    Args:
        path: a JSON whose sections replace the generated ones, precision apart.
        num_ranks: of the role.
    """
    config: dict[str, Any] = {"zero_optimization": {"stage": zero_stage, "overlap_comm": False}}
    if precision != "fp32" and zero_stage > 0:
        # DeepSpeed would add up micro-batches' gradients in 16 bits, and the result would depend on how many there are.
        # (Without ZeRO it knows no other way.)
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if path is not None:
        config |= read_ds_config(path, zero_stage, precision, num_ranks)
    config["bf16"] = {"enabled": precision == "bf16"}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": FIRST_LOSS_SCALE}
    return config | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def owned_by(owner: object, engine: Any) -> Any:
    """The DeepSpeed engine, destroyed when `owner` is.

    By itself it lives as long as the process, for its gradient hooks hold it, and so do ZeRO's buckets: gigabytes that a later
    run in this process lacks. ZeRO-3's share of the weights stays even so.
    """
    weakref.finalize(owner, engine.destroy).atexit = False
    return engine


def check_precision(precision: Precision, device: str) -> None:
    """Reject, in plain words and before a model is loaded, a precision in which DeepSpeed runs nothing on this device.

    Raises:
        ConfigError: it is fp16, and a processor without fp16 instructions.
    """
    if precision != "fp16":
        return
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if not accelerator.is_fp16_supported():
        raise ConfigError(
            f"precision is fp16, which DeepSpeed does not run on this {device} (a processor without fp16 instructions); use "
            "bf16 or fp32, or a GPU"
        )


@contextlib.contextmanager
def sharded_init(config: dict[str, Any]) -> Iterator[None]:
    """Inside, `from_pretrained` builds and loads a model sharded over the ranks if `config` asks for ZeRO-3.

    The model's buffers are then to be restored: `models.loading.restore_buffers`.
    """
    if config["zero_optimization"]["stage"] == 3:
        from transformers.integrations import deepspeed as hf_deepspeed

        # transformers keeps only a weak reference to this object; the local name keeps it alive for the block.
        handle = hf_deepspeed.HfDeepSpeedConfig(json.loads(json.dumps(config)))
        try:
            yield
        finally:
            hf_deepspeed.unset_hf_deepspeed_config()
            del handle
    else:
        yield


def is_sharded(parameter: nn.Parameter) -> bool:
    """True for a parameter that ZeRO-3 partitions."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Of the parameter as it is when it is whole."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextlib.contextmanager
def whole(parameters: Sequence[nn.Parameter], modifier_rank: int | None = None) -> Iterator[None]:
    """Inside, the parameters are whole on every rank. With `modifier_rank`, what that rank wrote is kept on all."""
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        yield
        return
    import deepspeed  # two seconds to import: processes that shard nothing never pay them

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=modifier_rank):
        yield


def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter to the same value on every rank, sharded or not."""
    with whole([parameter], modifier_rank=0), torch.no_grad():
        parameter.copy_(value.to(parameter.dtype))


def grow_embeddings(model: Any, rows: int) -> None:
    """Give a model's embeddings, and its language-model head, as many rows as there are token ids (`models.vocabulary.grown`).
    What a sharded model had whole is then sharded by DeepSpeed when it takes the model over. Collective under ZeRO-3."""
    if model.config.get_text_config().vocab_size >= rows:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(head, "weight", None) is embedding.weight
    with whole([embedding.weight]):
        embedding.weight = grown(embedding.weight, rows)
    embedding.num_embeddings = rows
    if head is not None:
        with whole([head.weight]):
            head.weight = embedding.weight if tied else grown(head.weight, rows)
        head.out_features = rows
        if getattr(head, "bias", None) is not None:
            with whole([head.bias]):
                head.bias = grown(head.bias, rows)
    model.config.get_text_config().vocab_size = rows
    model.vocab_size = rows


def parameter_buckets(model: nn.Module, bucket_bytes: int) -> list[list[PlainParameter]]:
    """The model's parameters as it has them without adapters, in order, in buckets of about `bucket_bytes`. Tied parameters
    appear once."""
    buckets: list[list[PlainParameter]] = []
    size = 0
    for parameter in plain_parameters(model):
        base = parameter.base
        num_bytes = getattr(base, "ds_numel", base.numel()) * base.element_size()
        if not buckets or size + num_bytes > bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += num_bytes
    return buckets


def whole_parameters(model: nn.Module, bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Name → whole parameter, adapters merged into it, a bucket at a time. Collective: every rank must run it to the end.

    A bucket's tensors are valid until the next one is asked for; at no time is more than one bucket whole.
    """
    for bucket in parameter_buckets(model, bucket_bytes):
        with whole([source for parameter in bucket for source in parameter.sources]):
            yield {parameter.name: parameter.value() for parameter in bucket}
