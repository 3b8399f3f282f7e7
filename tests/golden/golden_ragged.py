"""Random ragged batches, for loops and for tensors."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_dist.core.batches import length_mask

Rows = list[list[float]]
REL, ABS = 1e-5, 1e-6


def close(ours: Tensor | float, expected: float) -> None:
    """fp32 against float64."""
    assert float(ours) == pytest.approx(expected, rel=REL, abs=ABS)


POLICY_OPTIONS = [
    {"clip_range": 0.2},
    {"clip_range": 0.1, "clip_range_high": 0.28},
    {"clip_range": 0.2, "dual_clip": 1.5},
    {"clip_range": 0.2, "clip_range_high": 0.3, "dual_clip": 3.0},
]


class Ragged:
    """Random responses of different lengths, as lists for the loops and padded with rubbish for `rlhf_dist/ppo/`."""

    def __init__(self, seed: int, num: int = 6, longest: int = 9) -> None:
        self.random = random.Random(seed)
        lengths = [1, longest, *(self.random.randint(1, longest) for _ in range(num - 2))]
        self.lengths = torch.tensor(lengths)
        self.mask = length_mask(self.lengths, longest + 2)

    def rows(self, scale: float = 1.0, center: float = 0.0) -> Rows:
        """fp32 numbers: both sides must start from the same."""
        drawn = [[self.random.gauss(center, scale) for _ in range(n)] for n in self.lengths.tolist()]
        return [torch.tensor(row, dtype=torch.float32).tolist() for row in drawn]

    def scores(self, scale: float = 2.0) -> list[float]:
        return torch.tensor([self.random.gauss(0, scale) for _ in self.lengths]).tolist()

    def padded(self, rows: Rows, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, R]; what lies in the padding is neither 0 nor small."""
        out = torch.full(self.mask.shape, 7.5, dtype=dtype)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row, dtype=dtype)
        return out

    def assert_equal(self, ours: Tensor, expected: Rows) -> None:
        assert_close(ours[self.mask], self.padded(expected)[self.mask], rtol=REL, atol=ABS)

    def total(self, function: Callable[..., float], *columns: Rows) -> float:
        """Σ over all tokens of `function` of the columns there."""
        return sum(function(*at) for rows in zip(*columns, strict=True) for at in zip(*rows, strict=True))
