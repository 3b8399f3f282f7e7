"""The roles of `rlhf_dist.core.roles` over worker groups: split a batch over ranks, call, put the rows back in order.

The same code for Ray actors and for this process. Sums that ranks report are added here, in rank order, and divided by
global counts, so a metric does not depend on the split either.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from rlhf_dist.config.hosting import ModelHost
from rlhf_dist.core.batches import RolloutBatch, SequenceBatch, TokenBatch
from rlhf_dist.core.futures import mapped
from rlhf_dist.core.steps import UpdateReport
from rlhf_dist.distributed.group import WorkerGroup
from rlhf_dist.distributed.metrics_reduce import MetricNames, Shares, update_report
from rlhf_dist.distributed.partition import MicroBatching, partition


class Role:
    """A group and what its micro-batches may hold."""

    def __init__(self, group: WorkerGroup, micro_batches: int | MicroBatching) -> None:
        self.group = group
        self.micro_batches = micro_batches

    @classmethod
    def of(cls, group: WorkerGroup, model: ModelHost) -> Self:
        """The role of a hosted model."""
        return cls(group, MicroBatching(model.micro_batch_size, model.micro_batch_tokens, model.packed))

    def split(self, lengths: Sequence[int] | Tensor, num_sequences: int | Tensor = 1) -> Shares:
        """Rows to ranks and micro-batches. `num_sequences`: that each row puts into a forward pass."""
        return partition(lengths, self.group.num_ranks, self.micro_batches, num_sequences)

    def map_rows(
        self, method: str, batch: Any, lengths: Tensor, *args: Any, num_sequences: int | Tensor = 1
    ) -> Future[Tensor]:
        """Call `method(rows, micro_batches, *args)` on every rank; its [rows, ...] results in the batch's row order."""
        shares = self.split(lengths, num_sequences)
        picks = [pick_rows([share]) for share in shares]
        calls = [(batch.rows(rows), local[0], *args) for rows, local in picks]

        def merge(results: list[Tensor]) -> Tensor:
            width = [max(r.shape[d] for r in results) for d in range(1, results[0].dim())]
            merged = torch.zeros(len(batch), *width)
            for (rows, _), result in zip(picks, results, strict=True):
                if rows:
                    region = (torch.tensor(rows), *(slice(0, n) for n in result.shape[1:]))
                    merged[region] = result
            return merged

        return mapped(self.group.scatter(method, calls), merge)


class TrainedRole(Role):
    """Checkpoints and saving."""

    def save_checkpoint(self, path: Path) -> Future[None]:
        """See `roles.Trained`."""
        return nothing(self.group.call("save_checkpoint", path))

    def load_checkpoint(self, path: Path) -> Future[None]:
        """See `roles.Trained`."""
        return nothing(self.group.call("load_checkpoint", path))

    def save(self, folder: Path) -> Future[None]:
        """See `roles.Trained`."""
        return nothing(self.group.call("save", folder))

    def one_step(
        self,
        batch: Any,
        lengths: Tensor,
        term: str,
        count: int,
        step: int,
        names: MetricNames,
        num_sequences: int | Tensor = 1,
    ) -> Future[UpdateReport]:
        """Call `update(rows, micro_batches, count, step)` on every rank."""
        shares = self.split(lengths, num_sequences)
        picks = [pick_rows([share]) for share in shares]
        calls = [(batch.rows(rows), local[0], count, step) for rows, local in picks]
        return mapped(
            self.group.scatter("update", calls),
            lambda ranks: update_report(self.group.role, [ranks], {term: [count]}, {term: [shares]}, names),
        )


class ReferenceRole(Role):
    """`roles.Reference` and `roles.LanguageModelScorer`."""

    def logprobs(self, rollout: RolloutBatch) -> Future[Tensor]:
        """See `roles.Reference`."""
        return self.map_rows("logprobs", rollout, rollout.lengths)

    def evaluate(self, batch: TokenBatch) -> Future[dict[str, float]]:
        """See `roles.LanguageModelScorer`."""
        return evaluate_nll(self, batch)


class RewardRole(Role):
    """`roles.RewardScorer`."""

    def score(self, sequences: SequenceBatch) -> Future[Tensor]:
        """See `roles.RewardScorer`."""
        return self.map_rows("score", sequences, sequences.lengths)


def nothing(future: Future[Any]) -> Future[None]:
    return mapped(future, lambda _: None)


def evaluate_nll(role: Role, batch: TokenBatch) -> Future[dict[str, float]]:
    picks = [pick_rows([share]) for share in role.split(batch.lengths)]
    future = role.group.scatter("evaluate", [(batch.rows(rows), local[0]) for rows, local in picks])
    return mapped(future, lambda ranks: {key: sum(rank[key] for rank in ranks) for key in ranks[0]})


def shares_of_step(role: Role, lengths: Tensor, rows: Tensor) -> Shares:
    """The rows of one optimizer step, split; as row numbers of the whole experience."""
    return [[[int(rows[i]) for i in micro] for micro in share] for share in role.split(lengths[rows])]


def pick_rows(shares: list[list[list[int]]]) -> tuple[list[int], list[list[list[int]]]]:
    """The rows a rank needs (each once, in order), and its micro-batches in terms of them."""
    rows = sorted({row for share in shares for micro in share for row in micro})
    place = {row: i for i, row in enumerate(rows)}
    return rows, [[[place[row] for row in micro] for micro in share] for share in shares]
