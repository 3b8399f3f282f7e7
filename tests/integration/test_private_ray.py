"""A run's own Ray: nobody else's is joined, and nobody else gets in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow]

_RUN = """
import os, subprocess, sys
from rlhf_dist.cluster.session import RaySession
from rlhf_dist.config import RayConfig

session = RaySession(RayConfig(), "cpu")
session._connect()
import ray

@ray.remote
def works():
    return os.environ["RAY_AUTH_TOKEN"] == token

token = os.environ["RAY_AUTH_TOKEN"]
assert ray.get(works.remote())
address = ray.get_runtime_context().gcs_address
join = f"import ray; ray.init({address!r}, logging_level='CRITICAL'); print('joined')"
environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
for given in ({}, {"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_TOKEN": token}):
    given = given and given | {"RAY_AUTH_MODE": "token"}
    done = subprocess.run([sys.executable, "-c", join], env=environment | given, capture_output=True, text=True)
    print("joined" in done.stdout)
session.close()
"""


def test_it_has_a_token_that_no_file_holds(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "HOME": str(tmp_path),
        "RAY_ADDRESS": "192.0.2.1:6379",
    }  # a stranger's cluster, which must not be joined
    done = subprocess.run(
        [sys.executable, "-c", _RUN], env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False", "True"]
    assert not (tmp_path / ".ray" / "auth_token").exists()
