"""Optimizer states in CPU memory: DeepSpeed's CPUAdam, compiled and stepped for real, against torch's AdamW."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from support.aborting import steps_around_rejections
from support.tiny import hosted, token_batch, trained, whole_weights, worker_of

from rlhf_dist.config.hosting import OptimizerConfig
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.distributed.deepspeed import optimizer
from rlhf_dist.distributed.deepspeed.optimizer import compile_ops, make_optimizer, uses_cpu_adam
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.sft.roles import LanguageModelRole

LM = LanguageModelWorker
BATCHES = [token_batch([9, 4, 13, 6, 7], seed=step) for step in range(8)]
LAYOUTS = [(1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}

has_compiler = pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "c++")) and shutil.which("ninja")),
    reason="no C++ compiler or no ninja: DeepSpeed's CPUAdam cannot be compiled",
)


def written(folder: Path, stage: int, precision: str, *, cpu_adam: bool = True) -> Path:
    """A DeepSpeed file that offloads the optimizer."""
    zero = {"stage": stage, "overlap_comm": False, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    config = {"zero_optimization": zero, "bf16": {"enabled": precision == "bf16"}}
    if not cpu_adam:
        config["zero_force_ds_cpu_optimizer"] = False
    file = folder / f"cpu_adam_{cpu_adam}.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


def role_config(model: Path, file: Path, stage: int, precision: str, **optimizer):
    return trained(model, zero_stage=stage, precision=precision, ds_config_path=file, optimizer=optimizer)


@has_compiler
@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_it_takes_the_steps_of_torch_adamw(tiny_lm: Path, tmp_path: Path, stage: int, precision: str):
    """With weight decay, warm-up and clipping in every step; and bit by bit the same after a resume in the middle."""
    results = {}
    for name in ("torch", "cpu", "resumed"):
        file = written(tmp_path, stage, precision, cpu_adam=name != "torch")
        # 1e-8 would turn gradients that are 0 but for rounding into steps of full length.
        config = role_config(tiny_lm, file, stage, precision, eps=1e-5)
        with hosted(LM, config=config, num_steps=8) as group:
            role = LanguageModelRole(group, 2)
            kind = DeepSpeedCPUAdam if name != "torch" else torch.optim.AdamW
            assert isinstance(worker_of(group).engine._engine.optimizer.optimizer, kind)
            if name == "resumed":
                role.load_checkpoint(tmp_path / "model").result()
            metrics = []
            for step in range(5 if name == "resumed" else 0, 8):
                if step == 5 and name == "cpu":
                    role.save_checkpoint(tmp_path / "model").result()
                metrics.append(role.update(BATCHES[step], step).result().metrics)
            results[name] = (metrics, whole_weights(group))
    (torch_metrics, torch_weights), (cpu_metrics, cpu_weights), (metrics, weights) = results.values()
    assert max(m["train/grad_norm"] for m in cpu_metrics) > 1.5  # clipping takes part
    exact = precision == "fp32"
    for key in ("sft/loss", "train/grad_norm", "train/learning_rate"):
        tolerance = 1e-5 if exact else 2e-2
        assert [m[key] for m in cpu_metrics] == pytest.approx([m[key] for m in torch_metrics], rel=tolerance)
    for name, tensor in torch_weights.items():
        difference = (cpu_weights[name].float() - tensor.float()).abs()
        assert difference.max() < 1e-5 if exact else difference.mean() < 1e-4, name
    assert metrics == cpu_metrics[5:]
    assert all(torch.equal(weights[name], tensor) for name, tensor in cpu_weights.items())


@has_compiler
@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_an_aborted_step_leaves_no_trace(tiny_lm: Path, tmp_path: Path, stage: int, precision: str):
    results = []
    config = role_config(tiny_lm, written(tmp_path, stage, precision), stage, precision)
    for reject in (False, True):
        with hosted(LM, config=config, num_steps=3) as group:
            results.append(steps_around_rejections(group, BATCHES, reject))
    (expected, report), (weights, other) = results
    assert other.grad_norm == report.grad_norm
    assert all(torch.equal(t, expected[name]) for name, t in weights.items())


@has_compiler
def test_matrices_decay_and_vectors_do_not(tmp_path: Path):
    module = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in module.parameters()]
    settings = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    adam = make_optimizer(module, settings, OFFLOADED)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    assert torch.allclose(module.weight, before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(module.bias, before[1])


def test_the_file_chooses():
    chosen = OFFLOADED | {"zero_force_ds_cpu_optimizer": False}
    assert uses_cpu_adam(OFFLOADED)
    assert not uses_cpu_adam(chosen)
    assert not uses_cpu_adam({"zero_optimization": {"stage": 2}})
    assert not uses_cpu_adam({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}})
    assert isinstance(make_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(), chosen), torch.optim.AdamW)


def test_without_a_compiler_the_run_is_rejected_before_the_model_loads(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from deepspeed.ops.op_builder.builder import OpBuilder

    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(
        "rlhf_dist.distributed.workers.trained.load_causal_lm", lambda *_: pytest.fail("the model was loaded")
    )
    config = role_config(tiny_lm, written(tmp_path, 2, "fp32"), 2, "fp32")
    said = r"CPUAdam cannot be compiled here \(.*\); install a C\+\+ compiler .* ninja .* zero_force_ds_cpu_optimizer"
    with pytest.raises(ConfigError, match=said), hosted(LM, config=config, num_steps=3):
        pass


def test_a_lock_that_a_killed_compilation_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = optimizer.build_lock("cpu_adam")
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    with pytest.raises(ConfigError, match=rf"{lock} is 60 minutes old: .* remove that file"):
        compile_ops(OFFLOADED, "cpu")


def test_quantized_weights_need_a_gpu():
    config = {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}
    with pytest.raises(
        ConfigError, match=r"zero_quantized_weights, whose kernels are CUDA's, and device is cpu; remove it"
    ):
        compile_ops(config, "cpu")
