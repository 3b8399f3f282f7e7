"""The supervised loop and its metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.roles import Answer, FakeTrained
from support.trainers import metrics, open_run, texts

from rlhf_dist.config.hosting import CheckpointConfig
from rlhf_dist.config.supervised import SupervisedSettings
from rlhf_dist.core.batches import PreferenceBatch
from rlhf_dist.core.errors import ConfigError, Preempted, SampleError
from rlhf_dist.core.steps import UpdateReport
from rlhf_dist.data.sampler import TRAINING_ORDER, EpochSampler
from rlhf_dist.evaluation.losses import chunks, mean_nll, nll_metrics
from rlhf_dist.reward.trainer import pair_metrics
from rlhf_dist.run.checkpoint import Checkpoints
from rlhf_dist.run.metrics import check_names
from rlhf_dist.run.supervised import Schedule, SupervisedTrainer, num_steps
from rlhf_dist.sft.trainer import PretrainingMix, SFTTask


class FakeTask:
    """In place of SFT: the loss is the model's state, and the state remembers every record."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.model = FakeTrained(self.events, "model")
        self.train = range(10)

    def update(self, step: int, indices: torch.Tensor) -> Answer:
        self.model.state = (self.model.state * 1.1 + float((indices * torch.arange(1, len(indices) + 1)).sum())) % 1000
        report = UpdateReport({"sft/loss": self.model.state}, 1)
        return self.model.answer("update", report, step, indices.tolist())

    def drawn(self, step: int, indices: torch.Tensor) -> dict[str, tuple[Any, torch.Tensor]]:
        return {"lm": (self.train, indices)}

    def evaluate(self) -> dict[str, float]:
        self.events.append(("evaluate",))
        return {"sft/eval_loss": self.model.state}


SETTINGS = SupervisedSettings(batch_size=4, eval_every_steps=2)


def trainer(run: Any, task: FakeTask) -> SupervisedTrainer:
    checkpoints = Checkpoints(run.folder.checkpoints_dir, CheckpointConfig(every_steps=2, at_end=False))
    return SupervisedTrainer(
        run,
        task,
        SETTINGS,
        Schedule(EpochSampler(len(task.train), run.seed, TRAINING_ORDER), 5, len(task.train)),
        checkpoints,
    )


def whole_run(path: Path) -> tuple[FakeTask, dict[str, Any]]:
    with open_run(path) as run:
        task = FakeTask()
        return task, trainer(run, task).run(resume=False)


def test_the_order_of_a_run(tmp_path: Path):
    task, summary = whole_run(tmp_path)
    names = [event[0] for event in task.events if event[0] != "wait"]
    step, evaluate, save = "model.update", "evaluate", "model.save"
    assert names == [evaluate, step, step, evaluate, save, step, step, evaluate, save, step, evaluate]
    logged = metrics(tmp_path)
    assert [step for step in logged if "sft/eval_loss" in logged[step]] == [0, 2, 4, 5]
    assert summary == {
        "num_steps": 5,
        "before": {"eval_loss": logged[0]["sft/eval_loss"]},
        "after": {"eval_loss": logged[5]["sft/eval_loss"]},
    }


def test_records_are_drawn_epoch_by_epoch(tmp_path: Path):
    task, _ = whole_run(tmp_path)
    drawn = [index for event in task.events if event[0] == "model.update" for index in event[2]]
    assert len(drawn) == 20
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))


def test_a_resumed_run_ends_where_the_whole_run_ends(tmp_path: Path):
    whole, summary = whole_run(tmp_path / "whole")
    path, task = tmp_path / "cut", FakeTask()
    healthy = task.update

    def killed_in_the_fourth(step: int, indices: torch.Tensor) -> Answer:
        if step == 3:
            raise KeyboardInterrupt
        return healthy(step, indices)

    task.update = killed_in_the_fourth
    with open_run(path) as run, pytest.raises(KeyboardInterrupt):
        trainer(run, task).run(resume=False)
    with open_run(path, resumed_step=2) as run:
        resumed = FakeTask()
        assert trainer(run, resumed).run(resume=True) == summary
    assert resumed.model.state == whole.model.state
    assert metrics(path) == metrics(tmp_path / "whole")
    steps = [event[1] for event in resumed.events if event[0] == "model.update"]
    assert steps == [2, 3, 4]
    assert resumed.events[0] == ("model.load",)


