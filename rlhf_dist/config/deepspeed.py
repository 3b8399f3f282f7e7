"""Reading and checking a user's DeepSpeed JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_dist.errors import ConfigError

OWNED_KEYS = {
    "train_batch_size": "sft.batch_size / reward.batch_size / ppo.mini_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size of the role",
    "gradient_accumulation_steps": "batch_size and micro_batch_size of the run",
    "gradient_clipping": "optimizer.max_grad_norm of the role",
    "optimizer": "optimizer of the role",
    "scheduler": "optimizer.schedule of the role",
    "fp16": "precision of the role (fp32 or bf16)",
    "bfloat16": "precision of the role; DeepSpeed's present name of that section is bf16",
    "amp": "precision of the role (fp32 or bf16)",
    "data_types": "precision of the role: bf16 gradients are added up in fp32",
}
"""DeepSpeed keys that a run's own configuration decides, and where."""


def read_ds_config(path: Path, zero_stage: int, precision: str) -> dict[str, Any]:
    """A DeepSpeed JSON, checked against what the role says.

    Raises:
        ConfigError: no such file, no JSON, a key that the run's own configuration owns, or a ZeRO stage or precision
            other than the role's.
    """
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
            f"ds_config_path {path} is not JSON: line {error.lineno}: {error.msg}; mend that line"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(f"ds_config_path {path} holds a {type(config).__name__}; it must hold a JSON object")
    owned = sorted(OWNED_KEYS.keys() & config.keys())
    if owned:
        where = "; ".join(f"{key} is set by {OWNED_KEYS[key]}" for key in owned)
        raise ConfigError(f"ds_config_path {path} sets {', '.join(owned)}; remove it: {where}")
    for section in ("zero_optimization", "bf16"):
        if not isinstance(config.get(section, {}), dict):
            raise ConfigError(
                f"ds_config_path {path} has {section}: {config[section]!r}; it must be an object such as "
                + ('{"stage": 2}' if section == "zero_optimization" else '{"enabled": true}')
            )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != zero_stage:
        raise ConfigError(
            f"ds_config_path {path} has ZeRO stage {stage} but the role's zero_stage is {zero_stage}; make them equal"
        )
    for part in ("offload_optimizer", "offload_param"):
        device = (config.get("zero_optimization", {}).get(part) or {}).get("device")
        if device == "nvme":
            raise ConfigError(
                f"ds_config_path {path} has {part} on nvme, where gradients cannot be checked before they are applied; offload "
                "to cpu, or shard over more ranks"
            )
    bf16 = bool(config.get("bf16", {}).get("enabled", False))
    if bf16 != (precision == "bf16"):
        raise ConfigError(
            f"ds_config_path {path} has bf16 {'on' if bf16 else 'off'} but the role's precision is {precision}; "
            "make them equal"
        )
    return config
