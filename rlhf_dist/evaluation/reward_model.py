"""What people ask about a reward model: is it right, does it know how sure it is, and does it only count words?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.core.rankings import ranked_pairs
from rlhf_dist.data.datasets import PreferenceDataset
from rlhf_dist.evaluation.preference_metrics import accuracy, calibration, pearson, spearman

NUM_BINS = 10
"""Of the calibration curve."""
_HISTOGRAM_BINS = 30


@dataclass(frozen=True)
class ScoredPairs:
    """The pairs of a set with their scores. N pairs, M responses."""

    deltas: Tensor
    """[N] float64, score of the better less score of the worse."""
    weights: Tensor
    """[N] float64; those of a prompt add up to 1."""
    longer: Tensor
    """[N] int64, by how many tokens the better response is the longer."""
    cut: Tensor
    """[N] bool, whether one of the two was cut at the longest length."""
    source: Tensor
    """[N] int64, index into `sources`."""
    sources: list[str]
    scores: Tensor
    """[M] float64, of every response."""
    lengths: Tensor
    """[M] int64, tokens of every response."""
    better: Tensor
    """[M'] float64, scores of responses that are the better in some pair."""
    worse: Tensor
    """[M''] float64, of those that are the worse in some pair."""


def score_dataset(score: Callable[[Tensor], Tensor], dataset: PreferenceDataset, chunk: int) -> ScoredPairs:
    """Score all responses of a set, `chunk` records at a time, with whatever gives the [n, K] scores of the records [n]."""
    parts = [_scored(score(indices), dataset, indices) for indices in torch.arange(len(dataset)).split(chunk)]
    names = list(dict.fromkeys(dataset.sources))
    numbers = torch.tensor([names.index(name) for name in dataset.sources])
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return ScoredPairs(**(joined | {"source": numbers[joined["source"]]}), sources=names)


def _scored(scores: Tensor, dataset: PreferenceDataset, indices: Tensor) -> dict[str, Tensor]:
    batch = dataset.batch(indices)
    scores = scores.double()
    better, worse, weights = ranked_pairs(batch.present, batch.ranks)
    lengths, cut = dataset.response_tokens(indices), dataset.was_cut(indices)
    pairs = weights > 0
    # [n, K, K]: response i of a prompt is preferred to its response j.
    wins = batch.present[:, :, None] & batch.present[:, None, :] & (batch.ranks[:, :, None] < batch.ranks[:, None, :])
    return {
        "deltas": (scores[:, better] - scores[:, worse])[pairs],
        "weights": weights[pairs].double(),
        "longer": (lengths[:, better] - lengths[:, worse])[pairs],
        "cut": (cut[:, better] | cut[:, worse])[pairs],
        "source": indices[:, None].expand_as(pairs)[pairs],
        "scores": scores[batch.present],
        "lengths": lengths[batch.present],
        "better": scores[wins.any(2)],
        "worse": scores[wins.any(1)],
    }


def evaluate(found: ScoredPairs) -> dict[str, Any]:
    """All numbers of a report, as JSON takes them; None where the set cannot say (no pair of that sort, no variance)."""
    reliability = calibration(found.deltas, found.weights, NUM_BINS)
    longer, shorter = found.longer > 0, found.longer < 0
    by_source = {
        name: _part(found, found.source == number)
        for number, name in enumerate(found.sources)
        if len(found.sources) > 1
    }

    def mean(values: Tensor) -> float:
        return float((values * found.weights).sum() / found.weights.sum())

    whole = {
        **_part(found, torch.ones_like(found.cut)),
        "loss": mean(torch.nn.functional.softplus(-found.deltas)),
        "margin": mean(found.deltas),
        "ece": reliability.ece,
        "brier": mean(torch.sigmoid(-found.deltas).square()),
        "by_source": by_source,
        "length": {
            "score_length_pearson": pearson(found.scores, found.lengths),
            "score_length_spearman": spearman(found.scores, found.lengths),
            "longer_is_better": accuracy(found.longer, found.weights),
            "accuracy_where_better_is_longer": _part(found, longer)["accuracy"],
            "accuracy_where_better_is_shorter": _part(found, shorter)["accuracy"],
        },
        "truncated": _part(found, found.cut),
        "scores": {
            "mean": float(found.scores.mean()),
            "std": float(found.scores.std(correction=0)),
            "better_mean": float(found.better.mean()),
            "worse_mean": float(found.worse.mean()),
            "num_responses": len(found.scores),
        },
        "calibration": asdict(reliability),
        "histogram": _histogram(found),
    }
    return _plain(whole)


def _part(found: ScoredPairs, chosen: Tensor) -> dict[str, Any]:
    return {"accuracy": accuracy(found.deltas[chosen], found.weights[chosen]), "num_pairs": int(chosen.sum())}


def _histogram(found: ScoredPairs) -> dict[str, Any]:
    low, high = float(found.scores.min()), float(found.scores.max())
    edges = torch.linspace(low, high if high > low else low + 1.0, _HISTOGRAM_BINS + 1, dtype=torch.float64)
    counts = {
        name: torch.histogram(scores.cpu(), edges).hist.long().tolist()
        for name, scores in (("better", found.better), ("worse", found.worse))
    }
    return {"edges": edges.tolist(), **counts}


def _plain(value: Any) -> Any:
    """NaN, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