def test_a_run_that_is_asked_to_stop_ends_with_a_checkpoint_and_continues(tmp_path: Path):
    whole, summary = whole_run(tmp_path / "whole")
    path, task = tmp_path / "cut", FakeTask()
    asked = lambda: ("model.update", 2) in [event[:2] for event in task.events]  # noqa: E731  (in the third step)
    with (
        open_run(path, stop_requested=asked) as run,
        pytest.raises(Preempted, match=r"after step 3 of 5.*--resume auto"),
    ):
        trainer(run, task).run(resume=False)
    assert (
        Checkpoints(path / "checkpoints", CheckpointConfig(keep_last=2)).latest()
        == path / "checkpoints" / "step_000003"
    )
    with open_run(path, resumed_step=3) as run:
        resumed = FakeTask()
        assert trainer(run, resumed).run(resume=True) == summary
    assert resumed.model.state == whole.model.state
    assert metrics(path) == metrics(tmp_path / "whole")


def test_a_request_during_the_last_step_comes_too_late(tmp_path: Path):
    task = FakeTask()
    asked = lambda: ("model.update", 4) in [event[:2] for event in task.events]  # noqa: E731
    with open_run(tmp_path, stop_requested=asked) as run:
        assert trainer(run, task).run(resume=False)["num_steps"] == 5


def test_a_run_resumed_after_its_last_step_has_the_same_summary(tmp_path: Path):
    with open_run(tmp_path) as run:
        task = FakeTask()
        first = trainer(run, task)
        first.checkpoints.settings = CheckpointConfig()  # nobody set anything
        summary = first.run(resume=False)
    with open_run(tmp_path, resumed_step=5) as run:
        assert trainer(run, FakeTask()).run(resume=True) == summary


def test_resume_without_a_checkpoint_begins_anew(tmp_path: Path):
    with open_run(tmp_path) as run:
        task = FakeTask()
        assert trainer(run, task).run(resume=True)["num_steps"] == 5
    assert task.events[0] == ("evaluate",)


@pytest.mark.parametrize(
    ("settings", "records", "expected"),
    [
        ({"batch_size": 4}, 10, 3),  # the last batch of an epoch is filled from the next
        ({"batch_size": 5}, 10, 2),
        ({"batch_size": 4, "num_epochs": 0.01}, 10, 1),
        ({"batch_size": 4, "num_epochs": 2.5}, 10, 7),
        ({"batch_size": 4, "num_steps": 100}, 10, 100),
    ],
)
def test_num_steps(settings: dict[str, Any], records: int, expected: int):
    assert num_steps(SupervisedSettings(**settings), records, "sft") == expected


def test_a_batch_larger_than_the_set_is_rejected():
    with pytest.raises(ConfigError, match=r"sft\.batch_size is 11 but the training set has 10 records; lower it"):
        num_steps(SupervisedSettings(batch_size=11), 10, "sft")


