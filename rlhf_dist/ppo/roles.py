"""Policy and value function as the PPO trainer sees them, over their worker groups."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from torch import Tensor

from rlhf_dist.core.batches import (
    Experience,
    RolloutBatch,
    TokenBatch,
)
from rlhf_dist.core.futures import mapped
from rlhf_dist.core.steps import (
    StepShare,
    UpdateReport,
)
from rlhf_dist.distributed.metrics_reduce import MetricNames, by_step, update_report
from rlhf_dist.distributed.role_groups import TrainedRole, pick_rows, shares_of_step


class PolicyRole(TrainedRole):
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
        shares = {"ppo": [shares_of_step(self, experience.lengths, rows) for rows in steps]}
        counts = {"ppo": [int(experience.response_lengths[rows].sum()) for rows in steps]}
        if ptx is not None:
            shares["ptx"] = [self.split(batch.lengths) for batch in ptx]
            counts["ptx"] = [batch.num_targets for batch in ptx]
        calls = []
        for rank in range(self.group.num_ranks):
            rows, local = pick_rows([step[rank] for step in shares["ppo"]])
            ptx_picks = [pick_rows([step[rank]]) for step in shares.get("ptx", [])]
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


class ValueRole(TrainedRole):
    """`roles.ValueFunction`."""

    def values(self, rollout: RolloutBatch) -> Future[Tensor]:
        """See `roles.ValueFunction`."""
        return self.map_rows("values", rollout, rollout.lengths)

    def update(self, experience: Experience, steps: Sequence[Tensor]) -> Future[UpdateReport]:
        """See `roles.ValueFunction`."""
        shares = [shares_of_step(self, experience.lengths, rows) for rows in steps]
        counts = [int(experience.response_lengths[rows].sum()) for rows in steps]
        calls = []
        for rank in range(self.group.num_ranks):
            rows, local = pick_rows([step[rank] for step in shares])
            rank_steps = [StepShare(micro, count) for micro, count in zip(local, counts, strict=True)]
            calls.append((experience.rows(rows), rank_steps))
        return mapped(
            self.group.scatter("update", calls),
            lambda ranks: update_report(
                self.group.role, by_step(ranks), {"value": counts}, {"value": shares}, VALUE_METRICS
            ),
        )


POLICY_METRICS = MetricNames(
    "policy",
    {
        "policy/loss": ("ppo", "loss"),
        "policy/clip_fraction": ("ppo", "clip_fraction"),
        "policy/dual_clip_fraction": ("ppo", "dual_clip_fraction"),
        "policy/approx_kl": ("ppo", "approx_kl"),
        "policy/ratio_mean": ("ppo", "ratio"),
        "policy/entropy": ("ppo", "entropy"),
        "policy/kl_loss": ("ppo", "kl_loss"),
        "policy/ptx_loss": ("ptx", "loss"),
    },
    num_updates="policy/num_updates",
)


VALUE_METRICS = MetricNames(
    "value", {"value/loss": ("value", "loss"), "value/clip_fraction": ("value", "clip_fraction")}
)
