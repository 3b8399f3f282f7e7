"""What the ranks report of optimizer steps → what a trainer is told, in numbers that do not depend on the split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rlhf_dist.core.errors import SampleError, TrainingError
from rlhf_dist.core.steps import EARLY_STOP_KL, NON_FINITE_GRADIENT, NON_FINITE_LOSS, StepReport, UpdateReport

Shares = list[list[list[int]]]
"""Rank → micro-batch → rows."""


class MetricNames(NamedTuple):
    """What becomes of a role's reports."""

    prefix: str
    """Of its gradient norm and learning rate."""
    sums: dict[str, tuple[str, str]]
    """Metric → (loss term, sum) of a `StepReport`."""
    num_updates: str = ""
    """Metric for the number of optimizer steps taken, where a role reports one."""


def by_step(ranks: list[list[StepReport]]) -> list[list[StepReport]]:
    """Rank → step becomes step → rank."""
    return [list(step) for step in zip(*ranks, strict=True)]


def update_report(
    role: str,
    steps: list[list[StepReport]],
    counts: Mapping[str, Sequence[int]],
    shares: Mapping[str, Sequence[Shares]],
    names: MetricNames,
) -> UpdateReport:
    """Mean over the optimizer steps taken of Σ_ranks sum / global count.

    Args:
        role: the model's name, for messages.
        steps: step → rank → report.
        counts: loss term → step → tokens or pairs over all ranks.
        shares: loss term → step → who got which rows.

    Raises:
        SampleError: a loss or the gradient was not finite; names the rows.
        TrainingError: the step was aborted for another reason.
    """
    reason = steps[-1][0].aborted if steps else ""
    if reason and reason != EARLY_STOP_KL:
        raise _aborted_error(role, reason, steps, shares)
    taken = steps[:-1] if reason == EARLY_STOP_KL else steps
    metrics = _means(taken, counts, names.sums)
    if taken:
        metrics[f"{names.prefix}/grad_norm"] = sum(ranks[0].grad_norm for ranks in taken) / len(taken)
        metrics[f"{names.prefix}/learning_rate"] = taken[-1][0].learning_rate
        norms = taken[0][0].term_grad_norms
        if "ptx" in norms:
            metrics["policy/ptx_grad_ratio"] = norms["ptx"] / norms["ppo"] if norms["ppo"] else float("nan")
    if reason == EARLY_STOP_KL:
        last = {name: ppo[len(taken) :] for name, ppo in counts.items()}
        metrics["policy/early_stop_kl"] = _means(steps[-1:], last, {"kl": names.sums["policy/approx_kl"]})["kl"]
    if names.num_updates:
        metrics[names.num_updates] = float(len(taken))
    return UpdateReport(metrics, len(taken))


def _means(
    steps: list[list[StepReport]], counts: Mapping[str, Sequence[int]], names: Mapping[str, tuple[str, str]]
) -> dict[str, float]:
    metrics = {}
    for metric, (term, key) in names.items():
        if steps and any(key in report.sums.get(term, {}) for report in steps[0]):
            per_step = [
                sum(report.sums.get(term, {}).get(key, 0.0) for report in ranks) / counts[term][i]
                for i, ranks in enumerate(steps)
            ]
            metrics[metric] = sum(per_step) / len(per_step)
    return metrics


def _aborted_error(
    role: str, reason: str, steps: list[list[StepReport]], shares: Mapping[str, Sequence[Shares]]
) -> TrainingError:
    number = len(steps) - 1
    if reason not in (NON_FINITE_LOSS, NON_FINITE_GRADIENT):
        return TrainingError(f"{role}: {reason}. The step was not taken and no weight was touched.")
    rows: dict[str, list[int]] = {}
    for rank, report in enumerate(steps[-1]):
        for term, micro, row in report.suspects:
            rows.setdefault(term, []).append(shares[term][number][rank][micro][row])
    rows = {term: sorted(set(numbers)) for term, numbers in rows.items()}
    where = "; ".join(f"{term}: rows {', '.join(map(str, numbers))}" for term, numbers in rows.items())
    return SampleError(
        f"{role}: {reason} in optimizer step {number + 1} of the update ({where}). The step was "
        "not taken and no weight was touched by it. Look at these samples. A resumed run keeps its learning rate "
        "and precision: to lower the one or to use precision: fp32, start a new run.",
        rows,
        step=number,
    )
