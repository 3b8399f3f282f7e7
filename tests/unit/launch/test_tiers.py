"""The table of tiers names tests that exist: a renamed one must not fall silently into another tier."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import TIERS, tier_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_every_line_of_the_table_has_tests_of_its_own():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)
    tests = [line.removeprefix("tests/") for line in done.stdout.splitlines() if line.startswith("tests/")]
    first = [next((pattern for pattern, _ in TIERS if re.match(pattern, test)), None) for test in tests]
    assert [pattern for pattern, _ in TIERS if pattern not in first] == []


def test_the_first_line_that_matches_decides():
    assert (
        tier_of("integration/test_slurm.py::test_a_preempted_job_is_requeued_and_ends_as_if_nothing_had_been") == "slow"
    )
    assert tier_of("integration/test_slurm.py::test_another") == "matrix"
    assert tier_of("unit/core/test_random.py::test_any") is None
