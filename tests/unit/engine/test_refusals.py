"""Steps that are not taken: what refuses them, what they leave untouched, and what comes after."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.tiny import hosted, token_batch, trained, whole_weights, worker_of

from rlhf_dist.batches import NON_FINITE_GRADIENT, NON_FINITE_LOSS
from rlhf_dist.cluster.proxies import LanguageModelRole
from rlhf_dist.errors import SampleError
from rlhf_dist.workers.passes import pick

LM = "language_model:LanguageModelWorker"
BATCHES = [token_batch([9, 4, 13, 6, 7], seed=step) for step in range(3)]
MICRO = [[0, 1], [2, 3], [4]]
LAYOUTS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


def term(worker, batch, loss=None):
    made = worker.nll_term("lm", pick(batch, MICRO), batch.num_targets)
    return made if loss is None else type(made)(**{**vars(made), "loss_sum": loss})


def poisoned(worker, where: int, how):
    """The worker's loss, with the micro-batch of the given first token changed by `how`."""
    first, healthy = int(BATCHES[1].tokens[where, 0]), worker._nll

    def loss(batch):
        total, sums = healthy(batch)
        return (how(total) if int(batch.tokens[0, 0]) == first else total), sums

    return loss


class FiniteWithNaNGradient(torch.autograd.Function):
    """x → x, with a gradient of NaN: what a square root at 0 or an overflow in a kernel's backward pass does."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * math.nan


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_a_refused_step_leaves_no_trace(tiny_lm: Path, stage: int, precision: str):
    """The step after refused ones is the step that would have been taken without them."""
    results = []
    for refuse in (False, True):
        config = trained(tiny_lm, zero_stage=stage, precision=precision)
        with hosted(LM, config=config, num_steps=3) as group:
            worker = worker_of(group)
            engine = worker.engine
            engine.step([term(worker, BATCHES[0])])
            before = whole_weights(group)
            if refuse:
                infinite = term(worker, BATCHES[1], poisoned(worker, 2, lambda x: x * math.inf))
                nan = term(worker, BATCHES[1], poisoned(worker, 2, FiniteWithNaNGradient.apply))
                for bad, reason in ((infinite, NON_FINITE_LOSS), (nan, NON_FINITE_GRADIENT)):
                    report = engine.step([bad])
                    assert report.refused == reason
                    assert report.suspects == [("lm", 1, 0)]  # row 2 of the batch is row 0 of micro-batch 1
                report = engine.step([term(worker, BATCHES[1])], veto=lambda means: f"{means['lm']['loss']:.3f}")
                assert float(report.refused) > 1
                assert all(torch.equal(t, before[name]) for name, t in whole_weights(group).items())
            last = engine.step([term(worker, BATCHES[2])])
            results.append((whole_weights(group), last.grad_norm, last.learning_rate))
    (expected, *numbers), (actual, *others) = results
    assert others == numbers
    assert all(torch.equal(t, expected[name]) for name, t in actual.items())


@pytest.mark.parametrize("stage", [0, 3])
def test_the_error_names_the_rows(tiny_lm: Path, stage: int):
    with hosted(LM, config=trained(tiny_lm, zero_stage=stage), num_steps=3) as group:
        worker = worker_of(group)
        worker._nll = poisoned(worker, 2, FiniteWithNaNGradient.apply)
        role = LanguageModelRole(group, 2)
        with pytest.raises(SampleError, match="the gradient is not finite in optimiser step 1") as caught:
            role.update(BATCHES[1], 0).result()
    assert caught.value.rows == {"lm": [2]}


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_measuring_a_terms_gradient_changes_nothing(tiny_lm: Path, stage: int, precision: str):
    results = []
    for measure in (False, True):
        config = trained(tiny_lm, zero_stage=stage, precision=precision)
        with hosted(LM, config=config, num_steps=2) as group:
            worker = worker_of(group)
            twice = worker.nll_term("twice", pick(BATCHES[1], MICRO), BATCHES[1].num_targets, coefficient=2.0)
            half = worker.nll_term("half", pick(BATCHES[1], MICRO), BATCHES[1].num_targets, coefficient=0.5)
            reports = [worker.engine.step([twice, half], measure_terms=measure) for _ in range(2)]
            results.append((whole_weights(group), [report.grad_norm for report in reports]))
            norms = reports[0].term_grad_norms
    assert results[0][1] == results[1][1]
    assert all(torch.equal(t, results[0][0][name]) for name, t in results[1][0].items())
    # The two terms are one loss with two coefficients.
    assert norms["twice"] / norms["half"] == pytest.approx(4, rel=1e-2 if precision == "bf16" else 1e-5)
    assert norms["twice"] + norms["half"] == pytest.approx(results[0][1][0], rel=1e-2 if precision == "bf16" else 1e-5)


def test_steps_passed_over_move_the_schedule_on(tiny_lm: Path):
    with hosted(LM, config=trained(tiny_lm), num_steps=3) as group:
        worker = worker_of(group)
        first = worker.engine.step([term(worker, BATCHES[0])])
        worker.engine.pass_over(1)
        last = worker.engine.step([term(worker, BATCHES[2])])
    # Warm-up over one of three steps, then linear: factors 0.5, 1, 0.5.
    assert [first.learning_rate, last.learning_rate] == pytest.approx([0.5e-3, 0.5e-3])
