"""Activations: estimates beside real passes, in the band that `plan` states."""

from __future__ import annotations

import pytest
from bench.plan_activations import CASES, Case, measure

from rlhf_dist.planning.activations import ERROR_BAND, TrainingPass, training_activations

CHOSEN = [CASES[0], CASES[1], CASES[3], CASES[4], CASES[5], CASES[7], CASES[11], CASES[12]]


@pytest.mark.parametrize("case", CHOSEN, ids=lambda c: f"{c.model}-{c.precision}-{c.words.replace(', ', '-')}")
def test_real_peaks_are_within_the_stated_band(case: Case):
    below, above = ERROR_BAND
    measured = measure(case)
    assert below <= measured.deviation <= above
    kept = measured.estimate.saved + measured.estimate.logits
    assert measured.kept == pytest.approx(kept, rel=0.2)


def test_attention_is_linear_in_the_length_but_for_its_mask(tiny_lm_path: str):
    def saved(rows: int, length: int) -> int:
        return training_activations(TrainingPass(tiny_lm_path, True, "bf16", rows, length, 0)).saved

    # The same tokens in longer rows: each of two layers keeps a mask of [rows, length, length] in bf16, and nothing else grows
    # but rotary tables, which are one row's.
    masks = 2 * 2 * (2 * 128**2 - 4 * 64**2)
    assert saved(2, 128) - saved(4, 64) == pytest.approx(masks, abs=0.1 * masks)


@pytest.fixture
def tiny_lm_path(tiny_lm: object) -> str:
    return str(tiny_lm)