class Numbered:
    """A set whose batches are the indices themselves."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        return indices


def test_chunks_cover_a_set_once():
    parts = list(chunks(1200))
    assert [len(part) for part in parts] == [512, 512, 176]
    assert torch.equal(torch.cat(parts), torch.arange(1200))


def test_the_mean_loss_weighs_targets_and_not_chunks():
    class Scorer:
        def evaluate(self, batch: torch.Tensor) -> Answer:
            # Record i has i targets of 2 nats each in the first chunk, of 4 nats in the second.
            targets = float(batch.sum())
            return Answer([], "", {"nll": targets * (2 if batch[0] == 0 else 4), "num_targets": targets})

    first, second = sum(range(512)), sum(range(512, 700))
    assert mean_nll(Scorer(), Numbered(700)) == pytest.approx((2 * first + 4 * second) / (first + second))


class Grouped(Numbered):
    """Item i has i + 1 targets of i nats; even and odd ones are two groups."""

    def __init__(self, num: int) -> None:
        super().__init__(num)
        self.groups = {"source/even": torch.arange(0, num, 2), "task/odd": torch.arange(1, num, 2)}


class NatsOfItems:
    """In place of a model, over `Grouped`."""

    def evaluate(self, batch: torch.Tensor) -> Answer:
        targets = batch + 1.0
        return Answer([], "", {"nll": float((batch * targets).sum()), "num_targets": float(targets.sum())})


def test_the_loss_of_groups_is_over_their_own_targets_and_the_whole_over_all():
    found = nll_metrics(NatsOfItems(), Grouped(1201), "sft/eval_loss")

    def mean(items: range) -> float:
        return sum(i * (i + 1) for i in items) / sum(i + 1 for i in items)

    assert found.keys() == {"sft/eval_loss", "sft/eval_loss/source/even", "sft/eval_loss/task/odd"}
    assert found["sft/eval_loss"] == pytest.approx(mean(range(1201)))
    assert found["sft/eval_loss/source/even"] == pytest.approx(mean(range(0, 1201, 2)))
    assert found["sft/eval_loss/task/odd"] == pytest.approx(mean(range(1, 1201, 2)))
    check_names(found)
    one = Grouped(10)
    one.groups = {"source/all": torch.arange(10)}
    assert nll_metrics(NatsOfItems(), one, "sft/eval_loss").keys() == {"sft/eval_loss"}


class FakeLanguageModel(FakeTrained):
    """In place of a language model: keeps what a step is asked for; every target costs a nat, of text two."""

    def update(self, batch: Any, step: int, text: Any = None, text_coef: float = 0.0) -> Answer:
        report = UpdateReport({"sft/loss": 1.0} | ({} if text is None else {"sft/pretraining_loss": 2.0}), 1)
        return self.answer("update", report, step, batch.tokens, None if text is None else text.tokens, text_coef)

    def evaluate(self, batch: Any) -> Answer:
        return Answer([], "", {"nll": float(batch.num_targets), "num_targets": float(batch.num_targets)})


def test_every_step_takes_its_text_by_its_number(tmp_path: Path):
    events: list[tuple[Any, ...]] = []
    sampler = EpochSampler(7, 3, "text")
    mix = PretrainingMix(texts(7), texts(4), per_step=3, coef=0.25, sampler=sampler)
    task = SFTTask(FakeLanguageModel(events, "model"), texts(10), None, mix)
    with open_run(tmp_path) as run:
        summary = trainer(run, task).run(resume=False)  # pyright: ignore[reportArgumentType]
    updates = [event for event in events if event[0] == "model.update"]
    assert [event[4] for event in updates] == [0.25] * 5
    for step, event in enumerate(updates):
        assert torch.equal(event[3], texts(7).batch(sampler.indices(3 * step, 3)).tokens)
    logged = metrics(tmp_path)
    assert all(logged[step]["sft/pretraining_loss"] == 2.0 for step in range(1, 6))
    assert [step for step in logged if "sft/eval_pretraining_loss" in logged[step]] == [0, 2, 4, 5]
    assert summary["after"] == {"eval_pretraining_loss": 1.0}


def test_text_that_a_step_was_rejected_for_is_named_by_its_number_in_the_text(tmp_path: Path):
    sampler = EpochSampler(7, 3, "text")
    task = SFTTask(FakeLanguageModel([], "model"), texts(10), None, PretrainingMix(texts(7), None, 3, 1.0, sampler))

    def reject(*_: Any) -> Answer:
        raise SampleError("model: a loss is not finite.", {"lm": [0], "pretraining": [2]}, step=0)

    task.model.update = reject  # pyright: ignore[reportAttributeAccessIssue]
    with open_run(tmp_path) as run, pytest.raises(SampleError, match="not finite"):
        trainer(run, task).run(resume=False)  # pyright: ignore[reportArgumentType]
    rows = [json.loads(line) for line in (tmp_path / "aborted_step_000001.jsonl").read_text("utf-8").splitlines()]
    drawn = EpochSampler(10, 3, "training order").indices(0, 4)
    assert [(row["source"], row["record"]) for row in rows] == [
        ("lm", int(drawn[0])),
        ("pretraining", int(sampler.indices(0, 3)[2])),
    ]


def test_the_order_of_records_may_be_another(tmp_path: Path):
    class Backwards:
        num_items = 10

        def indices(self, start: int, count: int) -> torch.Tensor:
            return 9 - torch.arange(start, start + count) % 10

    task = FakeTask()
    with open_run(tmp_path) as run:
        checkpoints = Checkpoints(run.folder.checkpoints_dir, CheckpointConfig(every_steps=2, at_end=False))
        SupervisedTrainer(run, task, SETTINGS, Schedule(Backwards(), 2, 10), checkpoints).run(resume=False)
    assert [event[2] for event in task.events if event[0] == "model.update"] == [[9, 8, 7, 6], [5, 4, 3, 2]]


class Rankings(Numbered):
    """Record i is the ranking i of `ranks`."""

    def __init__(self, ranks: list[list[int]]) -> None:
        super().__init__(len(ranks))
        self.all = PreferenceBatch.of([[[1 + i]] * len(row) for i, row in enumerate(ranks)], ranks=ranks)

    def batch(self, indices: torch.Tensor) -> PreferenceBatch:
        return self.all.rows(indices)


def scorer(scores: list[list[float]]):
    """Scores by the number that is in each sequence."""

    def score(batch: PreferenceBatch) -> torch.Tensor:
        rows = [scores[int(number) - 1] for number in batch.tokens[:, 0, 0]]
        return torch.tensor([row + [99.0] * (batch.present.shape[1] - len(row)) for row in rows])

    return score


def test_pair_metrics_by_hand():
    found = pair_metrics(scorer([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [0.5, 0.0]]), Rankings([[0, 1]] * 4))
    margins = [1.0, -2.0, 0.0, 0.5]
    assert found["reward_model/eval_accuracy"] == 2.5 / 4  # a tie is a coin toss
    assert found["reward_model/eval_margin"] == -0.125
    assert found["reward_model/eval_loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 4)


def test_pair_metrics_of_rankings_weigh_prompts_and_leave_ties_out():
    ranks, scores = [[0, 1], [0, 1, 1], [0, 1, 2]], [[1.0, 0.0], [2.0, 3.0, 2.0], [4.0, 2.0, 1.0]]
    margins = [[1.0], [-1.0, 0.0], [2.0, 3.0, 1.0]]  # the tied responses of the second are not compared
    found = pair_metrics(scorer(scores), Rankings(ranks))
    assert found["reward_model/eval_margin"] == pytest.approx((1 - 0.5 + 2) / 3)
    assert found["reward_model/eval_accuracy"] == pytest.approx((1 + 0.25 + 1) / 3)
    losses = [sum(math.log1p(math.exp(-m)) for m in row) / len(row) for row in margins]
    assert found["reward_model/eval_loss"] == pytest.approx(sum(losses) / 3)


def test_pair_metrics_weigh_records_and_not_chunks():
    scores = [[1.0, 0.0]] * 512 + [[0.0, 1.0, 2.0]] * 8  # the second chunk is small, and its rankings are longer
    found = pair_metrics(scorer(scores), Rankings([list(range(len(row))) for row in scores]))
    assert found["reward_model/eval_accuracy"] == pytest.approx(512 / 520)


def test_an_aborted_step_names_and_keeps_its_training_records(tmp_path: Path):
    task = FakeTask()
    task.train = texts(10)  # pyright: ignore[reportAttributeAccessIssue]
    drawn: list[list[int]] = []

    def update(step: int, indices: torch.Tensor) -> Answer:
        drawn.append(indices.tolist())
        if step == 1:
            raise SampleError("model: a loss is not finite.", {"lm": [1, 3]}, step=0)
        return task.model.answer("update", UpdateReport({}, 1))

    task.update = update
    with open_run(tmp_path) as run, pytest.raises(SampleError, match=r"not finite\. Samples: .*aborted_step_000002"):
        trainer(run, task).run(resume=False)
    rows = [json.loads(line) for line in (tmp_path / "aborted_step_000002.jsonl").read_text("utf-8").splitlines()]
    assert [row["record"] for row in rows] == [drawn[1][1], drawn[1][3]]
    batch = texts(10).batch(torch.tensor(drawn[1]))
    assert rows[1]["tokens"] == batch.tokens[3, : batch.lengths[3]].tolist()
