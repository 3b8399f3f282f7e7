"""Measures of agreement against published numbers."""

from __future__ import annotations

import pytest

from rlhf_dist.curation.agreement import agreement_report, binomial, cohen, fleiss, krippendorff, labels, position_bias
from rlhf_dist.curation.judgements import Judgement

FLEISS_TABLE = [
    (0, 0, 0, 0, 14),
    (0, 2, 6, 4, 2),
    (0, 0, 3, 5, 6),
    (0, 3, 9, 2, 0),
    (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0),
    (3, 2, 6, 3, 0),
    (2, 5, 3, 2, 2),
    (6, 5, 2, 1, 0),
    (0, 2, 2, 3, 7),
]
"""Ten subjects, fourteen raters, five categories: the worked example of the Wikipedia article on Fleiss' kappa."""

GAPS = [
    "11.1",
    "2232",
    "3333",
    "3333",
    "2222",
    "1234",
    "4444",
    "1121",
    "2222",
    ".555",
    "..11",
    "..3.",
]
"""Twelve units, four observers, gaps: the example of Krippendorff 2011 (section C), in R's irrCAC cac.raw4raters."""


def gaps() -> list[list[str]]:
    return [[label for label in unit if label != "."] for unit in GAPS]


def judgement(annotator: str, item: str, choice: str, shown: tuple[int, int] = (0, 1)) -> Judgement:
    return Judgement(item, annotator, choice, shown)


def test_cohen_on_the_textbook_table():
    """50 proposals: both yes 20, first alone 5, second alone 10, both no 15; kappa is 0.4."""
    cells = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    kappa = cohen([a for a, _ in cells], [b for _, b in cells])
    assert kappa.value == pytest.approx(0.4)
    assert kappa.percent == pytest.approx(0.7)
    assert kappa.units == 50


def test_cohen_of_nothing_or_of_one_label_is_not_a_number_made_up():
    assert cohen([], []).value is None
    same = cohen(["a", "a"], ["a", "a"])
    assert same.value is None
    assert same.percent == 1
    with pytest.raises(ValueError, match="same units"):
        cohen(["a"], [])


def test_fleiss_on_the_textbook_table():
    units = [[str(k) for k, n in enumerate(row) for _ in range(n)] for row in FLEISS_TABLE]
    kappa = fleiss(units)
    assert kappa.value == pytest.approx(0.2099, abs=5e-5)
    assert kappa.percent == pytest.approx(0.378, abs=5e-4)
    assert (kappa.units, kappa.skipped) == (10, 0)


def test_fleiss_with_unequal_numbers_of_raters():
    """irrCAC's fleiss.kappa.raw(cac.raw4raters): pa 0.8181818, coefficient 0.76117."""
    kappa = fleiss(gaps())
    assert kappa.percent == pytest.approx(0.8181818, abs=1e-6)
    assert kappa.value == pytest.approx(0.76117, abs=5e-6)
    assert (kappa.units, kappa.skipped) == (11, 1)


def test_krippendorff_with_gaps():
    """Krippendorff 2011: nominal alpha 0.743."""
    alpha = krippendorff(gaps())
    assert alpha.value == pytest.approx(0.743, abs=5e-4)
    assert (alpha.units, alpha.skipped) == (11, 1)


def test_units_of_one_label_alone_say_nothing():
    for measure in (fleiss, krippendorff):
        found = measure([["a"], ["b"], []])
        assert (found.value, found.percent, found.units, found.skipped) == (None, None, 0, 2)
        assert measure([["a", "a"], ["a", "a"]]).value is None


def test_labels_do_not_depend_on_the_places_and_are_drawn_evenly():
    table = labels(
        j for n in range(200) for j in (judgement("ann", f"i{n}", "a", (0, 1)), judgement("bob", f"i{n}", "b", (1, 0)))
    )
    assert all(row["ann"] == row["bob"] for row in table.values())
    assert 70 < sum(row["ann"] == "first" for row in table.values()) < 130


def test_the_report_counts_each_pair_of_annotators_on_what_both_judged():
    said = [judgement("ann", f"i{n}", "a") for n in range(10)]
    said += [judgement("bob", f"i{n}", "a" if n < 6 else "b") for n in range(8)]
    said += [judgement("cat", "i0", "tie"), judgement("cat", "i1", "skip"), judgement("cat", "i2", "a")]
    report = agreement_report(said)
    found = {tuple(pair["annotators"]): pair for pair in report["all"]["two_annotators"]}
    assert found["ann", "bob"]["pairs"] == 8
    assert found["ann", "bob"]["percent"] == pytest.approx(6 / 8)
    assert found["ann", "cat"]["pairs"] == 2
    assert found["ann", "cat"]["percent"] == pytest.approx(1 / 2)
    assert report["all"]["pairs_judged_by_one"] == 2
    assert report["all"]["judgements_a_pair"] == {"1": 2, "2": 6, "3": 2}
    assert report["all"]["percent"] == pytest.approx((1 / 3 + 1 + 1 + 1 + 1 + 1 + 0 + 0) / 8)
    assert report["preferences_only"]["judgements_a_pair"] == {"1": 2, "2": 7, "3": 1}


def test_a_binomial_interval_against_a_table():
    """Clopper and Pearson for 4 of 20: 0.0573 to 0.4366."""
    found = binomial(4, 20)
    assert (found.low, found.high) == (pytest.approx(0.0573, abs=5e-5), pytest.approx(0.4366, abs=5e-5))
    assert found.p_value == pytest.approx(2 * sum((1, 20, 190, 1140, 4845)) / 2**20)
    assert binomial(0, 0).share is None


def test_position_bias_counts_the_left():
    said = [judgement("ann", f"i{n}", "a" if n < 8 else "b", (n % 2, 1 - n % 2)) for n in range(10)]
    said += [judgement("ann", "t", "tie"), judgement("ann", "s", "skip")]
    bias = position_bias(said)
    assert (bias.count, bias.total) == (8, 10)
    assert bias.p_value == pytest.approx(2 * (1 + 10 + 45) / 2**10)
