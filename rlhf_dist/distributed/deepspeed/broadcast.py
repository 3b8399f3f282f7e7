"""Weights from rank 0 of the policy straight to the rollout engines: a process group of their own, beside those of the roles.

Buckets are flat buffers of bytes, one broadcast each, and at most two are under way: one is gathered (or loaded) while the
other travels. On GPUs it is NCCL from memory to memory; on CPUs gloo.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_ALIGNMENT = 16
"""Bytes: parameters of any dtype begin at multiples of it."""


class TensorSpec(NamedTuple):
    """A parameter to come."""

    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def padded_bytes(self) -> int:
        """What it takes in a buffer."""
        return -(-self.num_bytes // _ALIGNMENT) * _ALIGNMENT


class WeightGroup:
    """One end of the broadcasts: rank 0 sends, the others receive."""

    def __init__(self, name: str, rank: int, size: int, device: str, timeout_s: float, address: str, port: int) -> None:
        """Meet the others; blocks until all are there.

        Args:
            name: of this group, new for every group that rank 0 makes.
            rank, size: of this process; 0 sends.
            device: cpu or cuda.
            timeout_s: of meeting and of every broadcast.
            address, port: of the store that rank 0 has opened (`process_group.open_rendezvous`).
        """
        timeout = timedelta(seconds=timeout_s)
        if rank == 0:
            address = "127.0.0.1"
        meeting = dist.TCPStore(address, port, None, is_master=False, timeout=timeout)  # pyright: ignore
        store = dist.PrefixStore(f"weights {name}", meeting)  # pyright: ignore[reportPrivateImportUsage]
        self._device = torch.device(device)
        self._group: Any
        if device == "cuda":
            options = dist.ProcessGroupNCCL.Options()  # pyright: ignore
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)  # pyright: ignore
        else:
            self._group = dist.ProcessGroupGloo(store, rank, size, timeout)  # pyright: ignore
        self._options = dist.BroadcastOptions()
        self._options.rootRank = self._options.rootTensor = 0

    def send(self, buckets: Iterable[Sequence[Tensor]]) -> None:
        """Broadcast buckets; a bucket's tensors are copied before the next is asked for.

        Raises:
            RuntimeError: a receiver is gone. All buckets have been asked for even so, for that may be collective.
        """
        under_way: list[tuple[Any, Tensor]] = []
        broken = ""  # not the error: its traceback would keep this frame, and with it the connections
        for tensors in buckets:
            if broken:
                continue
            buffer = _flat(tensors, self._device)
            try:
                if len(under_way) == 2:
                    under_way.pop(0)[0].wait()
                under_way.append((self._broadcast(buffer), buffer))
            except RuntimeError as error:
                broken = str(error)
        try:
            while under_way and not broken:
                under_way.pop(0)[0].wait()
        except RuntimeError as error:
            broken = str(error)
        if broken:
            under_way.clear()
            self.close()
            raise RuntimeError(f"the broadcast of weights broke off ({broken})")

    def receive(self, buckets: Sequence[Sequence[TensorSpec]]) -> Iterator[dict[str, Tensor]]:
        """Name → parameter on the device, a bucket at a time; the next is on its way meanwhile."""
        under_way: list[tuple[Any, Tensor]] = []

        def expect(bucket: Sequence[TensorSpec]) -> None:
            # Not a buffer that is used again: an engine may hold on to some until it has a layer together.
            num_bytes = sum(spec.padded_bytes for spec in bucket)
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            under_way.append((self._broadcast(buffer), buffer))

        for i, bucket in enumerate(buckets):
            if i == 0:
                expect(bucket)
            if i + 1 < len(buckets):
                expect(buckets[i + 1])
            work, buffer = under_way.pop(0)
            work.wait()
            yield dict(zip([spec.name for spec in bucket], _views(buffer, bucket), strict=True))

    def close(self) -> None:
        """Leave: whoever waits for this process is told, by the end of its connections."""
        if self._group is not None and self._device.type == "cuda":
            self._group.abort()
        self._group = None
        gc.collect()

    def _broadcast(self, buffer: Tensor) -> Any:
        return self._group.broadcast([buffer], self._options)


def _flat(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The bytes of the tensors, each from a multiple of `_ALIGNMENT` on."""
    specs = [TensorSpec("", tensor.shape, tensor.dtype) for tensor in tensors]
    buffer = torch.zeros(sum(spec.padded_bytes for spec in specs), dtype=torch.uint8, device=device)
    for part, tensor in zip(_views(buffer, specs), tensors, strict=True):
        part.copy_(tensor)
    return buffer


def _views(buffer: Tensor, specs: Sequence[TensorSpec]) -> list[Tensor]:
    views, start = [], 0
    for spec in specs:
        views.append(buffer[start : start + spec.num_bytes].view(spec.dtype).view(spec.shape))
        start += spec.padded_bytes
    return views
