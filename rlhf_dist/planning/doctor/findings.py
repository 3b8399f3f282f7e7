"""What a check of the machine found, and how it is shown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Verdict = Literal["ok", "note", "warning", "error"]
VERDICTS: tuple[Verdict, ...] = ("ok", "note", "warning", "error")
"""ok: as it should be. note: worth knowing. warning: some runs will fail or be slow. error: no run will work."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    verdict: Verdict
    name: str
    """What was looked at."""
    found: str
    remedy: str = ""
    """What to do; "" where there is nothing to do."""
    section: str = ""


Check = Callable[[], Sequence[Finding]]


def run_check(section: str, check: Check, timeout_s: float) -> list[Finding]:
    """The findings of a check, under its section. It never raises and never hangs: a check that fails, or does not end in time,
    is a finding itself. (A thread that hangs in a system call is left behind; it does not keep the process from ending.)"""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(list(check()))
        except BaseException as error:  # whatever a broken library raises, SystemExit included
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        remedy = "something it asks (a file system, a driver, a name server) hangs: fix that first"
        return [Finding("warning", "the check itself", f"did not end within {timeout_s:g} s", remedy, section)]
    if isinstance(outcome[0], BaseException):
        error = outcome[0]
        said = (str(error).strip().splitlines() or [""])[0]
        return [Finding("warning", "the check itself", f"failed: {type(error).__name__}: {said}", "", section)]
    return [replace(finding, section=section) for finding in outcome[0]]


def lowest_is(limit: float, value: float, otherwise: Verdict) -> Verdict:
    """ok for a value of at least `limit`."""
    return "ok" if value >= limit else otherwise


def gib(num_bytes: float) -> str:
    """Bytes in GiB, for people."""
    return f"{num_bytes / 2**30:.1f} GiB"
