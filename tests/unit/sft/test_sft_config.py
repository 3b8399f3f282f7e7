"""What an SFT configuration may say of mixing, plain text and tasks, and what it is told where it may not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_dist.pipeline.stages import _paths
from rlhf_dist.planning.roles import work_of
from rlhf_dist.sft.config import SFTConfig

TRAIN = [{"path": "a.jsonl", "kind": "instruction"}, {"path": "b.jsonl", "kind": "messages"}]
TEXT = [{"path": "web.jsonl", "kind": "text"}]


def config(data: dict[str, Any] | None = None, **sft: Any) -> SFTConfig:
    return SFTConfig.model_validate(
        {"run_dir": "r", "model": {"model_path": "m"}, "data": {"train": TRAIN} | (data or {}), "sft": sft}
    )


@pytest.mark.parametrize(
    ("ratio", "batch_size", "sequences"), [(0.125, 32, 4), (0.1, 32, 3), (1, 8, 8), (2.5, 2, 5), (0.5, 3, 2)]
)
def test_sequences_of_a_step_follow_from_the_ratio(ratio: float, batch_size: int, sequences: int):
    settings = config({"pretraining": TEXT}, pretraining_ratio=ratio, batch_size=batch_size).sft
    assert settings.pretraining_per_step == sequences
    assert settings.pretraining_weight == ratio
    given = config({"pretraining": TEXT}, pretraining_ratio=ratio, batch_size=batch_size, pretraining_coef=0.7).sft
    assert given.pretraining_weight == 0.7


@pytest.mark.parametrize(
    ("data", "sft", "rejection"),
    [
        ({"pretraining": TEXT}, {}, r"sft\.pretraining_ratio is 0, so none of it would be used; set the ratio"),
        (
            {},
            {"pretraining_ratio": 0.1},
            r"sft\.pretraining_ratio is 0\.1, but data\.pretraining names no text; name some",
        ),
        (
            {},
            {"pretraining_coef": 0.1},
            r"sft\.pretraining_coef is 0\.1, but data\.pretraining names no text; name some",
        ),
        (
            {"pretraining": TEXT},
            {"pretraining_ratio": 0.01, "batch_size": 32},
            r"0\.01 of sft\.batch_size 32 comes to no sequence a step; raise the ratio to at least 0\.015625",
        ),
        (
            {"pretraining": TRAIN},
            {"pretraining_ratio": 1},
            r"pretraining has a\.jsonl of kind 'instruction', .* plain text only; give kind text, or move",
        ),
        ({"eval_pretraining": TEXT}, {}, r"eval_pretraining is set, but pretraining names no text; set pretraining"),
        (
            {"mixing": {"method": "weights", "weights": [1, 2, 3]}},
            {},
            r"mixing\.weights holds 3 numbers for 2 sets to train on \(a, b\); give each one, in this order",
        ),
        ({"hold_out_tasks": ["x", "y", "x"]}, {}, r"hold_out_tasks names 'x' more than once"),
        ({"train": [TRAIN[0] | {"name": "a/b"}]}, {}, "name"),
        ({}, {"pretraining_ratio": -1}, "greater than or equal to 0"),
    ],
)
def test_what_contradicts_itself_is_rejected(data: dict[str, Any], sft: dict[str, Any], rejection: str):
    with pytest.raises(ValidationError, match=rejection):
        config(data, **sft)


def test_weights_count_sets_of_one_name_once():
    named = [source | {"name": "both"} for source in TRAIN]
    data = {"train": [*named, TEXT[0]], "mixing": {"method": "weights", "weights": [1, 2]}}
    assert config(data).data.mixing is not None


def test_a_pipeline_reads_every_source():
    """What it makes a stage's key of, and what it checks the files of."""
    data = {"pretraining": TEXT, "eval_pretraining": [TEXT[0] | {"path": "held.jsonl"}], "mixing": {"method": "equal"}}
    places = {place: path for place, path, source in _paths(config(data, pretraining_ratio=1)) if source is not None}
    assert places == {
        "data.train[0].path": "a.jsonl",
        "data.train[1].path": "b.jsonl",
        "data.pretraining[0].path": "web.jsonl",
        "data.eval_pretraining[0].path": "held.jsonl",
    }


def test_a_plan_counts_the_text_of_a_step():
    [role] = work_of(
        config({"pretraining": TEXT, "max_length_tokens": 64}, pretraining_ratio=0.25, batch_size=16)
    ).roles
    assert [(passes.sequences, passes.targets) for passes in role.update] == [(16, 63), (4, 63)]
    [role] = work_of(config()).roles
    assert [passes.sequences for passes in role.update] == [32]
