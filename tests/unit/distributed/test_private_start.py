"""A private Ray is started once more where Ray gives up on its own processes."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from rlhf_dist.core.errors import PlacementError
from rlhf_dist.distributed.ray.session import _short_folder, _start_private


class SlowStart:
    """In place of `ray.init`: fails as Ray does on a busy machine, `failures` times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls: list[str] = []

    def __call__(self, address: str, **_: Any) -> None:
        self.calls.append(address)
        if len(self.calls) <= self.failures:
            raise Exception("The current node timed out during startup.\nMore.")


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_twice_and_then_in_plain_words(failures: int, monkeypatch: pytest.MonkeyPatch):
    start = SlowStart(failures)
    monkeypatch.setattr(ray, "init", start)
    if failures == 2:
        with pytest.raises(PlacementError, match=r"tried twice \(The current node timed out during startup\.\)"):
            _start_private()
    else:
        _start_private()
    assert start.calls == ["local"] * min(failures + 1, 2)


@pytest.mark.parametrize(("length", "moved"), [(10, False), (39, False), (40, True), (90, True)])
def test_a_long_temporary_folder_is_not_used_for_sockets(length: int, moved: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/" + "t" * (length - 1))
    assert bool(_short_folder()) == moved
