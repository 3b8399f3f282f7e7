"""A user's DeepSpeed JSON, checked against the role that trains with it.

The file tunes ZeRO and offload. Precision, batch sizes and the optimizer come from the run's configuration: the file
says nothing about them, or (precision only) says the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_dist.core.errors import ConfigError

OWNED_KEYS = {
    "train_batch_size": "sft.batch_size / reward.batch_size / ppo.mini_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size of the role",
    "gradient_accumulation_steps": "batch_size and micro_batch_size of the run",
    "gradient_clipping": "optimizer.max_grad_norm of the role",
    "optimizer": "optimizer of the role",
    "scheduler": "optimizer.schedule of the role",
    "bfloat16": "precision of the role; DeepSpeed's present name of that section is bf16",
    "amp": "precision of the role (fp32, bf16 or fp16)",
    "torch_autocast": "precision of the role (fp32, bf16 or fp16)",
    "data_types": "precision of the role: 16-bit gradients are accumulated in fp32",
}
"""DeepSpeed keys that a run's own configuration decides, and where."""

PRECISION_SECTIONS = {
    "bf16": "master weights, gradient accumulation and optimizer states are in fp32, and no step is skipped",
    "fp16": "the run scales losses itself, so that no step is skipped",
}
"""Sections that may agree with the role's precision, and why they hold nothing but `enabled`."""

UNSUPPORTED_ZERO_KEYS = {
    "cpu_offload": "write offload_optimizer: {device: cpu}, DeepSpeed's present name of it",
    "cpu_offload_param": "write offload_param: {device: cpu}, DeepSpeed's present name of it",
    "cpu_offload_use_pin_memory": "write pin_memory into offload_optimizer and offload_param",
    "zenflow": "it applies a part of the gradient before the whole of it can be checked; remove it",
    "zero_quantized_gradients": "its kernels turn a NaN in the gradient into 0, which hides it from the NaN/Inf guard, and "
    "they expect a process to see all GPUs of its node, where a rank sees its own; remove it (zero_hpz_partition_size and "
    "zero_quantized_weights may stay)",
}
"""Keys of `zero_optimization` that no role can train with, and the remedy."""

NVME = {
    "offload_optimizer": "where gradients are written to files before the NaN/Inf guard sees them",
    "offload_param": "where DeepSpeed 0.19 fails in a forward pass at an assertion of its own ('already assigned swap buffer')",
}
"""Why offload to NVMe is not supported."""


def read_ds_config(path: Path, zero_stage: int, precision: str, num_ranks: int | None = None) -> dict[str, Any]:
    """The settings of a DeepSpeed JSON, checked against the role's; without the precision sections, which can only agree.

    Args:
        num_ranks: of the role; None skips the checks that depend on it.

    Raises:
        ConfigError: no such file, not JSON, a key that the run's own configuration owns, a ZeRO stage or precision other than
            the role's, or ZeRO settings under which a step could not be checked before it is taken.
    """
    config = _read_object(path)
    owned = sorted(OWNED_KEYS.keys() & config.keys())
    if owned:
        where = "; ".join(f"{key} is set by {OWNED_KEYS[key]}" for key in owned)
        raise ConfigError(f"ds_config_path {path} sets {', '.join(owned)}; remove it: {where}")
    _check_precision(path, config, precision)
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(
            f'ds_config_path {path} has zero_optimization: {zero!r}; it must be an object such as {{"stage": 2}}'
        )
    stage = zero.get("stage", 0)
    if stage != zero_stage:
        raise ConfigError(
            f"ds_config_path {path} has ZeRO stage {stage} but the role's zero_stage is {zero_stage}; make them equal"
        )
    for key in sorted(UNSUPPORTED_ZERO_KEYS.keys() & {key for key, value in zero.items() if value}):
        raise ConfigError(f"ds_config_path {path} sets {key}: {UNSUPPORTED_ZERO_KEYS[key]}")
    _check_offload(path, zero)
    _check_partitions(path, zero, num_ranks)
    return {key: value for key, value in config.items() if key not in PRECISION_SECTIONS}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"ds_config_path {path} cannot be read ({error.strerror}); give an existing JSON file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"ds_config_path {path} is not UTF-8 text ({error.reason}); give a JSON file") from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"ds_config_path {path} is not JSON: line {error.lineno}: {error.msg}; fix that line"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(f"ds_config_path {path} holds a {type(config).__name__}; it must hold a JSON object")
    return config


