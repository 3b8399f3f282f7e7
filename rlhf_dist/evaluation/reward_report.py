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

from rlhf_dist.core.random import permutation
from rlhf_dist.data.datasets import PreferenceDataset, Split
from rlhf_dist.evaluation.bag_of_words import BagOfWords
from rlhf_dist.evaluation.losses import EVAL_CHUNK
from rlhf_dist.evaluation.plots import can_plot, plot_reward_model
from rlhf_dist.evaluation.reward_model import evaluate, score_dataset
from rlhf_dist.models.score_moments import ScoreMoments
from rlhf_dist.run.console import format_number, print_table
from rlhf_dist.run.observing import optional
from rlhf_dist.run.run_folder import write_atomically

Score = Callable[[PreferenceDataset, Tensor], Tensor]
"""A set and numbers of its records [n] → [n, K] scores."""

_MOST_FOR_MOMENTS = 1024
"""Training records that mean and standard deviation are measured on where none are held out."""


def score_moments_of(data: Split[PreferenceDataset], score: Score, seed: int) -> ScoreMoments:
    """Mean and standard deviation of the scores of the held-out responses; without any, of training records drawn by `seed`."""
    if data.eval is not None:
        rows, records, dataset = torch.arange(len(data.eval)), "held-out", data.eval
    else:
        rows, records, dataset = (
            permutation(seed, "score moments", 0, len(data.train))[:_MOST_FOR_MOMENTS],
            "training",
            data.train,
        )
    parts = [score(dataset, part)[dataset.batch(part).present].double() for part in rows.split(EVAL_CHUNK)]
    scores = torch.cat(parts)
    return ScoreMoments(float(scores.mean()), float(scores.std(correction=0)), len(scores), records)


def report_trained(
    run_dir: Path, held_out: PreferenceDataset, score: Score, baseline: BagOfWords | None
) -> dict[str, Any]:
    """Evaluate a reward model on its held-out records, and the baseline beside it.

    Args:
        run_dir: where `eval/` is written.
        held_out: records that were not trained on.
        score: the model.
        baseline: a model of words.

    Returns:
        For the summary: `evaluation` and, with a baseline, `baseline`.
    """
    reports = {"reward_model": evaluation(held_out, score)}
    write_report(run_dir, "reward_model", reports["reward_model"])
    if baseline is not None:
        reports["bag_of_words"] = evaluation(held_out, baseline.score) | {"inverse_penalty": baseline.strength}
        write_report(run_dir, "bag_of_words", reports["bag_of_words"])
    show(reports)
    named = {"reward_model": "evaluation", "bag_of_words": "baseline"}
    return {named[name]: headline(report) for name, report in reports.items()}


def evaluation(dataset: PreferenceDataset, score: Score) -> dict[str, Any]:
    """See `evaluation.reward_model.evaluate`."""
    return evaluate(score_dataset(lambda indices: score(dataset, indices), dataset, EVAL_CHUNK))


def write_report(run_dir: Path, name: str, report: Mapping[str, Any]) -> None:
    """All numbers as `eval/NAME.json`, and calibration and histograms as `eval/NAME.png` where matplotlib is there."""
    folder = run_dir / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    if can_plot():
        with optional(f"eval/{name}.png"):
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
