"""Checks that fail or hang are findings; wandb in every state."""

from __future__ import annotations

import importlib.metadata
import threading
from pathlib import Path

import pytest

from rlhf_dist.planning.doctor.findings import Finding, run_check
from rlhf_dist.planning.doctor.wandb_checks import check_wandb


def test_findings_come_under_their_section():
    found = run_check("disk", lambda: [Finding("ok", "a", "1"), Finding("note", "b", "2", "do")], timeout_s=5)
    assert found == [Finding("ok", "a", "1", "", "disk"), Finding("note", "b", "2", "do", "disk")]


@pytest.mark.parametrize("error", [RuntimeError("driver\nmore"), SystemExit(3), KeyError("x")])
def test_a_check_that_fails_is_a_finding(error: BaseException):
    def check():
        raise error

    (found,) = run_check("torch", check, timeout_s=5)
    assert found.verdict == "warning"
    assert type(error).__name__ in found.found
    assert "more" not in found.found


def test_a_check_that_hangs_is_a_finding():
    release = threading.Event()
    (found,) = run_check("network", lambda: [Finding("ok", "x", str(release.wait(30)))], timeout_s=0.1)
    release.set()
    assert (found.verdict, "did not end within 0.1 s" in found.found) == ("warning", True)


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_wandb(monkeypatch: pytest.MonkeyPatch, logged_out: Path):
    (found,) = check_wandb()
    assert (found.verdict, "not logged in" in found.found, "wandb login" in found.remedy) == ("note", True, True)
    logged_out.write_text("machine api.wandb.ai login user password secret\n", encoding="utf-8")
    (found,) = check_wandb()
    assert (found.verdict, "secret" in str(found)) == ("ok", False)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert check_wandb()[0].verdict == "note"
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    (found,) = check_wandb()
    assert (found.verdict, "=secret" in str(found)) == ("ok", False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert (check_wandb()[0].verdict, "offline" in check_wandb()[0].found) == ("note", True)


def test_wandb_is_optional(monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert check_wandb()[0].verdict == "note"
