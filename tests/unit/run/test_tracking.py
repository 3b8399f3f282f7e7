from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from rlhf_dist.config.hosting import TrackingConfig
from rlhf_dist.core.errors import ConfigError, RunFolderError
from rlhf_dist.run import trackers
from rlhf_dist.run.console import RunProgress, format_number, print_table
from rlhf_dist.run.metrics import METRICS, UnknownMetricWarning, describe, is_clock, metrics_table
from rlhf_dist.run.run_folder import RunFolder
from rlhf_dist.run.trackers import Tracker, read_metrics

PLAIN = TrackingConfig()


def new_folder(path: Path) -> RunFolder:
    folder = RunFolder.open(path, resume=False, overwrite=False)
    folder.write_config("seed: 0\n")
    return folder


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else b"" for p in sorted(path.rglob("*"))}


# Metric names


def test_names_of_the_table_and_its_patterns():
    assert describe("policy/loss").meaning
    assert describe("time/generate_s").unit == "s"
    with pytest.raises(ConfigError, match="did you mean policy/approx_kl"):
        describe("policy/aprox_kl")
    for name in ("time/generate", "time/_s/x", "loss"):
        with pytest.raises(ConfigError):
            describe(name)
    assert is_clock("time/step_s")
    assert not is_clock("policy/loss")
    assert all(f"`{name}`" in metrics_table() for name in METRICS)


# Run folder


def test_a_new_folder_is_made_whole(tmp_path: Path):
    folder = new_folder(tmp_path / "a" / "b")
    assert {p.name for p in folder.path.iterdir()} == {"config.yaml", "samples", "checkpoints", "logs"}
    folder.write_summary({"b": 1, "a": "dạ"})
    assert json.loads(folder.summary_path.read_text(encoding="utf-8")) == {"b": 1, "a": "dạ"}
    assert not [p for p in folder.path.iterdir() if p.name.endswith(".tmp")]


def test_an_earlier_run_is_rejected_untouched(tmp_path: Path):
    folder = new_folder(tmp_path / "run")
    (folder.path / "metrics.jsonl").write_text('{"step": 0, "metrics": {}}\n', encoding="utf-8")
    before = snapshot(folder.path)
    with pytest.raises(RunFolderError, match=r"--resume auto .* --overwrite true"):
        RunFolder.open(folder.path, resume=False, overwrite=False)
    assert snapshot(folder.path) == before
    RunFolder.open(folder.path, resume=True, overwrite=False)
    assert snapshot(folder.path) == before


def test_a_run_that_failed_while_starting_does_not_hold_its_folder(tmp_path: Path):
    folder = new_folder(tmp_path / "run")
    (folder.logs_dir / "policy_0.log").write_text("last words", encoding="utf-8")
    RunFolder.open(folder.path, resume=False, overwrite=False)
    for left in ("metrics.jsonl", "04_ppo"):
        (folder.path / left).write_text("x", encoding="utf-8")
        with pytest.raises(RunFolderError):
            RunFolder.check(folder.path, resume=False, overwrite=False)
        (folder.path / left).unlink()


