"""A rollout worker that dies where a test asks for it, and a policy that sends its weights in many buckets."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from rlhf_dist.core.errors import DataError, EngineError
from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.weight_sync import WeightSource
from rlhf_dist.distributed.workers.rollout import RolloutWorker
from rlhf_dist.ppo.policy_worker import PolicyWorker


class ManyBucketsPolicy(PolicyWorker):
    """A tiny model is one bucket otherwise."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weights = WeightSource(self.model, bucket_bytes=20_000)


class MortalRolloutWorker(RolloutWorker):
    """A file `orders`/METHOD_RANK says what happens when the rank is next asked for METHOD, and how often: `kill 1`,
    `engine 1` (its engine fails), `data 1` (an error that would repeat)."""

    def __init__(self, *args: Any, context: RankContext, orders: Path, **kwargs: Any) -> None:
        self.rank = context.rank
        self.orders = orders
        self._obey("build")
        super().__init__(*args, context=context, **kwargs)

    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def generate(self, prompts: Any, micro_batches: Any, *args: Any) -> Any:
        """Ends when half of the prompts have their responses."""
        if self._path("generate").exists():
            super().generate(prompts, micro_batches[: len(micro_batches) // 2], *args)
            self._obey("generate")
        return super().generate(prompts, micro_batches, *args)

    def load_bucket(self, bucket: Any) -> None:
        """See `RolloutWorker`."""
        self._obey("load_bucket")
        super().load_bucket(bucket)

    def receive_weights(self, specs: Any) -> None:
        """Ends when the first bucket has been loaded."""
        if not self._path("receive_weights").exists() or self.weight_group is None:
            super().receive_weights(specs)
            return
        next(self.weight_group.receive(specs))
        self._obey("receive_weights")

    def finish_sync(self, version: int) -> tuple[int, int]:
        """See `RolloutWorker`."""
        self._obey("finish_sync")
        return super().finish_sync(version)

    def _path(self, method: str) -> Path:
        return self.orders / f"{method}_{self.rank}"

    def _obey(self, method: str) -> None:
        path = self._path(method)
        if not path.exists():
            return
        what, times = path.read_text().split()
        if times == "1":
            path.unlink()
        else:
            path.write_text(f"{what} {int(times) - 1}")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "engine":
            raise EngineError("the engine's process is gone.")
        raise DataError("a row that no engine can read")
