"""SFT with everything that decides what a step takes: shares, plain text, a held-out task, groups of like length."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import metrics, weights, write_config

from rlhf_dist.cli import main
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.pipeline.commands import validate
from rlhf_dist.sft.build import run_sft
from rlhf_dist.sft.config import SFTConfig
from rlhf_dist.sft.trainer import SFTTask

Make = Callable[..., dict[str, Any]]
STEPS = 7


@pytest.fixture
def mixed(make_config: Make, records: dict[str, str], tmp_path: Path) -> Callable[..., SFTConfig]:
    """(run folder, changes of `sft`) → a run over two sets, one of them with a task that is held out."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"count {i}"},
                {"role": "assistant", "content": "one two three"[: 3 + i]},
            ]
        }
        | {"task": "counting" if i % 3 else "nothing"}
        for i in range(12)
    ]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def make(run: str, **sft: Any) -> SFTConfig:
        config = make_config("sft", tmp_path / run, cluster="inline")
        config["data"]["train"].append({"path": str(chats), "kind": "messages"})
        config["data"] |= {
            "mixing": {"method": "weights", "weights": [3, 1]},
            "hold_out_tasks": ["nothing"],
            "pretraining": [{"path": records["text"], "kind": "text"}],
        }
        config["checkpoint"] = {"every_steps": 3}
        config["sft"] = {
            "batch_size": 4,
            "num_steps": STEPS,
            "group_by_length": True,
            "pretraining_ratio": 0.5,
            "eval_every_steps": 4,
        } | sft
        return SFTConfig.model_validate(config)

    return make


def test_interrupted_and_resumed_it_ends_in_the_same_bits(
    mixed: Callable[..., SFTConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    whole = run_sft(mixed("whole"))
    update = SFTTask.update

    def interrupted(self: SFTTask, step: int, indices: torch.Tensor) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return update(self, step, indices)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTask, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_sft(mixed("cut"))
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step_000003"]
    resumed = run_sft(mixed("cut").model_copy(update={"resume": "auto"}))

    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert {**resumed, "wall_time_s": 0} == {**whole, "wall_time_s": 0}


def test_what_is_reported(mixed: Callable[..., SFTConfig], capsys: pytest.CaptureFixture[str], tmp_path: Path):
    config = mixed("run")
    summary = validate("sft", config)
    before = capsys.readouterr().out
    # A fifth of 36 instructions and of the 8 chats that are left is held out, drawn together: 35 of 44 remain.
    assert summary["training records"] == 35
    assert summary["held-out records"] == 9 + 4
    assert (summary["pretraining sequences"], summary["held-out pretraining sequences"]) == (16, 4)
    assert summary["pretraining sequences a step"] == 2
    summary = run_sft(config)
    shares = {row["source"]: row for row in summary["shares"]}
    assert set(shares) == {"instructions", "chats"}
    assert sum(row["available"] for row in shares.values()) == 35
    assert shares["instructions"]["rate"] == 0.75
    assert shares["instructions"]["share"] == pytest.approx(0.75, abs=0.03)
    for shown in (before, capsys.readouterr().out):
        assert "training records of an epoch, by source" in shown
        assert "75.00%" in shown
    assert json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))["shares"] == summary["shares"]
    logged = dict(metrics(tmp_path / "run"))
    groups = {"sft/eval_loss/source/instructions", "sft/eval_loss/source/chats", "sft/eval_loss/task/nothing"}
    for step, line in logged.items():
        held_out = {name for name in line if "eval" in name}
        expected = {"sft/eval_loss", "sft/eval_pretraining_loss"} | groups
        assert held_out == (expected if step in (0, 4, STEPS) else set())
        assert ("sft/pretraining_loss" in line) == (step > 0)
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]
    assert summary["after"]["eval_pretraining_loss"] < summary["before"]["eval_pretraining_loss"]


def test_steps_take_what_the_table_says(mixed: Callable[..., SFTConfig], monkeypatch: pytest.MonkeyPatch):
    """Over whole epochs, and in groups of like length: the order that was prepared is the one that is run."""
    config = mixed("run", num_steps=None, num_epochs=2.0)
    drawn: list[torch.Tensor] = []
    update = SFTTask.update

    def watched(self: SFTTask, step: int, indices: torch.Tensor) -> Any:
        drawn.append(indices)
        groups.update(self.train.groups)
        return update(self, step, indices)

    groups: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(SFTTask, "update", watched)
    summary = run_sft(config)
    epoch = sum(row["taken"] for row in summary["shares"])
    assert len(drawn) == summary["num_steps"] == -(-2 * epoch // 4)
    for number in range(2):
        items = torch.cat(drawn)[number * epoch : (number + 1) * epoch]
        assert len(items.unique()) == epoch
        for row in summary["shares"]:
            assert int(torch.isin(items, groups[row["source"]]).sum()) == row["taken"]


def test_a_larger_weight_of_the_text_lowers_its_loss_further(mixed: Callable[..., SFTConfig]):
    light, heavy = (run_sft(mixed(f"coef-{coef}", pretraining_coef=coef))["after"] for coef in (0.0, 5.0))
    assert heavy["eval_pretraining_loss"] < light["eval_pretraining_loss"]
    assert light["eval_loss"] < heavy["eval_loss"]


def test_more_text_a_step_than_there_is_is_rejected(mixed: Callable[..., SFTConfig]):
    with pytest.raises(
        ConfigError, match=r"takes 20 sequences of text a step, but data\.pretraining has 16; lower the ratio"
    ):
        validate("sft", mixed("run", pretraining_ratio=5))


def test_other_shares_are_another_run(
    mixed: Callable[..., SFTConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A checkpoint belongs to the shares it was made with; the command says which key differs."""
    config = mixed("run")
    run_sft(config)
    path = write_config(tmp_path / "config.yaml", config.model_dump(mode="json", exclude_none=True))
    shutil.rmtree(tmp_path / "run" / "model")
    arguments = ["sft", str(path), "--resume", "auto", "--data.mixing.weights", "[1, 1]"]
    assert main.main(arguments) != 0
    assert "data.mixing.weights.0 was 3.0 and is 1.0" in capsys.readouterr().err
