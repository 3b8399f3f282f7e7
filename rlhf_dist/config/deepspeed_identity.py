"""What of a DeepSpeed file belongs to a run's identity, and what to the format of its checkpoints.

Most of such a file is layout: what is sharded, offloaded, overlapped, logged. The role's own settings decide precision,
optimizer and clipping.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LAYOUT = {
    "activation_checkpointing",
    "aio",
    "bf16",
    "checkpoint",
    "comms_logger",
    "csv_monitor",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "fp16",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}
"""Sections that leave the numbers as they are, or repeat what the role says (`bf16`, `fp16`)."""
_ZERO_NUMERICS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
"""Of `zero_optimization`: weights rounded to 8 bits."""
_PARTITIONING = ("round_robin_gradients", "sub_group_size", "zero_hpz_partition_size")
"""Of `zero_optimization`: the order and the groups of parameters in a rank's partition."""


def ds_numerics(path: Path | None) -> dict[str, Any] | None:
    """The sections of a DeepSpeed file that can change a result; None where there are none."""
    config = _read(path)
    found = {key: value for key, value in config.items() if key not in _LAYOUT}
    return found | {key: True for key in _ZERO_NUMERICS if _zero(config).get(key)} or None


def ds_checkpoint_format(path: Path | None) -> dict[str, Any]:
    """What of a DeepSpeed file decides the form of its checkpoints: which optimizer steps where states are offloaded, and what
    orders or groups parameters in the flat partitions that DeepSpeed writes and reads blindly."""
    zero = _zero(_read(path))
    found = {key: zero[key] for key in _PARTITIONING if zero.get(key)}
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key)
        device = section.get("device", "none") if isinstance(section, dict) else "none"
        if device != "none":
            found[key] = device
    return found


def _read(path: Path | None) -> dict[str, Any]:
    """The file; {} where it cannot be read, which the checks of the configuration report."""
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _zero(config: dict[str, Any]) -> dict[str, Any]:
    section = config.get("zero_optimization")
    return section if isinstance(section, dict) else {}
