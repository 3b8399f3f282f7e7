"""The receiving end of a weight transfer: whole parameters, a bucket at a time, into the model of a rollout engine."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.core.errors import TrainingError

_CHECKSUM_WORDS = 2**18


def checksum(name: str, tensor: Tensor) -> Tensor:
    """A number that changes when bits of the tensor change or move: int64 [], where the tensor is, so that nobody waits.

    Σ xᵢ · (2(f + i) + 1) mod 2⁶⁴ over the tensor's bytes as 64-bit words xᵢ (the last filled up with zeros), with f of the
    name. Positions and names are weighted so that swapped elements and swapped parameters are seen; weights are odd, so that no
    bit is multiplied away; int64 wraps around, which is deterministic in any order.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # words must lie on borders of words
    raw = flat.view(torch.uint8)
    num_words = raw.numel() // 8
    first, total = 1 + zlib.crc32(name.encode()), torch.zeros((), dtype=torch.int64, device=raw.device)
    odd = 2 * torch.arange(min(num_words, _CHECKSUM_WORDS), device=raw.device, dtype=torch.int64) + 1
    # A part at a time: the products take as much memory as the words.
    for part in raw[: 8 * num_words].view(torch.int64).split(_CHECKSUM_WORDS):
        total += (part * odd[: len(part)]).sum() + 2 * first * part.sum()
        first += len(part)
    if rest := raw.numel() % 8:
        word = torch.nn.functional.pad(raw[-rest:], (0, 8 - rest)).view(torch.int64)
        total += word[0] * (2 * first + 1)
    return total


class Checksum:
    """The sum over the parameters of a transfer, kept where they are until it is asked for."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """One more parameter."""
        part = checksum(name, tensor)
        self._total = part if self._total is None else self._total + part

    def take(self) -> int:
        """The sum, in [0, 2⁶⁴), from which the next begins at 0. Waits for the device."""
        total, self._total = self._total, None
        return 0 if total is None else int(total) % 2**64


class Arrivals:
    """What of a policy's parameters has arrived: names and shapes are checked, and what is missing is named at the end."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        """`shapes`: of every parameter that the engine's model has."""
        self._shapes = dict(shapes)
        self._received: set[str] = set()
        self._checksum = Checksum()

    def take(self, name: str, tensor: Tensor) -> None:
        """Note a parameter, as it arrived on its device.

        Raises:
            TrainingError: the engine has none of that name and shape.
        """
        shape = self._shapes.get(name)
        if shape != tensor.shape:
            here = "no such parameter" if shape is None else f"shape {tuple(shape)}"
            raise TrainingError(
                f"the policy sent {name} of shape {tuple(tensor.shape)}, for which the rollout engine has {here}; "
                "policy and engine must be the same model"
            )
        self._checksum.add(name, tensor)
        self._received.add(name)

    def finish(self) -> int:
        """The checksum of a whole transfer, ready for the next.

        Raises:
            TrainingError: parameters are missing.
        """
        missing = self._shapes.keys() - self._received
        if missing:
            raise TrainingError(
                f"{len(missing)} of {len(self._shapes)} parameters did not arrive at a rollout engine, {min(missing)} "
                "among them; policy and engine must be the same model"
            )
        self._received = set()
        return self._checksum.take()


class WeightTarget:
    """A whole transformers model that takes over weights."""

    def __init__(self, model: Any) -> None:
        self._parameters = dict(model.named_parameters())
        self._arrivals = Arrivals({name: p.shape for name, p in self._parameters.items()})

    @torch.no_grad()
    def load_bucket(self, bucket: Mapping[str, Tensor]) -> None:
        """Copy a bucket into the model. Errors as `Arrivals.take`."""
        for name, tensor in bucket.items():
            parameter = self._parameters.get(name)
            # Of what arrived on the device, before any cast: it must equal what was sent.
            arrived = tensor if parameter is None else tensor.to(parameter.device)
            self._arrivals.take(name, arrived)
            if parameter is not None:
                parameter.copy_(arrived.to(parameter.dtype))

    def finish(self) -> int:
        """See `Arrivals.finish`."""
        return self._arrivals.finish()
