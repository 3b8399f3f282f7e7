"""Losses of language models on whole data sets, in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rlhf_dist.core.roles import LanguageModelScorer

EVAL_CHUNK = 512
"""Records of one evaluation call: bounds what the driver sends at once."""


def mean_nll(model: LanguageModelScorer, dataset: Any) -> float:
    """Mean negative log-likelihood over all targets of a set, in nats."""
    nll, num_targets = _nll_sums(model, dataset, chunks(len(dataset)))
    return nll / num_targets


def nll_metrics(model: LanguageModelScorer, dataset: Any, name: str) -> dict[str, float]:
    """`name`: nats a target token, over all targets of a set; `name/GROUP`: over those of each group, where it has several."""
    groups = dataset.groups
    if len(groups) < 2:
        return {name: mean_nll(model, dataset)}
    sums = {group: _nll_sums(model, dataset, items.split(EVAL_CHUNK)) for group, items in groups.items()}
    total = [sum(parts) for parts in zip(*sums.values(), strict=True)]
    return {name: total[0] / total[1]} | {f"{name}/{group}": nll / num for group, (nll, num) in sums.items()}


def _nll_sums(model: LanguageModelScorer, dataset: Any, pieces: Iterable[torch.Tensor]) -> tuple[float, float]:
    """Sums of negative log-likelihood and of targets."""
    sums = [model.evaluate(dataset.batch(piece)).result() for piece in pieces]
    return sum(s["nll"] for s in sums), sum(s["num_targets"] for s in sums)


def chunks(num: int, size: int = EVAL_CHUNK) -> Iterator[torch.Tensor]:
    """0..num-1 in consecutive pieces."""
    return iter(torch.arange(num).split(size))
