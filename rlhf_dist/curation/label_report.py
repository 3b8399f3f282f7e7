"""Numbers about a labeling task: progress, choices, seconds, position bias, agreement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from rlhf_dist.curation.agreement import agreement_report, as_json, position_bias
from rlhf_dist.curation.judgements import CHOICES, Judgement, latest
from rlhf_dist.curation.labeling import LabelTask

_LEVEL = 0.05
"""Of the tests for position bias."""


def label_report(task: LabelTask) -> dict[str, Any]:
    """All numbers of the report, as JSON, of what holds now.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    held = latest(task.judgements)
    by_annotator = {name: [j for j in held if j.annotator == name] for name in task.annotators}
    judged = {(j.item, j.pair) for j in held if j.is_vote}
    return {
        "items": len(task.items),
        "pairs": len(task.units),
        "pairs_judged": len(judged),
        "judgements": len(held),
        "annotators": [
            {"name": name, **dict(zip(("judged", "assigned"), task.progress(name), strict=True)), **_numbers(said)}
            for name, said in by_annotator.items()
        ],
        "all": _numbers(held),
        "criteria": {name: _criterion(name, held) for name in task.config.criteria},
        "agreement": agreement_report(held),
    }


def _numbers(judgements: Sequence[Judgement]) -> dict[str, Any]:
    counts = Counter(judgement.choice for judgement in judgements)
    seconds = [judgement.seconds for judgement in judgements if judgement.seconds is not None]
    return {
        "choices": {choice: counts[choice] for choice in CHOICES},
        "median_seconds": median(seconds) if seconds else None,
        "position_bias": as_json(position_bias(judgements)),
    }


def _criterion(name: str, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """How often a criterion was compared, and how often a compared one that prefers a response prefers the chosen one."""
    given = [judgement for judgement in judgements if name in judgement.criteria]
    decided = [j for j in given if j.preferred is not None and j.criteria[name] != "tie"]
    return {
        "given": len(given),
        "decided": len(decided),
        "with_the_choice": sum(judgement.criteria[name] == judgement.choice for judgement in decided),
    }


def progress_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table by annotator; `PROGRESS_HEADER` names the columns."""
    rows = [
        (entry["name"], f"{entry['judged']} of {entry['assigned']}", *_cells(entry)) for entry in report["annotators"]
    ]
    if len(rows) != 1:
        rows.append(("all", f"{report['judgements']}", *_cells(report["all"])))
    return rows


PROGRESS_HEADER = ("annotator", "judged", "A", "B", "tie", "both bad", "skipped", "share of A (95 %)", "median s")


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    seconds = entry["median_seconds"]
    counts = (str(entry["choices"][choice]) for choice in CHOICES)
    return (*counts, interval_text(entry["position_bias"]), "-" if seconds is None else f"{seconds:.1f}")


def interval_text(interval: dict[str, Any]) -> str:
    """A share with its interval."""
    if interval["share"] is None:
        return "-"
    return f"{interval['share']:.2f} ({interval['low']:.2f} to {interval['high']:.2f})"


def bias_text(report: dict[str, Any]) -> str:
    """What the position bias says, in a sentence for all and for each annotator whose habit shows."""
    whole = report["all"]["position_bias"]
    if whole["share"] is None:
        return "No judgement prefers a response yet."
    tested = {entry["name"]: entry["position_bias"] for entry in report["annotators"]}
    # Of many annotators some differ by chance: the level is shared among them (Bonferroni).
    level = _LEVEL / max(len(tested), 1)
    shown = {name: bias for name, bias in tested.items() if bias["p_value"] is not None and bias["p_value"] < level}
    if whole["p_value"] < _LEVEL and len(tested) != 1:
        shown = {"all annotators together": whole} | shown
    if not shown:
        return f"No sign of a position bias: A was preferred in {whole['count']} of {whole['total']}."
    told = "; ".join(
        f"{name}: {'A (left)' if bias['share'] > 0.5 else 'B (right)'}, with A in {bias['count']} of {bias['total']}, "
        f"p = {bias['p_value']:.2g}"
        for name, bias in shown.items()
    )
    return f"One side is preferred more often than chance explains, though positions are drawn. {told}."


AGREEMENT_HEADER = ("annotators", "measure", "pairs", "agreement", "kappa or alpha", "over preferences only")


def agreement_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of agreement; `AGREEMENT_HEADER` names the columns."""
    whole, decided = report["agreement"]["all"], report["agreement"]["preferences_only"]
    rows = [
        (
            " and ".join(pair["annotators"]),
            "Cohen's kappa",
            str(pair["pairs"]),
            percent_text(pair["percent"]),
            number_text(pair["cohen_kappa"]),
            number_text(only["cohen_kappa"]),
        )
        for pair, only in zip(whole["two_annotators"], decided["two_annotators"], strict=True)
    ]
    for measure, key in (("Fleiss' kappa", "fleiss_kappa"), ("Krippendorff's alpha", "krippendorff_alpha")):
        rows.append(
            (
                "all",
                measure,
                str(whole["pairs_judged_by_several"]),
                percent_text(whole["percent"]),
                number_text(whole[key]),
                number_text(decided[key]),
            )
        )
    return rows


CRITERIA_HEADER = ("criterion", "compared", "prefers one", "the chosen one")


def criteria_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of criteria; `CRITERIA_HEADER` names the columns."""
    return [
        (
            name,
            str(entry["given"]),
            str(entry["decided"]),
            percent_text(entry["with_the_choice"] / entry["decided"] if entry["decided"] else None),
        )
        for name, entry in report["criteria"].items()
    ]


def percent_text(share: float | None) -> str:
    """A share in per cent."""
    return "-" if share is None else f"{100 * share:.0f} %"


def number_text(value: float | None) -> str:
    """Two digits behind the point."""
    return "-" if value is None else f"{value:.2f}"
