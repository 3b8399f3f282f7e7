"""Counter-based randomness: a draw is a function of what it is for, not of how many draws came before.

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps (key, counter) to random bits. The key
is (run seed, stream name); the counter is (iteration, item, position). Rollouts and shuffles are therefore the same on
any number of ranks and after any resume, and no generator state needs saving.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def _generator(seed: int, stream: str, iteration: int, item: int) -> np.random.Generator:
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest(), "little")
    # Counter words, low to high: position (advanced by Philox itself), item, iteration, unused.
    return np.random.Generator(np.random.Philox(key=key, counter=[0, item, iteration, 0]))


def uniforms(seed: int, stream: str, iteration: int, items: Sequence[int] | Tensor, num: int) -> Tensor:
    """[len(items), num] float64 in [0, 1): entry (i, p) depends only on (seed, stream, iteration, items[i], p)."""
    rows = [_generator(seed, stream, iteration, int(item)).random(num) for item in items]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, num, dtype=torch.float64)


def permutation(seed: int, stream: str, iteration: int, num: int) -> Tensor:
    """[num] int64, a permutation of 0..num-1 that depends only on the arguments."""
    return torch.from_numpy(_generator(seed, stream, iteration, 0).permutation(num))


def derived_seed(seed: int, stream: str, iteration: int, item: int = 0) -> int:
    """A seed in [0, 2^63) for a library that keeps its own generator (dropout)."""
    return int(_generator(seed, stream, iteration, item).integers(0, 2**63))
