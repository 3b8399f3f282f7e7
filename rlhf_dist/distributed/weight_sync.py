"""The sending end of a weight transfer: buckets of whole parameters, gathered from their shards, and their checksum.

Bounded by design: the sender gathers, and the receiver (`rollout/weights.py`) holds, a bucket or two at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from rlhf_dist.distributed.deepspeed import zero
from rlhf_dist.distributed.deepspeed.broadcast import TensorSpec
from rlhf_dist.rollout.weights import Checksum

BUCKET_BYTES = 256 * 2**20


class WeightSource:
    """The sending end: a (possibly sharded) model; adapters are sent merged into its matrices."""

    def __init__(self, model: nn.Module, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._buckets = zero.parameter_buckets(model, bucket_bytes)
        self._checksum = Checksum()

    @property
    def num_buckets(self) -> int:
        """How many buckets hold the model."""
        return len(self._buckets)

    def specs(self) -> list[list[TensorSpec]]:
        """What is to be sent, by bucket."""
        return [
            [TensorSpec(p.name, zero.whole_shape(p.base), p.base.dtype) for p in bucket] for bucket in self._buckets
        ]

    def bucket(self, index: int, wanted: bool = True) -> dict[str, Tensor]:
        """Name → whole parameter, copied to host memory; empty where it is not wanted. Collective under ZeRO-3."""
        if index == 0:
            self._checksum = Checksum()
        with self._gathered(index, wanted) as values:
            return {name: value.to("cpu", copy=True) for name, value in values.items()}

    def buckets(self, wanted: bool = True) -> Iterator[list[Tensor]]:
        """Whole parameters where they are, a bucket at a time, valid until the next is asked for; collective as `bucket`."""
        self._checksum = Checksum()
        for index in range(self.num_buckets):
            with self._gathered(index, wanted) as values:
                yield list(values.values())

    @contextlib.contextmanager
    def _gathered(self, index: int, wanted: bool) -> Iterator[dict[str, Tensor]]:
        bucket = self._buckets[index]
        with zero.whole([source for parameter in bucket for source in parameter.sources]):
            values = {parameter.name: parameter.value() for parameter in bucket} if wanted else {}
            # Of the weights where they are computed with, so that copies are checked, too, and a GPU does the sums.
            for name, value in values.items():
                self._checksum.add(name, value)
            yield values

    def checksum(self) -> int:
        """Sum over all parameters sent since bucket 0."""
        return self._checksum.take()
