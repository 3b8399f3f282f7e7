"""The doctor's slow checks, on the real thing."""

from __future__ import annotations

import json
import subprocess
import sys


def test_two_processes_meet_and_a_private_ray_starts():
    command = [sys.executable, "-m", "rlhf_dist.cli.main", "doctor", "--deep", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    deep = {
        f["name"]: (f["verdict"], f["found"]) for f in json.loads(done.stdout)["findings"] if f["section"] == "deep"
    }
    assert deep == {
        "gloo all-reduce": ("ok", "two processes added two numbers"),
        "private Ray": ("ok", "started, ran a task, stopped"),
    }
