"""PPO over two hosts with addresses of their own: what works only on one machine fails here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hosts import Host, ray_on, two_hosts, why_not
from support.runs import cli, metrics, wait_for_step, weights, write_config

pytestmark = [pytest.mark.timeout(600)]
Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[tuple[Host, Host], str, dict[str, str]]]:
    """(hosts, Ray's address, environment)."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with two_hosts() as hosts, ray_on(hosts) as (address, environment):
        yield hosts, address, environment


def run_there(
    cluster: tuple[tuple[Host, Host], str, dict[str, str]], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """The command line on the first host, against the cluster."""
    hosts, address, environment = cluster
    command = hosts[0].command(sys.executable, "-m", "rlhf_dist.cli.main", *arguments, "--ray.address", address)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


def hosts_of(run_dir: Path, role: str) -> list[str]:
    """The address of each rank's node, as its log has it."""
    logs = sorted((run_dir / "logs").glob(f"{role}_*.log"))
    return [re.findall(r"^process \d+ on (\S+)$", log.read_text(), re.MULTILINE)[-1] for log in logs]


def test_ppo_over_two_hosts_is_the_run_in_one_process(cluster, make_config: Make, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    config = make_config("ppo", there, ranks=2, zero_stage=2)
    config["policy"]["placement_strategy"] = "STRICT_SPREAD"
    config["value"] = config["value"] | {"placement_strategy": "STRICT_SPREAD", "zero_stage": 3}
    config["reference"] |= {"placement_strategy": "STRICT_PACK"}
    done = run_there(cluster, "ppo", str(write_config(tmp_path / "there.yaml", config)))
    assert done.returncode == 0, done.stdout + done.stderr

    addresses = {host.address for host in cluster[0]}
    for role in ("policy", "value"):
        assert set(hosts_of(there, role)) == addresses
    assert len(set(hosts_of(there, "reference"))) == 1

    inline = cli("ppo", str(write_config(tmp_path / "here.yaml", make_config("ppo", here, cluster="inline"))))
    output, _ = inline.communicate(timeout=300)
    assert inline.returncode == 0, output
    expected, found = weights(here), weights(there)
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) < 2e-5
    assert len(metrics(there)) == len(metrics(here))


def test_more_hosts_than_there_are_is_rejected_before_anything_starts(
    cluster, make_config: Make, tmp_path: Path
) -> None:
    config = make_config("sft", tmp_path / "run", ranks=3)
    config["model"]["placement_strategy"] = "STRICT_SPREAD"
    done = run_there(cluster, "sft", str(write_config(tmp_path / "c.yaml", config)))
    assert done.returncode == 6
    assert "the ranks of model must lie on 3 different nodes (STRICT_SPREAD), and 2 nodes can hold one" in done.stderr
    assert not (tmp_path / "run").exists()


def test_ranks_take_over_the_environment_that_they_are_given(cluster, make_config: Make, tmp_path: Path) -> None:
    """An interface that no host has must reach gloo, and fail there, on whichever host a rank is."""
    config = make_config("sft", tmp_path / "run", ranks=2)
    config["model"]["placement_strategy"] = "STRICT_SPREAD"
    config["ray"] = {"env_vars": {"GLOO_SOCKET_IFNAME": "nosuch0"}}
    done = run_there(cluster, "sft", str(write_config(tmp_path / "c.yaml", config)))
    assert done.returncode == 7, done.stdout + done.stderr
    assert "nosuch0" in done.stderr


def test_an_interface_that_is_not_there_is_rejected(cluster, make_config: Make, tmp_path: Path) -> None:
    config = make_config("sft", tmp_path / "run", ranks=2)
    config["model"]["placement_strategy"] = "STRICT_SPREAD"
    config["ray"] = {"network_interface": "nosuch0"}
    done = run_there(cluster, "sft", str(write_config(tmp_path / "c.yaml", config)))
    assert done.returncode == 6, done.stdout + done.stderr
    assert re.search(
        r"model rank [01]: ray.network_interface 'nosuch0' .* has no nosuch0, but lo, rd[ab]\d+", done.stderr
    )


_DEAF = """
import os, sys
from pathlib import Path
from rlhf_dist.distributed.ray import session
from rlhf_dist.distributed.ray.actor import RankHost
from rlhf_dist.distributed.group import WorkerSpec
from rlhf_dist.config.hosting import Placement, RayConfig
from rlhf_dist.core.errors import PlacementError
from support.surroundings import Surroundings

class DeafHost(RankHost):
    def listen(self, port):
        pass

placement = Placement(num_ranks=2, placement_strategy="STRICT_SPREAD")
for session.RankHost in (RankHost, DeafHost):
    ours = session.RaySession(RayConfig(address=sys.argv[1], env_vars={"PYTHONPATH": os.environ["PYTHONPATH"]}), "cpu")
    try:
        with ours.place([WorkerSpec("policy", placement, Surroundings)], seed=0, logs_dir=lambda: Path(sys.argv[2])) as groups:
            print(groups["policy"].call("answer").result())
    except PlacementError as error:
        print(error)
    ours.close()
"""


def test_a_host_that_does_not_answer_is_rejected_before_a_model_loads(cluster, tmp_path: Path) -> None:
    (a, b), address, environment = cluster
    tests = str(Path(__file__).parents[1])
    there = environment | {"PYTHONPATH": os.pathsep.join([tests, environment.get("PYTHONPATH", "")])}
    command = a.command(sys.executable, "-c", _DEAF, address, str(tmp_path))
    done = subprocess.run(command, env=there, capture_output=True, text=True, timeout=120, check=False)
    answers = done.stdout.splitlines()
    assert len(answers) == 2, done.stdout + done.stderr
    assert answers[0] == "[0, 1]"
    assert re.search(
        r"policy would meet at (\S+), which cannot be reached from (\S+) \(Connection refused\)", answers[1]
    )
    assert a.address in answers[1]
    assert b.address in answers[1]
    assert "--node-ip-address" in answers[1]


def test_a_host_that_dies_ends_the_run_in_plain_words(cluster, make_config: Make, tmp_path: Path) -> None:
    """The last test of this file: the second host does not come back."""
    hosts, address, environment = cluster
    config = make_config("sft", tmp_path / "run", ranks=2)
    config["model"]["placement_strategy"] = "STRICT_SPREAD"
    config["sft"]["num_steps"] = 100_000
    config["checkpoint"] = {"every_steps": 5}
    arguments = ["sft", str(write_config(tmp_path / "c.yaml", config)), "--ray.address", address]
    process = subprocess.Popen(
        hosts[0].command(sys.executable, "-m", "rlhf_dist.cli.main", *arguments),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(process, tmp_path / "run", 6)
    hosts[1].die()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 7, output
    assert re.search(r"model rank [01] (died|failed)", output)
    assert "Traceback" not in output
    assert (tmp_path / "run" / "checkpoints" / "step_000005" / "driver.json").is_file()
