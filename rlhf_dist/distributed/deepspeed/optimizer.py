"""AdamW of a trained model, torch's or DeepSpeed's own, and the native code that a DeepSpeed configuration needs."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_dist.config.hosting import OptimizerConfig
from rlhf_dist.core.errors import ConfigError

LONGEST_BUILD_S = 900
"""Seconds after which the lock of a compilation (one or two minutes of work) belongs to a process that is gone."""


def uses_cpu_adam(ds_config: dict[str, Any]) -> bool:
    """Whether DeepSpeed's CPUAdam takes the steps: its vector instructions make it several times faster on a CPU than torch."""
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device") == "cpu" and ds_config.get("zero_force_ds_cpu_optimizer", True)


def compile_ops(ds_config: dict[str, Any], device: str) -> None:
    """Compile what the configuration needs of DeepSpeed's native code, before anything large is loaded. The result is kept for
    every later run of this torch on this machine; ranks that need it at the same time wait for the first.

    Raises:
        ConfigError: it cannot be compiled here, or cannot run on `device`.
    """
    if uses_cpu_adam(ds_config):
        _compile(
            "cpu_adam",
            "CPUAdamBuilder",
            "offloads the optimizer to cpu, and DeepSpeed's CPUAdam",
            "install a C++ compiler (g++) and ninja on every node, or set zero_force_ds_cpu_optimizer to false in the "
            "DeepSpeed file: torch's AdamW then steps on the CPU, more slowly",
        )
    if ds_config["zero_optimization"].get("zero_quantized_weights"):
        if device != "cuda":
            raise ConfigError(
                f"the DeepSpeed configuration sets zero_quantized_weights, whose kernels are CUDA's, and device is {device}; "
                "remove it, or use GPUs"
            )
        _compile(
            "quantizer",
            "QuantizerBuilder",
            "sets zero_quantized_weights, and DeepSpeed's quantizer",
            "install a C++ compiler (g++), ninja and the CUDA toolkit (nvcc) of torch's version on every node, or remove "
            "zero_quantized_weights",
        )


def _compile(name: str, builder: str, wish: str, remedy: str) -> None:
    from deepspeed.ops import op_builder  # those of the accelerator, as RankContext.device says

    _wait_for_another_build(name)
    try:
        getattr(op_builder, builder)().load(verbose=False)
    except (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"the DeepSpeed configuration {wish} cannot be compiled here ({_reason(error)}); {remedy}"
        ) from error


def _wait_for_another_build(name: str) -> None:
    """torch waits for ever for the lock of a compilation that was killed. Wait as long as a compilation can take."""
    lock = build_lock(name)
    while lock.exists():
        try:
            age_s = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        if age_s > LONGEST_BUILD_S:
            raise ConfigError(
                f"{lock} is {age_s / 60:.0f} minutes old: it is left from a compilation that was killed, and torch would wait "
                "for it for ever; remove that file"
            )
        time.sleep(1)


def build_lock(name: str) -> Path:
    """The file that is there while torch compiles the extension `name`."""
    from torch.utils import cpp_extension  # half a second to import: only where something is compiled

    return Path(cpp_extension._get_build_directory(name, verbose=False)) / "lock"


def make_optimizer(module: nn.Module, settings: OptimizerConfig, ds_config: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW over what is trained of the module; matrices decay, biases, norms and other 1-D parameters do not. What is frozen
    is not the optimizer's: it has no state, and no weight decay moves it."""
    trained = [p for p in module.parameters() if p.requires_grad]
    decay = [p for p in trained if _num_dims(p) > 1]
    no_decay = [p for p in trained if _num_dims(p) <= 1]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    common: dict[str, Any] = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
    groups = [group for group in groups if group["params"]]
    if not uses_cpu_adam(ds_config):
        return torch.optim.AdamW(groups, **common)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
    optimizer.register_step_pre_hook(_forget_powers)
    return optimizer


def _forget_powers(optimizer: Any, args: Any, kwargs: Any) -> None:
    """CPUAdam keeps β₁ᵗ and β₂ᵗ as running products, outside its state: after a resume it computes them by `pow`, and the two
    differ in their last bits. A new native object knows no products, and computes them from the step in either case."""
    group = optimizer.param_groups[0]
    optimizer.ds_opt_adam.create_adam(
        optimizer.opt_id,
        group["lr"],
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        optimizer.adam_w_mode,
        False,
    )


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, with its cause where it has one."""
    cause = error.__cause__
    said = [str(e).strip().splitlines()[0] for e in (error, cause) if e is not None and str(e).strip()]
    return ": ".join(said) or type(error).__name__


def _num_dims(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))
