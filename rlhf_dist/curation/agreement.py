"""How far annotators agree, and whether the place of a response decides.

A pair's two candidates have no names of their own, so what a judgement said is put in words that do not depend on the
places: "first" or "second" preferred, "tie", "both_bad". Which candidate counts as the first is drawn by a hash of the item:
were it the order in the file, a set whose better responses all stand first would make annotators agree "by chance".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.curation.judgements import Judgement, latest

Unit = tuple[str, tuple[int, int]]
"""Item and pair: what annotators agree about."""


@dataclass(frozen=True)
class Interval:
    """A share with its uncertainty."""

    count: int
    total: int
    share: float | None
    """None of nothing."""
    low: float | None
    high: float | None
    p_value: float | None
    """Two-sided exact binomial test of a share of one half."""


@dataclass(frozen=True)
class Kappa:
    """A chance-corrected agreement and what it was computed from."""

    value: float | None
    """None where it is not defined: nothing judged twice, or everything given the same label."""
    percent: float | None
    """Share of agreeing pairs of labels, 0 to 1, not corrected."""
    units: int
    """Units with two labels or more."""
    skipped: int
    """Units with one label, which say nothing about agreement."""


def labels(judgements: Iterable[Judgement]) -> dict[Unit, dict[str, str]]:
    """Unit → annotator → "first", "second", "tie" or "both_bad", of what holds and is a vote."""
    table: dict[Unit, dict[str, str]] = {}
    for judgement in latest(judgements):
        if judgement.is_vote:
            first = judgement.pair[_drawn(judgement.item, judgement.pair)]
            label = judgement.choice
            if judgement.preferred is not None:
                label = "first" if judgement.preferred == first else "second"
            table.setdefault((judgement.item, judgement.pair), {})[judgement.annotator] = label
    return table


def _drawn(item: str, pair: tuple[int, int]) -> int:
    return hashlib.blake2b(f"{item}/{pair[0]}/{pair[1]}".encode()).digest()[0] & 1


def cohen(first: Sequence[Hashable], second: Sequence[Hashable]) -> Kappa:
    """Cohen's kappa of two annotators who both labeled these units (Cohen 1960), by scikit-learn.

    Raises:
        ConfigError: scikit-learn is not installed.
        ValueError: sequences of unequal length.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} labels beside {len(second)}; both annotators label the same units")
    if not first:
        return Kappa(None, None, 0, 0)
    percent = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    names = sorted({*map(str, first), *map(str, second)})
    if len(names) == 1:
        return Kappa(None, percent, len(first), 0)  # chance agreement is 1: 0 / 0
    value = _sklearn_metrics().cohen_kappa_score(list(map(str, first)), list(map(str, second)), labels=names)
    return Kappa(float(value), percent, len(first), 0)


def fleiss(units: Iterable[Sequence[Hashable]]) -> Kappa:
    """Fleiss' kappa (Fleiss 1971), in Gwet's form for unequal numbers of annotators (Gwet 2014, section 2.5).

    Observed agreement is the mean over units with two labels or more of the share of agreeing pairs of labels. Chance
    agreement is Σ_k π_k², with π_k the mean over all units of the share of label k in a unit. Where all units have the same
    number of labels this is Fleiss' own. Labels may come from different annotators in each unit.

    Args:
        units: the labels that each unit got.
    """
    kept = [list(map(str, unit)) for unit in units if len(unit)]
    names = sorted({label for unit in kept for label in unit})
    counts = np.array([[unit.count(name) for name in names] for unit in kept], dtype=np.float64)
    counts = counts.reshape(len(kept), len(names))  # also of none
    num = counts.sum(axis=1)
    shared = num >= 2
    skipped = int((~shared).sum())
    if not shared.any():
        return Kappa(None, None, 0, skipped)
    n, x = num[shared], counts[shared]
    observed = float(((x * (x - 1)).sum(axis=1) / (n * (n - 1))).mean())
    chance = float(((counts / num[:, None]).mean(axis=0) ** 2).sum())
    value = None if math.isclose(chance, 1.0) else (observed - chance) / (1 - chance)
    return Kappa(value, observed, int(shared.sum()), skipped)


