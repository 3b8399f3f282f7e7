"""Checkpoints: whole or not there."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.roles import FailsToSave, FakeTrained

from rlhf_dist.config.hosting import CheckpointConfig
from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.run.checkpoint import Checkpoints, RunRecord, step_of


def model(state: float = 0.0) -> FakeTrained:
    fake = FakeTrained([], "model")
    fake.state = state
    return fake


def test_what_was_saved_is_loaded(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2))
    assert checkpoints.latest() is None
    path = checkpoints.save(10, {"before": {"loss": 0.1 + 0.2}}, {"policy": model(1.5), "value": model(2.5)})
    assert checkpoints.latest() == path
    assert step_of(path) == 10
    policy, value = model(), model()
    assert checkpoints.load(path, {"policy": policy, "value": value}) == {
        "step": 10,
        "before": {"loss": 0.1 + 0.2},
        "run": asdict(RunRecord()),
    }
    assert (policy.state, value.state) == (1.5, 2.5)


def test_the_newest_few_stay(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2))
    for step in (1, 5, 9, 10, 11):
        checkpoints.save(step, {}, {"model": model(step)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000010", "step_000011"]


def test_steps_are_ordered_as_numbers(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=1))
    for step in (999_999, 1_000_000):
        checkpoints.save(step, {}, {"model": model()})
    assert [step_of(p) for p in tmp_path.iterdir()] == [1_000_000]


def test_one_that_was_being_written_is_not_taken_for_whole(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2))
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
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=1))
    good = checkpoints.save(1, {}, {"model": model()})
    with pytest.raises(RunFolderError):
        checkpoints.save(2, {}, {"model": FailsToSave([], "bad")})
    assert good.is_dir()


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2))
    checkpoints.save(1, {}, {"model": model(1)})
    path = checkpoints.save(1, {}, {"model": model(2)})
    loaded = model()
    checkpoints.load(path, {"model": loaded})
    assert loaded.state == 2


def test_a_broken_driver_file_is_rejected_before_any_model_is_touched(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2))
    path = checkpoints.save(1, {}, {"model": model(1)})
    (path / "driver.json").write_text('{"step": 1', encoding="utf-8")
    loaded = model(7)
    with pytest.raises(RunFolderError, match=r"step_000001 has no readable driver\.json .*; remove that folder"):
        checkpoints.load(path, {"model": loaded})
    assert loaded.state == 7
    assert loaded.events == []


def test_a_folder_without_a_driver_file_is_no_checkpoint(tmp_path: Path):
    (tmp_path / "step_000003").mkdir()
    assert Checkpoints(tmp_path, CheckpointConfig(keep_last=1)).latest() is None


def test_all_models_write_at_the_same_time(tmp_path: Path):
    events: list = []
    models = {name: FakeTrained(events, name) for name in ("policy", "value")}
    Checkpoints(tmp_path, CheckpointConfig(keep_last=1)).save(1, {}, models)
    assert [event[0] for event in events] == ["policy.save", "value.save", "wait", "wait"]


def saved(tmp_path: Path, step: int = 3, **then: Any) -> Path:
    return Checkpoints(tmp_path, record=RunRecord(**then)).save(step, {}, {"model": model()})


def check(path: Path, **now: Any) -> None:
    Checkpoints(path.parent, record=RunRecord(**now)).check(path)


def test_another_runs_checkpoint_is_rejected_by_name_of_what_differs(tmp_path: Path):
    path = saved(tmp_path, identity={"seed": 1, "sft.batch_size": 8}, num_steps=5)
    check(path, identity={"sft.batch_size": 8, "seed": 1}, num_steps=5)
    with pytest.raises(RunFolderError, match=r"sft.batch_size was 8 and is 4. Undo the change, or start a new run"):
        check(path, identity={"seed": 1, "sft.batch_size": 4}, num_steps=5)


def test_a_run_is_extended_but_not_cut_below_what_is_done(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = saved(tmp_path, num_steps=5)
    for steps in (3, 4, 9):
        check(path, num_steps=steps)
    assert not caplog.records
    with pytest.raises(RunFolderError, match=r"at step 3.* end at step 2 \(sft.num_steps 2\).* at least 3"):
        check(path, num_steps=2, length={"sft.num_steps": 2})


def test_a_schedule_that_spans_the_run_changes_with_its_length_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    schedules = {"model": "cosine"}
    path = saved(tmp_path, num_steps=5, schedules=schedules)
    check(path, num_steps=5, schedules=schedules)
    assert not caplog.records
    check(path, num_steps=9, schedules=schedules)
    assert "from step 3 on, the learning rate of model (cosine) follows the schedule of 9 steps" in caplog.text


def test_deepspeeds_form_is_no_matter_of_the_result(tmp_path: Path):
    path = saved(tmp_path, checkpoint_format={"model.num_ranks": 2}, num_steps=5)
    with pytest.raises(
        RunFolderError, match=r"model.num_ranks was 2 and is 4. The result would be the same.* set these back"
    ):
        check(path, checkpoint_format={"model.num_ranks": 4}, num_steps=5)


def test_a_patch_release_resumes_in_silence_and_a_minor_one_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = saved(tmp_path, version="1.2.3", num_steps=5)
    check(path, version="1.2.4", num_steps=5)
    assert not caplog.records
    check(path, version="1.3.0", num_steps=5)
    assert "written by rlhf_dist 1.2.3, and this is 1.3.0" in caplog.text


def test_checkpoints_are_due_by_time_by_steps_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr("rlhf_dist.run.checkpoint.time.monotonic", lambda: clock[0])
    by_time = Checkpoints(tmp_path)
    assert not by_time.due(1, 9)
    assert by_time.due(9, 9)
    clock[0] += 15 * 60
    assert by_time.due(2, 9)
    by_time.save(2, {}, {"model": model()})
    assert not by_time.due(3, 9)
    by_steps = Checkpoints(tmp_path, CheckpointConfig(every_steps=3, every_minutes=0, at_end=False))
    clock[0] += 1e9
    assert [step for step in range(1, 9) if by_steps.due(step, 8)] == [3, 6]


def test_ranks_that_write_elsewhere_do_not_make_a_checkpoint(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=1))
    good = checkpoints.save(1, {}, {"model": model()})
    lost = model()
    lost.save_checkpoint = lambda path: model().save_checkpoint(tmp_path.parent / "another node" / path.name)
    with pytest.raises(RunFolderError, match=r"wrote nothing to .* storage that all nodes share"):
        checkpoints.save(2, {}, {"model": lost})
    assert checkpoints.latest() == good


def test_a_later_save_removes_what_a_failed_one_left(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(RunFolderError, match="disk full"):
        checkpoints.save(2, {}, {"model": model(2), "bad": FailsToSave([], "bad")})
    checkpoints.save(5, {}, {"model": model(5)})
    assert [path.name for path in tmp_path.iterdir()] == ["step_000005"]


def test_a_record_of_another_release_is_read_and_none_is_an_error(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, record=RunRecord(num_steps=9))
    path = checkpoints.save(1, {}, {"model": model()})
    file = path / "driver.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(written | {"run": written["run"] | {"of_a_newer_release": 1}}), encoding="utf-8")
    checkpoints.check(path)
    del written["run"]
    file.write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(RunFolderError, match="no 'run'"):
        checkpoints.check(path)
