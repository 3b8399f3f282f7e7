"""Writing a (possibly sharded) model in Hugging Face format."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from rlhf_dist.config.freeze import LoRAConfig
from rlhf_dist.core.errors import ModelError
from rlhf_dist.distributed.deepspeed import zero
from rlhf_dist.models.adapters import adapter_parameters, has_adapters, save_adapter_config

SHARD_BYTES = 4 * 2**30


def save_pretrained(
    model: Any,
    path: Path,
    *,
    is_main: bool,
    parts: Iterator[dict[str, Tensor]] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model` so that transformers loads it as is. Collective: every rank calls it, the main one writes.

    A sharded model is gathered and written a file at a time; it is never whole in one process. Adapters are merged into the
    matrices that they belong to.

    Args:
        parts: buckets of whole parameters by name, to be written instead of the model's own.
    """
    if parts is not None:
        _save_in_parts(model, path, is_main, parts)
    elif has_adapters(model) or any(zero.is_sharded(p) for p in model.parameters()):
        _save_in_parts(model, path, is_main, zero.whole_parameters(model, shard_bytes))
    elif is_main:
        model.save_pretrained(path, safe_serialization=True)


def try_saving(model: Any, tokenizer: Any) -> None:
    """Write and read back, in a temporary folder, what is saved beside the weights.

    transformers validates it then, and a run is not to be lost for it at its end.

    Raises:
        ModelError: transformers cannot save it, or cannot load what it saved.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            _save_configs(model, Path(folder))
            tokenizer.save_pretrained(folder)
            AutoConfig.from_pretrained(folder)
            AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # transformers, tokenizers and templates each raise their own kinds
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ModelError(
                f"the model of {model.config.name_or_path!r} could not be saved after training: {reason} "
                "Fix its config.json, generation_config.json or tokenizer files"
            ) from error


def save_adapter(model: Any, config: LoRAConfig, base_model: str, path: Path, *, is_main: bool) -> None:
    """Write the adapters (and a scalar head) by themselves, as peft loads them onto `base_model`. Collective: every rank calls
    it, the main one writes."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in adapter_parameters(model):
        with zero.whole([parameter]):
            if is_main:
                tensors[name] = parameter.detach().to("cpu", copy=True).contiguous()
    if is_main:
        path.mkdir(parents=True, exist_ok=True)
        save_adapter_config(model, config, base_model, path)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def _save_in_parts(model: Any, path: Path, is_main: bool, parts: Iterator[dict[str, Tensor]]) -> None:
    if is_main:
        path.mkdir(parents=True, exist_ok=True)
        _save_configs(model, path)
    files: list[tuple[Path, list[str], int]] = []
    for tensors in parts:
        if is_main:
            files.append(_write_shard(path, len(files), tensors))
    if is_main:
        _finish_shards(path, files, _persistent_buffers(model))


def _save_configs(model: Any, path: Path) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.dtype = next(model.parameters()).dtype
    model.config.save_pretrained(path)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(path)


def _write_shard(path: Path, index: int, tensors: dict[str, Tensor]) -> tuple[Path, list[str], int]:
    part = path / f"part-{index:05d}.safetensors"
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, part, metadata={"format": "pt"})
    return part, list(tensors), sum(t.numel() * t.element_size() for t in tensors.values())


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers are no part of adapters, so that names stay."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: t for name, t in model.state_dict().items() if name not in parameters}


def _finish_shards(path: Path, files: list[tuple[Path, list[str], int]], buffers: dict[str, Tensor]) -> None:
    """Give the parts the names that transformers looks for, which hold their total number."""
    if buffers:
        files.append(_write_shard(path, len(files), buffers))
    if len(files) == 1:
        files[0][0].rename(path / "model.safetensors")
        return
    weight_map = {}
    for i, (part, names, _) in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        part.rename(path / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": sum(size for *_, size in files)}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