def krippendorff(units: Iterable[Sequence[Hashable]]) -> Kappa:
    """Krippendorff's alpha for nominal labels (Krippendorff 2011, "Computing Krippendorff's alpha-reliability").

    Made for missing labels: α = 1 − D_o/D_e, where a unit counts by its number of labels, and units with one do not count
    of everything. `percent` is 1 − D_o.

    Args:
        units: the labels that each unit got.
    """
    all_units = [list(map(str, unit)) for unit in units if len(unit)]
    kept = [unit for unit in all_units if len(unit) >= 2]
    skipped = len(all_units) - len(kept)
    if not kept:
        return Kappa(None, None, 0, skipped)
    total = sum(map(len, kept))
    names = {label for unit in kept for label in unit}
    disagreeing = sum(
        sum(a != b for a, b in combinations(unit, 2)) * 2 / (len(unit) - 1) for unit in kept
    )  # Ordered pairs, weighted so that a unit of m labels counts m.
    observed = disagreeing / total
    frequencies = [sum(unit.count(name) for unit in kept) for name in names]
    expected = (total**2 - sum(f**2 for f in frequencies)) / (total * (total - 1))
    value = None if expected == 0 else 1 - observed / expected
    return Kappa(value, 1 - observed, len(kept), skipped)


def binomial(count: int, total: int, confidence: float = 0.95) -> Interval:
    """A share with the exact interval of Clopper and Pearson (1934).

    Raises:
        ConfigError: scipy (of the extra `curation`) is not installed.
    """
    if not total:
        return Interval(0, 0, None, None, None, None)
    _sklearn_metrics()
    from scipy.stats import binomtest

    test = binomtest(count, total, 0.5)
    interval = test.proportion_ci(confidence, method="exact")
    return Interval(count, total, count / total, float(interval.low), float(interval.high), float(test.pvalue))


def position_bias(judgements: Iterable[Judgement], confidence: float = 0.95) -> Interval:
    """Share of A (left) among the judgements that prefer one. Positions are drawn, so without a bias it is one half.

    Every judgement that is given counts, also where one annotator judged a pair in both orders: for people pass
    `latest(...)`.
    """
    decided = [judgement.choice for judgement in judgements if judgement.preferred is not None]
    return binomial(decided.count("a"), len(decided), confidence)


def agreement_report(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Everything about agreement, as JSON: percent and kappa of every two annotators, and of all together.

    `preferences_only` holds the same over the labels that prefer a response: two annotators of whom one is undecided more
    often may still never contradict each other.
    """
    table = labels(judgements)
    annotators = sorted({name for row in table.values() for name in row})
    decided = {
        unit: {name: label for name, label in row.items() if label in ("first", "second")}
        for unit, row in table.items()
    }
    return {
        "annotators": annotators,
        "all": _measures(table, annotators),
        "preferences_only": _measures({unit: row for unit, row in decided.items() if row}, annotators),
    }


def _measures(table: Mapping[Unit, Mapping[str, str]], annotators: Sequence[str]) -> dict[str, Any]:
    units = [list(row.values()) for row in table.values()]
    pairs = []
    for first, second in combinations(annotators, 2):
        shared = [(row[first], row[second]) for row in table.values() if first in row and second in row]
        kappa = cohen([a for a, _ in shared], [b for _, b in shared])
        pairs.append(
            {"annotators": [first, second], "cohen_kappa": kappa.value, "percent": kappa.percent, "pairs": kappa.units}
        )
    whole, alpha = fleiss(units), krippendorff(units)
    return {
        "two_annotators": pairs,
        "fleiss_kappa": whole.value,
        "krippendorff_alpha": alpha.value,
        "percent": whole.percent,
        "pairs_judged_by_several": whole.units,
        "pairs_judged_by_one": whole.skipped,
        "judgements_a_pair": _spread([len(unit) for unit in units]),
    }


def _spread(numbers: Sequence[int]) -> dict[str, int]:
    """Number of judgements → how many pairs have so many."""
    return {str(n): numbers.count(n) for n in sorted(set(numbers))}


def as_json(interval: Interval) -> dict[str, Any]:
    """An interval as a mapping."""
    return asdict(interval)


def _sklearn_metrics() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ConfigError(
            "measures of agreement need scikit-learn, which is not installed: pip install 'rlhf-dist[curation]'"
        ) from error
    return metrics
