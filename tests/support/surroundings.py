"""A hosted class that tells what surrounds it, in place of a model."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rlhf_dist.distributed.deepspeed.process_group import RankContext


class Surroundings:
    """Answers to calls as a worker does."""

    def __init__(self, context: RankContext) -> None:
        self.rank = context.rank
        self.process = os.getpid()

    def variables(self, names: Sequence[str]) -> list[str | None]:
        """Of this process's environment."""
        return [os.environ.get(name) for name in names]

    def answer(self) -> int:
        """The rank."""
        return self.rank
