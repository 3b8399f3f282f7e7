"""Plain text beside the records of an SFT step: the parameters are those of a plain loop, whatever the layout."""

from __future__ import annotations

from dataclasses import replace

import layouts
import pytest
import reference_loop as plain
from deviations import MAX_LARGEST, MAX_RELATIVE, deviation
from layouts import BASE, MAX_LENGTH, NUM_STEPS, PTX, TEXTS
from objectives import SFT, Outcome, Reference, Trainings, language_model, role_of, splits_of
from support.bench import Layout, saved_weights
from torch import Tensor

from rlhf_dist.sft.roles import LanguageModelRole

COEF = 0.4
BUDGET = {"micro_batch_tokens": MAX_LENGTH}


@pytest.fixture(scope="module")
def expected(trainings: Trainings) -> Reference:
    """Mean over the records' targets of the step + COEF · mean over the text's."""
    model = language_model(trainings.models.policy)

    def loss(_model: object, i: int, trace: plain.Trace) -> Tensor:
        records, text = plain.nll(model, TEXTS[i]), plain.nll(model, PTX[i])
        trace.see("loss", records)
        trace.see("pretraining_loss", text)
        return records + COEF * text

    return trainings.descend(model, SFT, loss)


def train(trainings: Trainings, layout: Layout) -> Outcome:
    model, spec = layouts.sft_spec(trainings.models, layout)
    with trainings.bench.hosted(spec, layout) as group:
        role = role_of(LanguageModelRole, group, model)
        shares = splits_of(role)
        reports = [role.update(TEXTS[i], i, PTX[i], COEF).result().metrics for i in range(NUM_STEPS)]
        mean = {name.split("/")[1]: sum(report[name] for report in reports) / NUM_STEPS for name in reports[0]}
        mean.pop("learning_rate")
        return Outcome(saved_weights(role), mean, shares)


@pytest.mark.parametrize(
    "layout",
    [
        replace(BASE, ranks=1, zero_stage=0, cluster="inline", micro_batch_size=8),
        replace(BASE, ranks=3, zero_stage=1),  # steps of 3, 1, 5 and 2 texts: ranks without text
        replace(BASE, ranks=2, zero_stage=3, hosting=BUDGET),
        replace(BASE, ranks=2, zero_stage=2, hosting=BUDGET | {"packed": True}),
        replace(BASE, ranks=3, zero_stage=3, micro_batch_size=3, hosting={"packed": True}),
    ],
    ids=str,
)
def test_text_beside_the_records_of_a_step(trainings: Trainings, expected: Reference, layout: Layout):
    outcome = train(trainings, layout)
    measured = deviation(outcome.weights, expected.weights, expected.start)
    print(f"{layout}: {measured}")
    assert measured.relative <= MAX_RELATIVE
    assert measured.largest <= MAX_LARGEST
    for name, value in outcome.metrics.items():
        assert value == pytest.approx(expected.metrics[name], rel=1e-4, abs=1e-5), name
    if "micro_batch_tokens" in layout.hosting:
        assert max(len(step[0]) for step in outcome.shares) > 1, "a step has several micro-batches"


def test_the_text_matters(trainings: Trainings, expected: Reference):
    """Without it the weights would be far from these: the comparison sees what it is to see."""
    without = trainings.reference(SFT)
    assert deviation(without.weights, expected.weights, expected.start).relative > 0.1
