"""A reward model's step on rankings against plain torch, against its pairs one by one, and what must not matter to it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import hosted, random_rows, trained, whole_weights, worker_of
from transformers import AutoModelForSequenceClassification

from rlhf_dist.core.batches import PreferenceBatch
from rlhf_dist.reward.roles import PreferenceModelRole
from rlhf_dist.reward.worker import PreferenceModelWorker

RM = PreferenceModelWorker
FLAT = {"schedule": "constant", "warmup_fraction": 0.0, "max_grad_norm": 100.0}  # so that gradients are not clipped
RESPONSES = [random_rows(lengths, seed) for seed, lengths in enumerate([[5, 9], [3, 4, 8, 2], [6, 6, 1], [7, 3]])]
RANKS = [[0, 1], [0, 1, 1, 3], [0, 1, 2], [0, 1]]
RATINGS = [[1.5, 0.0], [4.0, 2.5, 2.5, -1.0], [0.0, 0.0, 0.0], [0.25, 0.0]]
MIXED = PreferenceBatch.of(RESPONSES, RANKS, RATINGS)


def kwargs(path: Path, **coefs: float) -> dict[str, Any]:
    return {"config": trained(path, optimizer=FLAT), "num_steps": 1, **coefs}


def one_step(path: Path, batch: PreferenceBatch, size: int = 8, **coefs: float) -> tuple[dict, dict[str, torch.Tensor]]:
    """Metrics and weights of one update with micro-batches of `size` prompts."""
    with hosted(RM, **kwargs(path, **coefs)) as group:
        metrics = PreferenceModelRole(group, size).update(batch, 0).result().metrics
        return metrics, whole_weights(group)


def assert_same_step(one: tuple[dict, dict], other: tuple[dict, dict]) -> None:
    for name, value in one[0].items():
        assert other[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for name, tensor in one[1].items():
        # Adam's first step is the learning rate times the gradient's sign: where the gradient is all but 0, rounding shows.
        assert (other[1][name] - tensor).abs().mean() < 1e-6, name


@pytest.mark.parametrize(("margin_coef", "centering_coef"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.3), (0.7, 0.3)])
def test_a_step_equals_plain_torch_pair_by_pair(tiny_rm: Path, margin_coef: float, centering_coef: float):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_rm, dtype=torch.float32)
    prompts = []
    for rows, ranks, ratings in zip(RESPONSES, RANKS, RATINGS, strict=True):
        scores = [model(row[None]).logits[0, 0] for row in rows]
        pairs = []
        for i, j in combinations(range(len(rows)), 2):
            if ranks[i] < ranks[j]:
                margin = margin_coef * (ratings[i] - ratings[j])
                loss = torch.log1p(torch.exp(margin - (scores[i] - scores[j])))
                pairs.append(loss + centering_coef * (scores[i] + scores[j]) ** 2)
        prompts.append(torch.stack(pairs).mean())
    loss = torch.stack(prompts).mean()
    loss.backward()
    grad_norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    for size in (1, 4):
        coefs = {"margin_coef": margin_coef, "centering_coef": centering_coef}
        metrics, _ = one_step(tiny_rm, MIXED, size, **coefs)
        assert metrics["reward_model/loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert metrics["train/grad_norm"] == pytest.approx(grad_norm, rel=1e-3)


def test_a_ranking_is_the_mean_of_its_pairs(tiny_rm: Path):
    rows = RESPONSES[1]
    pairs = PreferenceBatch.of([[rows[i], rows[j]] for i, j in combinations(range(4), 2)])
    assert_same_step(one_step(tiny_rm, PreferenceBatch.of([rows])), one_step(tiny_rm, pairs))


def test_a_tie_is_skipped_of_the_mean(tiny_rm: Path):
    rows = RESPONSES[1]
    pairs = PreferenceBatch.of([[rows[i], rows[j]] for i, j in combinations(range(4), 2) if (i, j) != (1, 2)])
    assert_same_step(one_step(tiny_rm, PreferenceBatch.of([rows], ranks=[[0, 1, 1, 3]])), one_step(tiny_rm, pairs))


def test_absent_responses_cannot_matter(tiny_rm: Path):
    gone = ~MIXED.present
    nonsense = replace(
        MIXED,
        tokens=torch.where(gone[..., None], 77, MIXED.tokens),
        ranks=torch.where(gone, 9, MIXED.ranks),
        ratings=torch.where(gone, math.nan, MIXED.ratings),
    )
    coefs = {"margin_coef": 0.7, "centering_coef": 0.3}
    clean, dirty = one_step(tiny_rm, MIXED, **coefs), one_step(tiny_rm, nonsense, **coefs)
    assert dirty[0] == clean[0]
    assert all(torch.equal(dirty[1][name], tensor) for name, tensor in clean[1].items())


def test_a_micro_batch_is_one_forward_pass_of_the_responses_that_there_are(tiny_rm: Path):
    with hosted(RM, **kwargs(tiny_rm)) as group:
        shapes: list[tuple[int, ...]] = []
        worker_of(group).model.base_model.register_forward_pre_hook(
            lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        role = PreferenceModelRole(group, 4)
        role.update(MIXED, 0).result()
        assert shapes == [(11, 9)]  # 2 + 4 + 3 + 2 responses, the longest of 9 tokens
        role.score_pairs(MIXED).result()
        assert shapes == [(11, 9)] * 2


def test_scores_are_those_of_transformers_whatever_the_micro_batches(tiny_rm: Path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_rm, dtype=torch.float32)
    with hosted(RM, **kwargs(tiny_rm)) as group:
        found = [PreferenceModelRole(group, size).score_pairs(MIXED).result() for size in (1, 3)]
        assert worker_of(group).score_pairs(MIXED.rows([]), [[]]).shape == (0, 0)
    for scores in found:
        assert scores.shape == (4, 4)
        for rows, row in zip(RESPONSES, scores.tolist(), strict=True):
            expected = [model(tokens[None]).logits.item() for tokens in rows]
            assert row == pytest.approx([*expected, *[0.0] * (4 - len(rows))], abs=1e-4)


@pytest.mark.parametrize("stage", [0, 3])
def test_idle_micro_batches_of_rankings_change_nothing(tiny_rm: Path, stage: int):
    results = []
    for micro_batches in ([[0, 1], [2, 3]], [[0, 1], [], [2, 3], []]):
        config = trained(tiny_rm, zero_stage=stage, optimizer=FLAT)
        with hosted(RM, config=config, num_steps=1, centering_coef=0.3) as group:
            report = worker_of(group).update(MIXED, micro_batches, 4, 0)
            results.append((report.sums["rm"] | {"grad_norm": report.grad_norm}, whole_weights(group)))
    assert_same_step(*results)
