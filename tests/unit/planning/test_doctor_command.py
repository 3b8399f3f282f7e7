"""The doctor's report: order, exit code, JSON; and the real command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.planning.doctor import command as doctor
from rlhf_dist.planning.doctor.findings import VERDICTS, Finding

SOUND = [
    Finding("ok", "torch", "2.13", "", "torch"),
    Finding("warning", "open files", "1024", "ulimit -n 65536", "limits"),
]
BROKEN = [*SOUND, Finding("error", "ray", "is not installed", "pip install ray", "packages")]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch):
    """Make `examine` find these."""

    def make(findings: list[Finding]) -> None:
        monkeypatch.setattr(doctor, "examine", lambda deep: findings)

    return make


def test_warnings_are_no_failure(found, capsys: pytest.CaptureFixture[str]):
    found(SOUND)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "warning open files: 1024\n          → ulimit -n 65536" in out
    assert "1 ok, 0 note, 1 warning, 0 error" in out


def test_an_error_is_one(found, capsys: pytest.CaptureFixture[str]):
    found(BROKEN)
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "error   ray: is not installed" in captured.out
    assert captured.err == "error: 1 of 3 checks found an error (ray); do what their lines say\n"


def test_json_is_all_of_stdout(found, capsys: pytest.CaptureFixture[str]):
    found(BROKEN)
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["counts"] == {"ok": 1, "note": 0, "warning": 1, "error": 1}
    assert report["findings"][2] == {
        "section": "packages",
        "name": "ray",
        "verdict": "error",
        "found": "is not installed",
        "remedy": "pip install ray",
    }


def test_an_unknown_option_is_rejected(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--deeper"]) == 2
    assert "--deeper" in capsys.readouterr().err


def test_the_real_command_looks_at_everything_and_prints_only_its_report():
    command = [sys.executable, "-m", "rlhf_dist.cli.main", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    report = json.loads(done.stdout)
    findings = report["findings"]
    assert done.returncode == (1 if report["counts"]["error"] else 0)
    assert {finding["verdict"] for finding in findings} <= set(VERDICTS)
    assert {finding["section"] for finding in findings} == {section for section, *_ in doctor.CHECKS}
    assert not [finding for finding in findings if finding["name"] == "the check itself"], findings
    assert "Traceback" not in done.stderr
    # What these tests themselves run on is there.
    fine = {finding["name"] for finding in findings if finding["verdict"] == "ok"}
    assert {"Python", "torch", "deepspeed", "ray", "gloo", "DeepSpeed"} <= fine
