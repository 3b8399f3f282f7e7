"""The process that hosts a rank."""

from __future__ import annotations

import subprocess
import sys


def test_a_rank_takes_over_its_environment_before_libraries_that_read_it_are_there():
    program = (
        "import sys, rlhf_dist.distributed.ray.actor; print(*{'torch', 'transformers', 'deepspeed'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []
