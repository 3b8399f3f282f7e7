"""What may change when a run resumes, what may not, and that a run can be extended. Whole runs of tiny models, inline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import metrics, weights

from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.ppo.build import run_ppo
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.reward.build import run_reward
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.sft.build import run_sft
from rlhf_dist.sft.config import SFTConfig

Make = Callable[..., dict[str, Any]]
RUNS: dict[str, Any] = {
    "sft": (SFTConfig, run_sft),
    "reward": (RewardConfig, run_reward),
    "ppo": (PPOConfig, run_ppo),
}
CONSTANT = {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0}
Changes = dict[str, dict[str, Any]]


@pytest.fixture
def start(make_config: Make, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """(command, folder, changes) → the summary of a run of 4 steps with constant learning rate, checkpointed at 2."""

    def run(command: str, folder: str, changes: Changes | None = None, **top: Any) -> dict[str, Any]:
        made = make_config(command, tmp_path / folder, cluster="inline") | {"checkpoint": {"every_steps": 2}}
        for role in ("model", "policy", "value"):
            if role in made:
                made[role]["optimizer"] = CONSTANT
        for section, values in (changes or {}).items():
            made[section] = made.get(section, {}) | values
        schema, go = RUNS[command]
        return go(schema.model_validate(made | top))

    return run


def cut(whole: Path, folder: Path, step: int = 2) -> Path:
    """A copy of a finished run as it was when it was killed after its checkpoint at `step`."""
    shutil.copytree(whole, folder)
    for path in folder.glob("checkpoints/step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "model")
    (folder / "summary.json").unlink()
    return folder


def same(a: Path, b: Path, close: bool = False) -> bool:
    """Equal weights, or equal up to the order of floating-point additions."""
    left, right = weights(a), weights(b)
    if close:
        return all(torch.allclose(left[name], right[name], rtol=1e-4, atol=1e-6) for name in left)
    return all(torch.equal(left[name], right[name]) for name in left)


BOOKKEEPING: Changes = {
    "checkpoint": {"every_steps": 1, "keep_last": 5, "every_minutes": 0},
    "tracking": {"num_samples": 1, "tensorboard": True},
}


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ("sft", BOOKKEEPING | {"sft": {"batch_size": 5, "num_steps": 4, "eval_every_steps": 1}}),
        ("reward", BOOKKEEPING | {"reward": {"batch_size": 5, "num_steps": 4, "eval_every_steps": 1}}),
    ],
)
def test_bookkeeping_changes_no_bit(
    command: str, changes: Changes, start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A patch release, too."""
    start(command, "whole")
    cut(tmp_path / "whole", tmp_path / "again")
    monkeypatch.setattr("rlhf_dist.__version__", "0.1.99")
    start(command, "again", changes, resume="auto")
    assert same(tmp_path / "whole", tmp_path / "again")


def test_an_out_of_memory_run_resumes_with_smaller_micro_batches(start: Callable, make_config: Make, tmp_path: Path):
    start("sft", "whole")
    cut(tmp_path / "whole", tmp_path / "again")
    model = make_config("sft", tmp_path, cluster="inline")["model"] | {"optimizer": CONSTANT}
    smaller = {"micro_batch_size": 1, "gradient_checkpointing": True, "packed": True}
    start("sft", "again", {"model": model | smaller}, resume="auto")
    assert same(tmp_path / "whole", tmp_path / "again", close=True)
    assert not same(tmp_path / "whole", tmp_path / "again"), "it did run with other micro-batches"


def test_a_run_that_is_extended_ends_where_the_longer_run_ends(start: Callable, tmp_path: Path):
    epochs = lambda n: {"sft": {"batch_size": 5, "num_steps": None, "num_epochs": n}}  # noqa: E731
    start("sft", "whole", epochs(3))
    summary = start("sft", "again", epochs(2))
    saved = (tmp_path / "again" / "model" / "model.safetensors").read_bytes()
    # Of the same length it simply ends again.
    again = start("sft", "again", epochs(2), resume="auto")
    assert {**again, "wall_time_s": 0} == {**summary, "wall_time_s": 0}
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == saved
    start("sft", "again", epochs(3), resume="auto")
    assert same(tmp_path / "whole", tmp_path / "again")
    losses = [{step: line.get("sft/loss") for step, line in metrics(tmp_path / run)} for run in ("whole", "again")]
    assert losses[0] == losses[1]


def test_ppo_is_extended(start: Callable, make_config: Make, tmp_path: Path):
    settings = make_config("ppo", tmp_path)["ppo"] | {"value_warmup_iterations": 1}
    start("ppo", "whole", {"ppo": settings | {"num_iterations": 4}})
    start("ppo", "again", {"ppo": settings | {"num_iterations": 3}})
    start("ppo", "again", {"ppo": settings | {"num_iterations": 4}}, resume="auto")
    assert same(tmp_path / "whole", tmp_path / "again")


def test_what_is_left_follows_the_longer_schedule(
    start: Callable, make_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A linear schedule that had come down to 0 goes up again to where the longer one is."""
    linear = make_config("sft", tmp_path, cluster="inline")["model"]
    linear["optimizer"] = {"learning_rate": 1e-3, "schedule": "linear", "warmup_fraction": 0.0}
    steps = lambda n: {"model": linear, "sft": {"batch_size": 5, "num_steps": n}}  # noqa: E731
    start("sft", "whole", steps(6))
    start("sft", "again", steps(3))
    start("sft", "again", steps(6), resume="auto")
    assert "follows the schedule of 6 steps" in caplog.text
    rates = [
        {step: line["train/learning_rate"] for step, line in metrics(tmp_path / run) if step}
        for run in ("whole", "again")
    ]
    assert {step: rates[0][step] for step in (4, 5, 6)} == {step: rates[1][step] for step in (4, 5, 6)}
    assert rates[0][3] != rates[1][3]


@pytest.mark.parametrize(
    ("command", "section", "key", "value"),
    [
        ("sft", "model", "optimizer", CONSTANT | {"learning_rate": 2e-3}),
        ("reward", "reward", "margin_coef", 0.5),
        ("ppo", "ppo", "clip_range", 0.1),
        ("sft", "", "seed", 7),
    ],
)
def test_another_objective_is_another_run(
    command: str, section: str, key: str, value: Any, start: Callable, make_config: Make, tmp_path: Path
):
    start(command, "run", {"checkpoint": {"every_steps": 1}})
    if not section:
        with pytest.raises(RunFolderError, match=rf"{key} was 0 and is 7"):
            start(command, "run", resume="auto", **{key: value})
        return
    made = make_config(command, tmp_path, cluster="inline")[section] | {key: value}
    if command == "reward":
        source = Path(make_config("reward", tmp_path)["data"]["train"][0]["path"])
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        path = tmp_path / "margins.jsonl"
        path.write_text("".join(json.dumps(row | {"margin": 1.0}) + "\n" for row in rows))
        data = {
            "data": make_config("reward", tmp_path)["data"] | {"train": [{"path": str(path), "kind": "preference"}]}
        }
    else:
        data = {}
    named = "optimizer.learning_rate" if key == "optimizer" else key
    with pytest.raises(RunFolderError, match=rf"{section}.{named} was .* and is"):
        start(command, "run", {section: made} | data, resume="auto")


def test_data_count_by_what_they_hold(start: Callable, make_config: Make, tmp_path: Path):
    data = make_config("sft", tmp_path)["data"]
    path = tmp_path / "own.jsonl"
    text = Path(data["train"][0]["path"]).read_text(encoding="utf-8")
    own = lambda file: {"data": data | {"train": [{"path": str(file), "kind": "instruction"}]}}  # noqa: E731
    path.write_text(text, encoding="utf-8")
    start("sft", "run", own(path))
    moved = path.rename(tmp_path / "moved.jsonl")
    start("sft", "run", own(moved), resume="auto")
    moved.write_text(text.replace("good", "gold", 1), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"content of data: train was '[0-9a-f]{64}' and is"):
        start("sft", "run", own(moved), resume="auto")


def test_a_run_is_not_cut_below_what_is_done(start: Callable, tmp_path: Path):
    start("sft", "run")
    with pytest.raises(RunFolderError, match=r"at step 4.*would end at step 3 .*sft.num_steps 3.*at least 4"):
        start("sft", "run", {"sft": {"batch_size": 5, "num_steps": 3}}, resume="auto")
    assert (tmp_path / "run" / "summary.json").exists(), "nothing was touched"


def test_a_checkpoint_of_another_layout_is_rejected_before_anything_starts(
    start: Callable, make_config: Make, tmp_path: Path
):
    start("sft", "run")
    model = make_config("sft", tmp_path, zero_stage=1)["model"] | {"optimizer": CONSTANT}
    with pytest.raises(RunFolderError, match=r"model.zero_stage was 2 and is 1\. The result would be the same"):
        start("sft", "run", {"model": model}, resume="auto")


def test_a_user_who_set_nothing_finds_a_checkpoint_at_the_end(start: Callable, tmp_path: Path):
    start("sft", "run", {"checkpoint": {"every_steps": 0}})
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000004"]
