"""A run's own Ray: nobody else's is joined, nobody else gets in, and what is meant for the run does not end it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1]


def _run(program: str, *arguments: str, **variables: str) -> list[str]:
    """The words that `program` prints, in a session (and process group) of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(_TESTS), str(_TESTS.parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


_JOINED = """
import os, subprocess, sys
from rlhf_dist.distributed.ray.session import RaySession
from rlhf_dist.config.hosting import RayConfig

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
    # RAY_ADDRESS is a stranger's cluster, which must not be joined.
    assert _run(_JOINED, HOME=str(tmp_path), RAY_ADDRESS="192.0.2.1:6379") == ["False", "False", "True"]
    assert not (tmp_path / ".ray" / "auth_token").exists()


_HOSTED = """
import sys
from pathlib import Path
from rlhf_dist.distributed.group import WorkerSpec
from rlhf_dist.distributed.ray.session import RaySession
from rlhf_dist.config.hosting import Placement, RayConfig
from support.surroundings import Surroundings

def hosted(session, num_ranks=1, role="model"):
    spec = WorkerSpec(role, Placement(num_ranks=num_ranks), Surroundings)
    return session.place([spec], seed=0, logs_dir=lambda: Path(sys.argv[1]))
"""

_SIGNALLED = (
    _HOSTED
    + """
import os, signal, threading, time
import psutil, ray
from rlhf_dist.run import preemption

def signal_all():
    os.killpg(0, signal.SIGUSR1)

def signal_often(stop):
    while not stop.wait(0.02):
        signal_all()

with preemption.listening():
    starting = threading.Event()
    sender = threading.Thread(target=signal_often, args=(starting,), daemon=True)
    sender.start()
    session = RaySession(RayConfig(), "cpu")
    session._connect()
    with hosted(session, 2) as groups:
        starting.set()
        sender.join()
        assert preemption.requested()
        before = psutil.Process().children(recursive=True)
        names = {process.name() for process in before}
        assert {"raylet", "gcs_server"} <= names, names
        signal_all()
        time.sleep(1)
        assert groups["model"].call("answer").result(timeout=60) == [0, 1]
        died = [process for process in before if not process.is_running()]
        print("died", *died)
        assert ray.get(ray.remote(lambda: "new").options(num_cpus=0).remote(), timeout=60) == "new"
    session.close()
    # What this process does itself with the signal is as before.
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
"""
)


def test_a_request_to_stop_that_reaches_all_processes_ends_none_of_them(tmp_path: Path) -> None:
    """`scancel --signal`, batch systems and shells signal whole process groups; while Ray starts, and later."""
    assert _run(_SIGNALLED, str(tmp_path)) == ["died"]


_VARIABLES = (
    _HOSTED
    + """
import os, ray
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
names = ["GIVEN", "HF_GIVEN", "STRANGE"]
session = RaySession(RayConfig(env_vars={"GIVEN": "here", "HF_GIVEN": "configured"}), "cpu")
for _ in range(2):  # the second time in processes that were kept
    with hosted(session) as groups:
        print(*groups["model"].call("variables", names).result()[0])
assert session._nodes()[0][0]["CPU"] == ray.cluster_resources()["CPU"] == 1
session.close()
"""
)


def test_its_ranks_get_the_variables_of_the_configuration(tmp_path: Path) -> None:
    said = _run(_VARIABLES, str(tmp_path), HF_GIVEN="of the driver", STRANGE="inherited")
    assert said == ["here", "configured", "inherited"] * 2


_DRIVER = (
    _HOSTED
    + """
names = ["HF_TOKEN", "GLOO_GIVEN", "HF_GIVEN", "GIVEN", "STRANGE"]
session = RaySession(RayConfig(address=sys.argv[2], env_vars={"GIVEN": "here", "HF_GIVEN": "configured"}), "cpu")
with hosted(session) as groups:
    print(*groups["model"].call("variables", names).result()[0], flush=True)
session.close()
"""
)
_CLUSTER = """
import os, subprocess, sys
from pathlib import Path
import ray
from rlhf_dist.distributed.ray.session import RaySession
from rlhf_dist.config.hosting import RayConfig

session = RaySession(RayConfig(), "cpu")
session._connect()
context = ray.get_runtime_context()
driver = {"HF_TOKEN": "hf_of_nobody_else", "GLOO_GIVEN": "gloo", "HF_GIVEN": "driver", "STRANGE": "not_covered"}
command = [sys.executable, "-c", sys.argv[2], sys.argv[1], context.gcs_address]
subprocess.run(command, env=os.environ | driver | {"RAY_AUTH_MODE": "token"}, check=True)
logs = [path for path in Path(ray._private.worker._global_node.get_session_dir_path()).rglob("*.*") if path.is_file()]
assert any("runtime_env_agent" in path.name for path in logs), logs
print("written:", *(path.name for path in logs if b"hf_of_nobody_else" in path.read_bytes()))
session.close()
"""


def test_ranks_on_a_cluster_take_over_variables_which_ray_writes_nowhere(tmp_path: Path) -> None:
    said = _run(_CLUSTER, str(tmp_path), _DRIVER)
    assert said == ["hf_of_nobody_else", "gloo", "configured", "here", "None", "written:"]
