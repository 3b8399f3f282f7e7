"""Checkpoints: whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.roles import FailsToSave, FakeTrained

from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.run.checkpoint import Checkpoints, step_of


def model(state: float = 0.0) -> FakeTrained:
    fake = FakeTrained([], "model")
    fake.state = state
    return fake


def test_what_was_saved_is_loaded(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.latest() is None
    path = checkpoints.save(10, {"before": {"loss": 0.1 + 0.2}}, {"policy": model(1.5), "value": model(2.5)})
    assert checkpoints.latest() == path
    assert step_of(path) == 10
    policy, value = model(), model()
    assert checkpoints.load(path, {"policy": policy, "value": value}) == {
        "step": 10,
        "before": {"loss": 0.1 + 0.2},
        "identity": {},
    }
    assert (policy.state, value.state) == (1.5, 2.5)


def test_the_newest_few_stay(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 5, 9, 10, 11):
        checkpoints.save(step, {}, {"model": model(step)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000010", "step_000011"]


def test_steps_are_ordered_as_numbers(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for step in (999_999, 1_000_000):
        checkpoints.save(step, {}, {"model": model()})
    assert [step_of(p) for p in tmp_path.iterdir()] == [1_000_000]


def test_one_that_was_being_written_is_not_taken_for_whole(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    good = checkpoints.save(1, {}, {"model": model(1)})
    with pytest.raises(RunFolderError, match="disk full"):
        checkpoints.save(2, {}, {"model": model(2), "bad": FailsToSave([], "bad")})
    assert checkpoints.latest() == good
    # A later attempt at the same step starts from nothing.
    whole = checkpoints.save(2, {}, {"model": model(3)})
    assert checkpoints.latest() == whole
    assert sorted(p.name for p in whole.iterdir()) == ["driver.json", "model"]
    assert not list(tmp_path.glob(".*"))


def test_the_old_one_goes_only_when_the_new_one_is_whole(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    good = checkpoints.save(1, {}, {"model": model()})
    with pytest.raises(RunFolderError):
        checkpoints.save(2, {}, {"model": FailsToSave([], "bad")})
    assert good.is_dir()


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(1, {}, {"model": model(1)})
    path = checkpoints.save(1, {}, {"model": model(2)})
    loaded = model()
    checkpoints.load(path, {"model": loaded})
    assert loaded.state == 2


def test_a_broken_driver_file_is_refused_before_any_model_is_touched(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    path = checkpoints.save(1, {}, {"model": model(1)})
    (path / "driver.json").write_text('{"step": 1', encoding="utf-8")
    loaded = model(7)
    with pytest.raises(RunFolderError, match=r"step_000001 has no readable driver\.json .*; remove that folder"):
        checkpoints.load(path, {"model": loaded})
    assert loaded.state == 7
    assert loaded.events == []


def test_a_folder_without_a_driver_file_is_no_checkpoint(tmp_path: Path):
    (tmp_path / "step_000003").mkdir()
    assert Checkpoints(tmp_path, keep_last=1).latest() is None


def test_all_models_write_at_the_same_time(tmp_path: Path):
    events: list = []
    models = {name: FakeTrained(events, name) for name in ("policy", "value")}
    Checkpoints(tmp_path, keep_last=1).save(1, {}, models)
    assert [event[0] for event in events] == ["policy.save", "value.save", "wait", "wait"]


def test_another_runs_checkpoint_is_refused_by_name_of_what_differs(tmp_path: Path):
    path = Checkpoints(tmp_path, 2, {"seed": 1, "sft.batch_size": 8}).save(3, {}, {"model": model()})
    Checkpoints(tmp_path, 2, {"sft.batch_size": 8, "seed": 1}).check(path)
    with pytest.raises(RunFolderError, match=r"sft.batch_size was 8 and is 4. Undo the change, or start a new run"):
        Checkpoints(tmp_path, 2, {"seed": 1, "sft.batch_size": 4}).check(path)


def test_ranks_that_write_elsewhere_do_not_make_a_checkpoint(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    good = checkpoints.save(1, {}, {"model": model()})
    lost = model()
    lost.save_checkpoint = lambda path: model().save_checkpoint(tmp_path.parent / "another node" / path.name)
    with pytest.raises(RunFolderError, match=r"wrote nothing to .* storage that all nodes share"):
        checkpoints.save(2, {}, {"model": lost})
    assert checkpoints.latest() == good
