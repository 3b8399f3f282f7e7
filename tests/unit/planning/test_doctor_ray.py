"""What the doctor says of Ray's token and address."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rlhf_dist.planning.doctor import ray_checks as doctor


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home directory without a token, and an environment that says nothing of one."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def token(home: Path, mode: int, text: str = "secret") -> Path:
    file = home / ".ray" / "auth_token"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)
    return file


def verdict_and_text() -> tuple[str, str]:
    (found,) = doctor.check_token()
    return found.verdict, f"{found.found} | {found.remedy}"


def test_no_token_yet(home: Path):
    verdict, text = verdict_and_text()
    assert (verdict, doctor.GENERATE in text) == ("note", True)


@pytest.mark.parametrize(("mode", "expected"), [(0o600, "ok"), (0o400, "ok"), (0o644, "warning"), (0o660, "warning")])
def test_a_token_is_for_its_owner_alone(home: Path, mode: int, expected: str):
    file = token(home, mode)
    verdict, text = verdict_and_text()
    assert verdict == expected
    assert "secret" not in text
    assert expected == "ok" or f"chmod 600 {file}" in text


def test_an_empty_token_is_an_error(home: Path):
    token(home, 0o600, " \n")
    assert verdict_and_text()[0] == "error"


def test_a_token_in_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    verdict, text = verdict_and_text()
    assert (verdict, "secret" in text) == ("ok", False)


def test_a_path_that_is_not_there_is_an_error(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "none"))
    verdict, text = verdict_and_text()
    assert (verdict, f"{home / 'none'} is no file" in text) == ("error", True)


@pytest.mark.parametrize(("mode", "expected"), [("disabled", "warning"), ("tokn", "error"), ("token", "note")])
def test_modes(home: Path, monkeypatch: pytest.MonkeyPatch, mode: str, expected: str):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert verdict_and_text()[0] == expected


@pytest.mark.parametrize(("address", "verdict"), [("10.1.2.3", "ok"), ("127.0.0.1", "note"), ("::1", "note")])
def test_address(home: Path, monkeypatch: pytest.MonkeyPatch, address: str, verdict: str):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: address)
    (found,) = doctor.check_address()
    assert (found.verdict, found.name) == (verdict, "Ray address")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert doctor.check_address()[1].found == "10.0.0.1:6379"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print('a task ran')", "started, ran a task, stopped"),
        ("import sys; sys.exit('no space left')", "no space left"),
        ("import time; time.sleep(60)", "did not start within 2 s"),
    ],
)
def test_a_private_ray_that_starts_fails_or_hangs(monkeypatch: pytest.MonkeyPatch, program: str, said: str):
    """The real one is started in tests/integration/test_doctor_deep.py."""
    real = subprocess.Popen

    def other(command, **options):
        return real([*command[:2], program], **options)

    monkeypatch.setattr(subprocess, "Popen", other)
    monkeypatch.setattr(doctor, "START_S", 2)
    (found,) = doctor.check_private_ray()
    assert (found.verdict, found.found) == ("ok" if "started" in said else "error", said)
