"""The roles of `rlhf_dist.roles` over worker groups: split a batch over ranks, call, put the rows back in order.

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

from rlhf_dist.batches import (
    Experience,
    PreferenceBatch,
    PromptBatch,
    RolloutBatch,
    SequenceBatch,
    StepShare,
    TextShare,
    TokenBatch,
    UpdateReport,
    concat_rows,
)
from rlhf_dist.cluster.futures import mapped
from rlhf_dist.cluster.group import WorkerGroup
from rlhf_dist.cluster.partition import MicroBatching, partition
from rlhf_dist.cluster.reports import (
    LM_METRICS,
    POLICY_METRICS,
    RM_METRICS,
    VALUE_METRICS,
    MetricNames,
    Shares,
    by_step,
    update_report,
)
from rlhf_dist.config import ModelHost
from rlhf_dist.errors import TrainingError


class _Role:
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
        picks = [_pick_rows([share]) for share in shares]
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


class _TrainedRole(_Role):
    """Checkpoints and saving."""

    def save_checkpoint(self, path: Path) -> Future[None]:
        """See `roles.Trained`."""
        return _nothing(self.group.call("save_checkpoint", path))

    def load_checkpoint(self, path: Path) -> Future[None]:
        """See `roles.Trained`."""
        return _nothing(self.group.call("load_checkpoint", path))

    def save_model(self, path: Path) -> Future[None]:
        """See `roles.Trained`."""
        return _nothing(self.group.call("save_model", path))

    def save_adapter(self, path: Path) -> Future[None]:
        """See `roles.Trained`."""
        return _nothing(self.group.call("save_adapter", path))

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
        picks = [_pick_rows([share]) for share in shares]
        calls = [(batch.rows(rows), local[0], count, step) for rows, local in picks]
        return mapped(
            self.group.scatter("update", calls),
            lambda ranks: update_report(self.group.role, [ranks], {term: [count]}, {term: [shares]}, names),
        )


class LanguageModelRole(_TrainedRole):
    """`roles.LanguageModel`."""

    def update(
        self, batch: TokenBatch, step: int, text: TokenBatch | None = None, text_coef: float = 0.0
    ) -> Future[UpdateReport]:
        """See `roles.LanguageModel`."""
        if text is None:
            return self.one_step(batch, batch.lengths, "lm", batch.num_targets, step, LM_METRICS)
        batches = {"lm": batch, "pretraining": text}
        counts = {term: [part.num_targets] for term, part in batches.items()}
        shares = {term: [self.split(part.lengths)] for term, part in batches.items()}
        calls = []
        for rank in range(self.group.num_ranks):
            rows, local = _pick_rows([shares["lm"][0][rank]])
            text_rows, text_local = _pick_rows([shares["pretraining"][0][rank]])
            share = TextShare(text.rows(text_rows), text_local[0], text.num_targets, text_coef)
            calls.append((batch.rows(rows), local[0], batch.num_targets, step, share))
        return mapped(
            self.group.scatter("update", calls),
            lambda ranks: update_report(self.group.role, [ranks], counts, shares, LM_METRICS),
        )

    def evaluate(self, batch: TokenBatch) -> Future[dict[str, float]]:
        """See `roles.LanguageModel`."""
        return _evaluate_nll(self, batch)


class PreferenceModelRole(_TrainedRole):
    """`roles.PreferenceModel`."""

    def update(self, batch: PreferenceBatch, step: int) -> Future[UpdateReport]:
        """See `roles.PreferenceModel`."""
        longest = batch.lengths.amax(1)
        return self.one_step(batch, longest, "rm", len(batch), step, RM_METRICS, num_sequences=batch.num_responses)

    def score_pairs(self, batch: PreferenceBatch) -> Future[Tensor]:
        """See `roles.PreferenceModel`."""
        return self.map_rows("score_pairs", batch, batch.lengths.amax(1), num_sequences=batch.num_responses)


class PolicyRole(_TrainedRole):
    """`roles.Policy`."""

    def logprobs(self, rollout: RolloutBatch) -> Future[Tensor]:
        """See `roles.Policy`."""
        return self.map_rows("logprobs", rollout, rollout.lengths)

    def update(
        self,
        experience: Experience,
        steps: Sequence[Tensor],
        ptx: Sequence[TokenBatch] | None,
        kl_loss_coef: float = 0.0,
        measure_terms: bool = False,
    ) -> Future[UpdateReport]:
        """See `roles.Policy`."""
        shares = {"ppo": [_shares_of_step(self, experience.lengths, rows) for rows in steps]}
        counts = {"ppo": [int(experience.response_lengths[rows].sum()) for rows in steps]}
        if ptx is not None:
            shares["ptx"] = [self.split(batch.lengths) for batch in ptx]
            counts["ptx"] = [batch.num_targets for batch in ptx]
        calls = []
        for rank in range(self.group.num_ranks):
            rows, local = _pick_rows([step[rank] for step in shares["ppo"]])
            ptx_picks = [_pick_rows([step[rank]]) for step in shares.get("ptx", [])]
            rank_steps = [
                StepShare(
                    micro_batches=local[i],
                    num_tokens=counts["ppo"][i],
                    ptx_micro_batches=ptx_picks[i][1][0] if ptx_picks else [],
                    num_ptx_targets=counts["ptx"][i] if ptx_picks else 0,
                )
                for i in range(len(steps))
            ]
            rank_ptx = [b.rows(p[0]) for b, p in zip(ptx, ptx_picks, strict=True)] if ptx is not None else None
            calls.append((experience.rows(rows), rank_steps, rank_ptx, kl_loss_coef, measure_terms))
        return mapped(
            self.group.scatter("update_ppo", calls),
            lambda ranks: update_report(self.group.role, by_step(ranks), counts, shares, POLICY_METRICS),
        )

    def save_average(self, path: Path) -> Future[None]:
        """See `roles.Policy`."""
        return _nothing(self.group.call("save_average", path))


class ValueRole(_TrainedRole):
    """`roles.ValueFunction`."""

    def values(self, rollout: RolloutBatch) -> Future[Tensor]:
        """See `roles.ValueFunction`."""
        return self.map_rows("values", rollout, rollout.lengths)

    def update(self, experience: Experience, steps: Sequence[Tensor]) -> Future[UpdateReport]:
        """See `roles.ValueFunction`."""
        shares = [_shares_of_step(self, experience.lengths, rows) for rows in steps]
        counts = [int(experience.response_lengths[rows].sum()) for rows in steps]
        calls = []
        for rank in range(self.group.num_ranks):
            rows, local = _pick_rows([step[rank] for step in shares])
            rank_steps = [StepShare(micro, count) for micro, count in zip(local, counts, strict=True)]
            calls.append((experience.rows(rows), rank_steps))
        return mapped(
            self.group.scatter("update", calls),
            lambda ranks: update_report(
                self.group.role, by_step(ranks), {"value": counts}, {"value": shares}, VALUE_METRICS
            ),
        )


class ReferenceRole(_Role):
    """`roles.Reference` and `roles.LanguageModelScorer`."""

    def logprobs(self, rollout: RolloutBatch) -> Future[Tensor]:
        """See `roles.Reference`."""
        return self.map_rows("logprobs", rollout, rollout.lengths)

    def evaluate(self, batch: TokenBatch) -> Future[dict[str, float]]:
        """See `roles.LanguageModelScorer`."""
        return _evaluate_nll(self, batch)


class RewardRole(_Role):
    """`roles.RewardScorer`."""

    def score(self, sequences: SequenceBatch) -> Future[Tensor]:
        """See `roles.RewardScorer`."""
        return self.map_rows("score", sequences, sequences.lengths)


class RolloutRole(_Role):
    """`roles.RolloutEngine`."""

    def generate(self, prompts: PromptBatch, *, stream: str, iteration: int) -> Future[RolloutBatch]:
        """See `roles.RolloutEngine`."""
        picks = [_pick_rows([share]) for share in self.split(prompts.lengths)]
        calls = [(prompts.rows(rows), local[0], stream, iteration) for rows, local in picks]
        order = torch.argsort(torch.tensor([row for rows, _ in picks for row in rows]))

        def merge(parts: list[RolloutBatch | None]) -> RolloutBatch:
            whole = [part for part in parts if part is not None]
            versions = {part.policy_version for part in whole}
            if len(versions) != 1:
                raise TrainingError(
                    f"rollout engines answered with weights of versions {sorted(versions)}; sync them first"
                )
            return concat_rows(whole).rows(order)

        return mapped(self.group.scatter("generate", calls), merge)


class GroupWeightSync:
    """`roles.WeightSync`: rank 0 of the policy → every rollout engine, a bucket at a time."""

    def __init__(self, policy: WorkerGroup, rollout: WorkerGroup) -> None:
        self.policy = policy
        self.rollout = rollout

    def push(self, version: int) -> Future[None]:
        """See `roles.WeightSync`."""
        num_buckets = self.policy.call("num_buckets").result()[0]
        for index in range(num_buckets):
            # One bucket at a time: neither the object store nor a rank ever holds two.
            self.policy.pipe("export_bucket", (index,), self.rollout, "load_bucket").result()
        sent = self.policy.call("export_checksum").result()[0]

        def check(answers: list[tuple[int, int]]) -> None:
            wrong = [rank for rank, answer in enumerate(answers) if answer != (version, sent)]
            if wrong:
                raise TrainingError(
                    f"after the sync of version {version} (checksum {sent}), rollout ranks {wrong} report "
                    f"{[answers[rank] for rank in wrong]}; the run cannot go on with stale weights"
                )

        return mapped(self.rollout.call("finish_sync", version), check)


def _nothing(future: Future[Any]) -> Future[None]:
    return mapped(future, lambda _: None)


def _evaluate_nll(role: _Role, batch: TokenBatch) -> Future[dict[str, float]]:
    picks = [_pick_rows([share]) for share in role.split(batch.lengths)]
    future = role.group.scatter("evaluate", [(batch.rows(rows), local[0]) for rows, local in picks])
    return mapped(future, lambda ranks: {key: sum(rank[key] for rank in ranks) for key in ranks[0]})


def _shares_of_step(role: _Role, lengths: Tensor, rows: Tensor) -> Shares:
    """The rows of one optimiser step, split; as row numbers of the whole experience."""
    return [[[int(rows[i]) for i in micro] for micro in share] for share in role.split(lengths[rows])]


def _pick_rows(shares: list[list[list[int]]]) -> tuple[list[int], list[list[list[int]]]]:
    """The rows a rank needs (each once, in order), and its micro-batches in terms of them."""
    rows = sorted({row for share in shares for micro in share for row in micro})
    place = {row: i for i, row in enumerate(rows)}
    return rows, [[[place[row] for row in micro] for micro in share] for share in shares]
