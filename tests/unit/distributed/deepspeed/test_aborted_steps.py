"""Steps that are not taken: what rejects them, what they leave untouched, and what comes after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.aborting import BAD_ROW, MICRO, NaNGradient, lm_term, poisoned, steps_around_rejections
from support.tiny import hosted, token_batch, trained, whole_weights, worker_of

from rlhf_dist.core.errors import SampleError
from rlhf_dist.distributed.workers.inference import pick
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.sft.roles import LanguageModelRole

LM = LanguageModelWorker
BATCHES = [token_batch([9, 4, 13, 6, 7], seed=step) for step in range(3)]
LAYOUTS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_an_aborted_step_leaves_no_trace(tiny_lm: Path, stage: int, precision: str):
    """The step after rejected ones is the step that would have been taken without them."""
    results = []
    for reject in (False, True):
        config = trained(tiny_lm, zero_stage=stage, precision=precision)
        with hosted(LM, config=config, num_steps=3) as group:
            weights, last = steps_around_rejections(group, BATCHES, reject)
            results.append((weights, last.grad_norm, last.learning_rate))
    (expected, *numbers), (actual, *others) = results
    assert others == numbers
    assert all(torch.equal(t, expected[name]) for name, t in actual.items())


@pytest.mark.parametrize("stage", [0, 3])
def test_the_error_names_the_rows(tiny_lm: Path, stage: int):
    with hosted(LM, config=trained(tiny_lm, zero_stage=stage), num_steps=3) as group:
        worker = worker_of(group)
        worker._nll = poisoned(worker, BATCHES[1], NaNGradient.apply)
        role = LanguageModelRole(group, 2)
        with pytest.raises(SampleError, match="the gradient is not finite in optimizer step 1") as caught:
            role.update(BATCHES[1], 0).result()
    assert caught.value.rows == {"lm": [BAD_ROW]}


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


def test_skipped_steps_advance_the_schedule(tiny_lm: Path):
    with hosted(LM, config=trained(tiny_lm), num_steps=3) as group:
        worker = worker_of(group)
        first = worker.engine.step([lm_term(worker, BATCHES[0])])
        worker.engine.skip_steps(1)
        last = worker.engine.step([lm_term(worker, BATCHES[2])])
    # Warm-up over one of three steps, then linear: factors 0.5, 1, 0.5.
    assert [first.learning_rate, last.learning_rate] == pytest.approx([0.5e-3, 0.5e-3])