def _check_precision(path: Path, config: dict[str, Any], precision: str) -> None:
    """A precision section is optional, and may only repeat the role's precision."""
    for name, why in PRECISION_SECTIONS.items():
        section = config.get(name, {})
        if not isinstance(section, dict):
            raise ConfigError(
                f"ds_config_path {path} has {name}: {section!r}; remove it (precision of the role decides), or write "
                '{"enabled": true}'
            )
        others = sorted(section.keys() - {"enabled"})
        if others:
            raise ConfigError(f"ds_config_path {path} sets {', '.join(others)} in {name}; remove it: {why}")
        on = section.get("enabled", precision == name)
        if on is not (precision == name):
            raise ConfigError(
                f"ds_config_path {path} has {name}.enabled {json.dumps(on)} but the role's precision is {precision}; "
                f"remove the section {name} from the file, or change precision"
            )


def _check_offload(path: Path, zero: dict[str, Any]) -> None:
    """Offload is to CPU memory, and nothing takes a part of a step on its own."""
    for part in NVME:
        section = zero.get(part) or {}
        if not isinstance(section, dict):
            raise ConfigError(
                f'ds_config_path {path} has {part}: {section!r}; it must be an object such as {{"device": "cpu"}}'
            )
        device, lowest = section.get("device", "none"), 3 if part == "offload_param" else 1
        if device == "nvme":
            raise ConfigError(
                f"ds_config_path {path} has {part} on nvme, {NVME[part]}; offload to cpu, or shard over more ranks"
            )
        if device != "none" and zero.get("stage", 0) < lowest:
            raise ConfigError(
                f"ds_config_path {path} has {part} at ZeRO stage {zero.get('stage', 0)}, which has nothing to offload; "
                f"use stage {lowest} or higher, or remove {part}"
            )
    states = zero.get("offload_optimizer") or {}
    if states.get("super_offload"):
        raise ConfigError(
            f"ds_config_path {path} sets offload_optimizer.super_offload: it takes steps before the whole gradient can be "
            "checked, and takes them back later; remove it"
        )
    if states.get("ratio", 1.0) != 1.0:
        raise ConfigError(
            f"ds_config_path {path} has offload_optimizer.ratio {states['ratio']}: the part that stays on the GPU is stepped "
            "by a second optimizer, which does not follow the role's learning-rate schedule; use ratio 1, or no offload"
        )


def _check_partitions(path: Path, zero: dict[str, Any], num_ranks: int | None) -> None:
    """hpZ and quantized weights change how ZeRO-3 gathers parameters."""
    size = zero.get("zero_hpz_partition_size", 1)
    for key, on in (
        ("zero_hpz_partition_size", size != 1),
        ("zero_quantized_weights", zero.get("zero_quantized_weights")),
    ):
        if on and zero.get("stage", 0) != 3:
            raise ConfigError(
                f"ds_config_path {path} sets {key} at ZeRO stage {zero.get('stage', 0)}, where parameters are not sharded; use "
                "stage 3 or remove it"
            )
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"ds_config_path {path} has zero_hpz_partition_size {size!r}; it must be a number of ranks")
    if num_ranks is not None and num_ranks % size:
        raise ConfigError(
            f"ds_config_path {path} has zero_hpz_partition_size {size}, which does not divide the role's {num_ranks} "
            f"{'rank' if num_ranks == 1 else 'ranks'}; use the number of its ranks on one node, and a num_ranks that is a "
            "multiple of it (cluster: inline hosts one rank)"
        )
