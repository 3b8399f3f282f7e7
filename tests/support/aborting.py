"""Losses that are not finite for one sample, and what a step that is rejected for it must leave behind: nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_dist.core.batches import TokenBatch
from rlhf_dist.core.steps import NON_FINITE_GRADIENT, NON_FINITE_LOSS
from rlhf_dist.distributed.workers.inference import pick
from support.tiny import whole_weights, worker_of

MICRO = [[0, 1], [2, 3], [4]]
"""Micro-batches of a batch of five rows."""
BAD_ROW = 2
SUSPECT = ("lm", 1, 0)
"""That row, as a step's report names it: row 0 of micro-batch 1."""


class NaNGradient(torch.autograd.Function):
    """x → x, with a gradient of NaN: what a square root at 0 or an overflow in a kernel's backward pass does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * math.nan


def poisoned(worker: Any, batch: TokenBatch, how: Callable[[Any], Any]) -> Callable[[TokenBatch], Any]:
    """The worker's loss, with that of the micro-batch that begins with the batch's bad row changed by `how`."""
    bad, healthy = int(batch.tokens[BAD_ROW, 0]), worker._nll

    def loss(micro: TokenBatch) -> Any:
        total, sums = healthy(micro)
        return (how(total) if int(micro.tokens[0, 0]) == bad else total), sums

    return loss


def lm_term(worker: Any, batch: TokenBatch, how: Callable[[Any], Any] | None = None) -> Any:
    """The batch's term of an optimizer step, poisoned by `how`."""
    made = worker.nll_term("lm", pick(batch, MICRO), batch.num_targets)
    return made if how is None else type(made)(**{**vars(made), "loss_sum": poisoned(worker, batch, how)})


def steps_around_rejections(group: Any, batches: Sequence[TokenBatch], reject: bool) -> tuple[dict[str, Any], Any]:
    """(weights, report) after a step on batch 0 and one on batch 2. With `reject`, steps on batch 1 are rejected in between:
    for a loss and a gradient that are not finite, and by a veto. None of them may touch a weight."""
    worker = worker_of(group)
    engine = worker.engine
    engine.step([lm_term(worker, batches[0])])
    before = whole_weights(group)
    if reject:
        for how, reason in ((lambda x: x * math.inf, NON_FINITE_LOSS), (NaNGradient.apply, NON_FINITE_GRADIENT)):
            report = engine.step([lm_term(worker, batches[1], how)])
            assert (report.aborted, report.suspects) == (reason, [SUSPECT])
        report = engine.step([lm_term(worker, batches[1])], veto=lambda means: f"{means['lm']['loss']:.3f}")
        assert float(report.aborted) > 1
        assert all(torch.equal(t, before[name]) for name, t in whole_weights(group).items())
    last = engine.step([lm_term(worker, batches[2])])
    after = whole_weights(group)
    assert any(not torch.equal(t, before[name]) for name, t in after.items())
    return after, last