def test_overwrite_removes_the_run_but_not_what_links_point_to(tmp_path: Path):
    folder = new_folder(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x", encoding="utf-8")
    (folder.path / "link").symlink_to(outside)
    (folder.checkpoints_dir / "step_1").mkdir()
    RunFolder.open(folder.path, resume=False, overwrite=True)
    assert {p.name for p in folder.path.iterdir()} == {"samples", "checkpoints", "logs"}
    assert not list(folder.checkpoints_dir.iterdir())
    assert (outside / "kept").exists()


@pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (True, False), (False, True)])
def test_a_folder_of_other_things_is_never_taken(tmp_path: Path, resume: bool, overwrite: bool):
    (tmp_path / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(RunFolderError, match="holds no run"):
        RunFolder.open(tmp_path, resume=resume, overwrite=overwrite)
    assert snapshot(tmp_path) == {"thesis.tex": b"x"}


def test_check_makes_nothing(tmp_path: Path):
    RunFolder.check(tmp_path / "x" / "y", resume=False, overwrite=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunFolderError):
            RunFolder.check(path, resume=False, overwrite=False)


def test_a_folder_whose_run_ended_before_it_wrote_anything_is_free(tmp_path: Path):
    RunFolder.open(tmp_path / "run", resume=False, overwrite=False)
    RunFolder.check(tmp_path / "run", resume=False, overwrite=False)


# Trackers


def measured(step: int) -> dict[str, float]:
    return {"policy/loss": math.sin(step) / 3, "time/step_s": step / 7}


def run_steps(folder: RunFolder, first: int, last: int, resumed: int | None = None) -> None:
    tracker = Tracker(folder, PLAIN, resumed_step=resumed)
    for step in range(first, last + 1):
        tracker.log(step, measured(step))
        tracker.log_samples(step, [{"prompt": "p", "response": f"{step}", "score": 0.1, "kl": 0.2}])
    tracker.close()


@pytest.mark.parametrize("torn", ["", '{"step": 6, "metr'])
def test_a_resumed_run_leaves_what_an_uninterrupted_one_leaves(tmp_path: Path, torn: str):
    whole, broken = new_folder(tmp_path / "whole"), new_folder(tmp_path / "broken")
    run_steps(whole, 0, 8)
    run_steps(broken, 0, 5)
    with broken.metrics_path.open("a", encoding="utf-8") as file:
        file.write(torn)
    run_steps(broken, 4, 8, resumed=3)
    assert snapshot(broken.path) == snapshot(whole.path)
    assert [step for step, _ in read_metrics(broken.metrics_path)] == list(range(9))


def test_floats_are_exact_and_not_finite_ones_null(tmp_path: Path):
    folder = new_folder(tmp_path / "run")
    tracker = Tracker(folder, PLAIN)
    tracker.log(1, {"policy/loss": 0.1 + 0.2, "value/loss": math.nan, "value/grad_norm": math.inf})
    line = json.loads(folder.metrics_path.read_text(encoding="utf-8"))
    assert line == {"step": 1, "metrics": {"policy/loss": 0.1 + 0.2, "value/loss": None, "value/grad_norm": None}}
    assert math.isnan(read_metrics(folder.metrics_path)[0][1]["value/loss"])


def test_a_new_run_begins_with_empty_files(tmp_path: Path):
    folder = new_folder(tmp_path / "run")
    run_steps(folder, 0, 3)
    Tracker(folder, PLAIN).close()
    assert folder.metrics_path.read_text(encoding="utf-8") == ""
    assert not list(folder.samples_dir.iterdir())


def test_an_unknown_name_is_an_error_in_tests(tmp_path: Path):
    with pytest.raises(UnknownMetricWarning, match="not in the table"):  # by pyproject.toml
        Tracker(new_folder(tmp_path / "run"), PLAIN).log(1, {"policy/los": 1.0})


def test_an_unknown_name_warns_users_once_and_is_recorded(tmp_path: Path):
    folder = new_folder(tmp_path / "run")
    tracker = Tracker(folder, PLAIN)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for step in (1, 2):
            tracker.log(step, {"policy/los": 1.0, "policy/loss": None})  # pyright: ignore[reportArgumentType]
    assert [str(warning.message).partition(";")[0] for warning in found] == [
        "The metric 'policy/los' is not in the table of rlhf_dist/run/metrics.py",
        "The metric 'policy/loss' is None, which is no number",
    ]
    assert read_metrics(folder.metrics_path) == [(1, {"policy/los": 1.0}), (2, {"policy/los": 1.0})]


def test_a_step_has_one_line(tmp_path: Path):
    tracker = Tracker(new_folder(tmp_path / "run"), PLAIN)
    tracker.log(1, {"policy/loss": 1.0})
    with pytest.raises(ValueError, match="in one call"):
        tracker.log(1, {"value/loss": 1.0})


def test_samples_are_limited_and_readable(tmp_path: Path):
    folder = new_folder(tmp_path / "run")
    tracker = Tracker(folder, TrackingConfig(num_samples=2))
    tracker.log_samples(3, ({"prompt": "Thủ đô?", "response": str(i), "score": 0.5, "kl": 0.0} for i in range(9)))
    text = (folder.samples_dir / "step_000003.jsonl").read_text(encoding="utf-8")
    assert "Thủ đô?" in text
    assert [json.loads(line)["response"] for line in text.splitlines()] == ["0", "1"]


def test_a_broken_metrics_file_names_the_line(tmp_path: Path):
    folder = new_folder(tmp_path / "run")
    folder.metrics_path.write_text('{"step": 1, "metrics": {}}\nnonsense\n', encoding="utf-8")
    with pytest.raises(RunFolderError, match="line 2"):
        Tracker(folder, PLAIN, resumed_step=3)


def test_tensorboard_has_the_numbers(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = new_folder(tmp_path / "run")
    for first, last, resumed in ((0, 4, None), (3, 5, 2)):
        tracker = Tracker(folder, TrackingConfig(tensorboard=True), resumed_step=resumed)
        for step in range(first, last + 1):
            tracker.log(step, {"policy/loss": step / 2})
        tracker.close()
    events = EventAccumulator(str(folder.logs_dir / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("policy/loss")] == [(i, i / 2) for i in range(6)]


WANDB_RUN = """
import sys
from pathlib import Path
from rlhf_dist.config.hosting import TrackingConfig
from rlhf_dist.run.run_folder import RunFolder
from rlhf_dist.run import trackers
trackers._WANDB_INIT_S = 3.0
folder = RunFolder.open(Path(sys.argv[1]), resume=True, overwrite=False)
folder.write_config("seed: 0")
tracker = trackers.Tracker(folder, TrackingConfig(wandb=sys.argv[2]), config={"seed": 0})
tracker.log(1, {"policy/loss": 1.0})
tracker.close()
"""


@pytest.mark.parametrize("key", [None, "a" * 40], ids=["no login", "no server"])
def test_wandb_online_falls_back_to_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None):
    """In a process of its own, at an address where no server listens: wandb keeps a service and global state."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    done = subprocess.run(
        [sys.executable, "-c", WANDB_RUN, str(tmp_path / "run"), "online"],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert "writing offline" in done.stderr
    folder = RunFolder(tmp_path / "run")
    assert read_metrics(folder.metrics_path) == [(1, {"policy/loss": 1.0})]
    [offline] = (folder.logs_dir / "wandb").glob("offline-run-*")
    run_id = (folder.logs_dir / "wandb_run_id").read_text(encoding="utf-8")
    assert offline.name.endswith(run_id)
    assert list(offline.glob("run-*.wandb"))


def test_a_failing_service_is_dropped_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    class FullDisk:
        def log(self, step: int, metrics: object) -> None:
            raise OSError("no space left")

        def close(self) -> None:
            raise AssertionError("closed after it was dropped")

    monkeypatch.setattr(trackers, "_TensorBoard", lambda *_: FullDisk())
    folder = new_folder(tmp_path / "run")
    tracker = Tracker(folder, TrackingConfig(tensorboard=True))
    tracker.log(1, {"policy/loss": 1.0})
    tracker.log(2, {"policy/loss": 1.0})
    tracker.close()
    assert len(read_metrics(folder.metrics_path)) == 2
    assert caplog.text.count("no space left") == 1


def test_what_only_shows_or_records_never_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    class Unreadable:
        def __repr__(self) -> str:
            raise ValueError("no words for it")

    def broken(*_: object) -> None:
        raise OSError("no space left")

    folder = new_folder(tmp_path / "run")
    monkeypatch.setattr(trackers, "_TensorBoard", broken)
    monkeypatch.setattr(trackers, "_wandb_sink", broken)
    tracker = Tracker(folder, TrackingConfig(tensorboard=True, wandb="offline"))
    tracker.log_samples(1, [{"prompt": Unreadable()}])
    monkeypatch.setattr(trackers, "write_atomically", broken)
    tracker.log_samples(2, [{"prompt": "p"}])
    tracker.log(2, {"policy/loss": 1.0})
    tracker.close()
    assert len(caplog.records) == 4
    assert read_metrics(folder.metrics_path) == [(2, {"policy/loss": 1.0})]


# Terminal


def test_a_terminal_that_is_gone_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    with RunProgress("ppo", total=2) as progress:
        progress.advance()
        progress.line(1, {"policy/loss": 1.0}, ["policy/loss"])
    print_table("after", [("a", "b")])


def test_a_log_file_gets_lines_without_control_characters(capsys: pytest.CaptureFixture[str]):
    with RunProgress("ppo", total=20) as progress:
        with progress.phase("update"), progress.phase("mini-batches"):
            progress.advance()
        progress.line(
            1, {"reward/score_mean": 0.123456, "kl/coef": 0.05}, ["reward/score_mean", "kl/coef", "value/loss"]
        )
        progress.message("a [b] c")
    print_table("after [x]", [("gold", "[1.5]"), ("a" * 200, "2")], header=("name", "value"))
    out = capsys.readouterr().out
    assert "ppo  1/20  score_mean 0.1235  coef 0.05\na [b] c\n" in out
    assert "[1.5]" in out
    assert "after [x]" in out
    assert out.count("a" * 50) >= 1
    assert all(c == "\n" or c.isprintable() for c in out)
    assert "".join(out.split("|")).count("a") >= 200, "long cells wrap, nothing is cut off"


def test_names_that_would_be_confused_are_written_out(capsys: pytest.CaptureFixture[str]):
    names = ["policy/loss", "value/loss", "policy/entropy"]
    with RunProgress("ppo", total=2) as progress:
        progress.line(2, dict.fromkeys(names, 1.5), names)
    assert capsys.readouterr().out == "ppo 2/2  policy/loss 1.5  value/loss 1.5  entropy 1.5\n"


def test_numbers():
    assert [format_number(v) for v in (3.0, 0.000012345, 12345.678, math.nan, 2e9)] == [
        "3",
        "1.234e-05",
        "1.235e+04",
        "nan",
        "2e+09",
    ]
