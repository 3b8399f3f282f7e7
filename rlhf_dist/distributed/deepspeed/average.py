"""An exponential moving average of the weights, sharded over the ranks whatever the ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.distributed.deepspeed import process_group as distributed
from rlhf_dist.distributed.deepspeed import zero


class WeightAverage:
    """θ_avg ← d · θ_avg + (1 − d) · θ after every optimizer step (Polyak averaging), in fp32.

    θ are the weights the model computes with. Each rank averages its 1/W of every parameter: under ZeRO-3 the shard it
    holds anyway, else the same part of the whole parameter. It costs 4 bytes / W a parameter, and no communication. Not for a
    model with adapters: averages of A and of B make no average of B A.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device) -> None:
        """`device`: where collectives work; offloaded shards are brought there to be gathered."""
        self.model = model
        self.decay = decay
        self.device = device
        self.shards = {name: _shard(p).float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        for name, parameter in self.model.named_parameters():
            self.shards[name].lerp_(_shard(parameter).float(), 1 - self.decay)

    def whole_parameters(self, bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
        """Name → whole averaged parameter in the model's dtype, a bucket at a time. Collective."""
        for bucket in zero.parameter_buckets(self.model, bucket_bytes):
            yield {parameter.name: self._whole(parameter.name, parameter.base) for parameter in bucket}

    def _whole(self, name: str, parameter: nn.Parameter) -> Tensor:
        shape = getattr(parameter, "ds_shape", parameter.shape)
        shard = self.shards[name].to(self.device, parameter.dtype)
        return distributed.gathered_shards(shard)[: shape.numel()].view(shape)

    def save_checkpoint(self, path: Path) -> None:
        """Write this rank's shards beside those of the weights."""
        file = _file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.shards, file)

    def load_checkpoint(self, path: Path) -> None:
        """Read this rank's shards.

        Raises:
            RunFolderError: there are none.
        """
        if not _file(path).is_file():
            raise RunFolderError(f"no average of the weights in {path}; remove that step's folder or use resume: no")
        loaded: dict[str, Any] = load_file(_file(path))
        for name, shard in self.shards.items():
            shard.copy_(loaded[name])


def _file(path: Path) -> Path:
    return path / "average" / f"rank_{distributed.my_rank():05d}.safetensors"


def _shard(parameter: nn.Parameter) -> Tensor:
    """This rank's consecutive 1/W of a flat parameter, the last one padded: how ZeRO-3 cuts it, for all stages."""
    if zero.is_sharded(parameter):
        return parameter.ds_tensor.detach()  # pyright: ignore[reportAttributeAccessIssue]
    flat, ranks = parameter.detach().flatten(), distributed.num_ranks()
    size = -(-flat.numel() // ranks)
    part = flat[distributed.my_rank() * size : (distributed.my_rank() + 1) * size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))
