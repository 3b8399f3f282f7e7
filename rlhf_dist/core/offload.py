"""Tensors that wait in host memory while others use the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

Level = Literal["asleep", "weights", "full"]
"""What a role holds of its GPU: nothing; what a forward pass needs; all it has."""
LEVELS: tuple[Level, ...] = ("asleep", "weights", "full")
"""In the order of what they hold."""


class HostCopies:
    """Storages whose bytes are in host memory.

    A storage is emptied and filled again in place, as FSDP does it. So every tensor over it stays what it is: the flat buffers
    that DeepSpeed cuts parameters from, their shards, the views of optimizers, whatever the ZeRO stage.
    """

    def __init__(self) -> None:
        self._copies: list[tuple[torch.UntypedStorage, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._copies)

    def take(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Move the bytes of storages to host memory, and free theirs."""
        for storage in storages:
            source = _bytes_of(storage)
            copy = torch.empty(source.shape, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
            self._copies.append((storage, copy.copy_(source)))
            del source
            storage.resize_(0)

    def give_back(self) -> None:
        """Move all of it back."""
        while self._copies:
            storage, copy = self._copies[-1]
            storage.resize_(copy.numel())
            _bytes_of(storage).copy_(copy)
            self._copies.pop()


class Offloadable:
    """A model's memory, held at the level that its role has now."""

    def __init__(self, device: torch.device) -> None:
        self.level: Level = "full"
        self._device = device
        self._of_weights, self._of_others = HostCopies(), HostCopies()

    def hold(
        self,
        level: Level,
        weights: Callable[[], Iterable[Tensor]],
        all_tensors: Callable[[], Iterable[Tensor]] | None = None,
    ) -> None:
        """Move what is above the level to host memory, and what it has back from there. What is in host memory by
        configuration (DeepSpeed's offload) stays.

        Args:
            weights: tensors that a forward pass needs.
            all_tensors: these and whatever else there is; None: only weights. (Neither is kept: a model that its own memory
                refers to would outlive its last user.)
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # nothing that is moved is still in use, on any stream
        if LEVELS.index(level) < LEVELS.index(self.level):
            self._shrink(level, weights, all_tensors or weights)
        else:
            if level != "asleep":
                self._of_weights.give_back()
            if level == "full":
                self._of_others.give_back()
        self.level = level

    def _shrink(
        self, level: Level, weights: Callable[[], Iterable[Tensor]], all_tensors: Callable[[], Iterable[Tensor]]
    ) -> None:
        of_weights = storages(weights(), self._device)
        if self.level == "full":
            everything = storages(all_tensors(), self._device)
            self._of_others.take(storage for key, storage in everything.items() if key not in of_weights)
        if level == "asleep":
            self._of_weights.take(of_weights.values())
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def storages(tensors: Iterable[Tensor], device: torch.device) -> dict[int, torch.UntypedStorage]:
    """Their distinct storages on a kind of device, by address of the object. Without those that cannot be resized (maps of
    files), and empty ones."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        if tensor.device.type == device.type:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.resizable():
                found[storage._cdata] = storage
    return found


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore[reportArgumentType, reportCallIssue]
