"""What a reward model is worth, at the end of a run: numbers in `eval/reward_model.json`, pictures beside them, a table.

Beside the model, where it is asked for, a bag-of-words baseline on the same records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.data.datasets import PreferenceDataset, Split
from rlhf_dist.models.score_moments import ScoreMoments
from rlhf_dist.tracking.console import format_number, print_table
from rlhf_dist.tracking.plots import can_plot, plot_reward_model
from rlhf_dist.tracking.run_folder import write_atomically
from rlhf_dist.trainers.bag_of_words import BagOfWords
from rlhf_dist.trainers.reward_evaluation import evaluate, score_dataset
from rlhf_dist.trainers.supervised import EVAL_CHUNK

Score = Callable[[PreferenceDataset, Tensor], Tensor]
"""A set and numbers of its records [n] → [n, K] scores."""

_MOST_FOR_MOMENTS = 1024
"""Training records that mean and standard deviation are measured on where none are held out."""


def report_trained(
    run_dir: Path, data: Split[PreferenceDataset], score: Score, decode: Callable[[Tensor], str] | None
) -> tuple[dict[str, Any], ScoreMoments]:
    """Evaluate a reward model on its held-out records; without any, only measure its scores.

    Args:
        run_dir: where `eval/` is written.
        data: training and held-out records.
        score: the model.
        decode: [n] token ids → text, to fit the baseline with; None for no baseline.

    Returns:
        For the summary: `evaluation` and, with a baseline, `baseline`; and the scores' moments.
    """
    if data.eval is None:
        some = torch.arange(min(len(data.train), _MOST_FOR_MOMENTS))
        scores = score(data.train, some)[data.train.batch(some).present].double()
        return {}, ScoreMoments(float(scores.mean()), float(scores.std(correction=0)), len(scores), "training")
    reports = {"reward_model": evaluation(data.eval, score)}
    if decode is not None:
        reports["bag_of_words"] = evaluation(data.eval, BagOfWords(data.train, decode).score)
    for name, report in reports.items():
        write_report(run_dir, name, report)
    show(reports)
    named = {"reward_model": "evaluation", "bag_of_words": "baseline"}
    found = reports["reward_model"]["scores"]
    moments = ScoreMoments(found["mean"], found["std"], found["num_responses"], "held-out")
    return {named[name]: headline(report) for name, report in reports.items()}, moments


def evaluation(dataset: PreferenceDataset, score: Score) -> dict[str, Any]:
    """See `trainers.reward_evaluation.evaluate`."""
    return evaluate(score_dataset(lambda indices: score(dataset, indices), dataset, EVAL_CHUNK))


def write_report(run_dir: Path, name: str, report: Mapping[str, Any]) -> None:
    """All numbers as `eval/NAME.json`, and calibration and histograms as `eval/NAME.png` where matplotlib is there."""
    folder = run_dir / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    if can_plot():
        plot_reward_model(report, folder / f"{name}.png")


def headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that a summary holds."""
    length, truncated = report["length"], report["truncated"]
    return {
        **{name: report[name] for name in ("accuracy", "loss", "margin", "ece", "brier", "num_pairs")},
        **{f"accuracy/{name}": part["accuracy"] for name, part in report["by_source"].items()},
        "score_length_spearman": length["score_length_spearman"],
        "longer_is_better": length["longer_is_better"],
        **({"accuracy_truncated": truncated["accuracy"]} if truncated["num_pairs"] else {}),
    }


def show(reports: Mapping[str, Mapping[str, Any]]) -> None:
    """The headlines side by side."""
    lines = {name: headline(report) for name, report in reports.items()}
    names = list(dict.fromkeys(name for line in lines.values() for name in line))
    rows = [
        (name, *("" if line.get(name) is None else format_number(line[name]) for line in lines.values()))
        for name in names
    ]
    print_table("held-out records, against the people who judged them", rows, header=("", *lines))
