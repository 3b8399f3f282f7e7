"""Both ends of a weight transfer through host memory: buckets of whole parameters, and a checksum of what arrived.

Bounded by design: the sender gathers, and the receiver holds, one bucket at a time.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.core.errors import TrainingError
from rlhf_dist.distributed.deepspeed import zero

BUCKET_BYTES = 256 * 2**20
_CHECKSUM_WORDS = 2**18


def checksum(name: str, tensor: Tensor) -> int:
    """A number that changes when bits of the tensor change or move; computed where the tensor is.

    Σ xᵢ · (2(f + i) + 1) mod 2⁶⁴ over the tensor's bytes as 64-bit words xᵢ, with f of the name. Positions and names are
    weighted so that swapped elements and swapped parameters are seen; weights are odd, so that no bit is multiplied away;
    int64 wraps around, which is deterministic in any order.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # words must lie on borders of words
    raw = flat.view(torch.uint8)
    num_words = raw.numel() // 8
    first, total = 1 + zlib.crc32(name.encode()), 0
    odd = 2 * torch.arange(min(num_words, _CHECKSUM_WORDS), device=raw.device, dtype=torch.int64) + 1
    # A part at a time: the products take as much memory as the words.
    for part in raw[: 8 * num_words].view(torch.int64).split(_CHECKSUM_WORDS):
        total += int((part * odd[: len(part)]).sum()) + 2 * first * int(part.sum())
        first += len(part)
    rest = int.from_bytes(bytes(raw[8 * num_words :].tolist()), "little")
    return (total + rest * (2 * first + 1)) % 2**64


class WeightSource:
    """The sending end: a (possibly sharded) model; adapters are sent merged into its matrices."""

    def __init__(self, model: nn.Module, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._buckets = zero.parameter_buckets(model, bucket_bytes)
        self._checksum = 0

    @property
    def num_buckets(self) -> int:
        """How many buckets hold the model."""
        return len(self._buckets)

    def bucket(self, index: int, wanted: bool = True) -> dict[str, Tensor]:
        """Name → whole parameter, copied to host memory; empty where it is not wanted. Collective under ZeRO-3."""
        if index == 0:
            self._checksum = 0
        bucket = self._buckets[index]
        with zero.whole([source for parameter in bucket for source in parameter.sources]):
            values = {parameter.name: parameter.value() for parameter in bucket} if wanted else {}
            # Of the weights where they are computed with, so that copies are checked, too, and a GPU does the sums.
            self._checksum += sum(checksum(name, value) for name, value in values.items())
            return {name: value.to("cpu", copy=True) for name, value in values.items()}

    def checksum(self) -> int:
        """Sum over all parameters sent since bucket 0."""
        return self._checksum


class WeightTarget:
    """The receiving end: a whole model in a rollout engine."""

    def __init__(self, model: Any) -> None:
        self._parameters = dict(model.named_parameters())
        self._received: set[str] = set()
        self._checksum = 0

    @torch.no_grad()
    def load_bucket(self, bucket: dict[str, Tensor]) -> None:
        """Copy a bucket into the model."""
        for name, tensor in bucket.items():
            parameter = self._parameters.get(name)
            if parameter is None or parameter.shape != tensor.shape:
                here = "no such parameter" if parameter is None else f"shape {tuple(parameter.shape)}"
                raise TrainingError(
                    f"the policy sent {name} of shape {tuple(tensor.shape)}, for which the rollout engine has {here}; "
                    "policy and engine must be the same model"
                )
            # Of what arrived on the device, before any cast: it must equal what was sent.
            arrived = tensor.to(parameter.device)
            self._checksum += checksum(name, arrived)
            parameter.copy_(arrived.to(parameter.dtype))
            self._received.add(name)

    def finish(self) -> int:
        """The checksum of a whole transfer, ready for the next.

        Raises:
            TrainingError: parameters are missing.
        """
        missing = self._parameters.keys() - self._received
        if missing:
            raise TrainingError(
                f"{len(missing)} of {len(self._parameters)} parameters did not arrive at a rollout engine, {min(missing)} "
                "among them; policy and engine must be the same model"
            )
        total, self._checksum = self._checksum, 0
        self._received = set()
        return total
