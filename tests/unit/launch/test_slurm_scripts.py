"""The scripts for Slurm, as far as they can be tried without one: what they reject, containers, lint, and their document."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SLURM = ROOT / "slurm"
BATCH = sorted(SLURM.glob("*.sbatch"))
SCRIPTS = [*BATCH, *SLURM.glob("*.sh"), *(ROOT / "tests" / "support").glob("*.sh")]
ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/nowhere"}


def bash(code: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", code], env=ENVIRONMENT | variables, cwd=cwd, capture_output=True, text=True, check=False
    )


def test_there_is_a_script_for_every_command_that_trains():
    assert [path.stem for path in BATCH] == ["pipeline", "ppo", "reward", "sft"]
    bodies = {path.read_text().replace(path.stem, "COMMAND").split("\n", 2)[2] for path in BATCH}
    assert len(bodies) == 1, "they differ in more than the command"


@pytest.mark.parametrize("script", BATCH, ids=lambda p: p.name)
def test_a_script_hands_its_arguments_on(script: Path, tmp_path: Path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "run.sh").write_text('run_on_slurm() { printf "%s|" "$@"; }\n')
    for variables in ({"SLURM_SUBMIT_DIR": str(tmp_path)}, {"RLHF_DIST_SLURM_DIR": str(tmp_path / "slurm")}):
        done = bash('bash "$SCRIPT" "my run.yaml" --seed 3', tmp_path / "slurm", SCRIPT=str(script), **variables)
        assert done.stdout == f"{script.stem}|my run.yaml|--seed|3|"


def test_a_script_that_does_not_find_its_parts_says_so(tmp_path: Path):
    done = bash(f"bash {SLURM}/ppo.sbatch c.yaml", tmp_path, SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2
    assert f"there is no {tmp_path}/slurm/run.sh; submit from the repository root" in done.stderr


@pytest.mark.parametrize(
    ("line", "variables", "says"),
    [
        ("run_on_slurm ppo c.yaml", {}, "this is no Slurm job"),
        ("run_on_slurm ppo", {"SLURM_JOB_ID": "1"}, "a configuration is needed"),
        ("run_on_slurm ppo no.yaml", {"SLURM_JOB_ID": "1"}, "the configuration 'no.yaml' does not exist in"),
        ("run_on_slurm ppo c.yaml", {"SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "3"}, "put {seed} into it"),
        (
            "run_on_slurm ppo seeds.yaml --run_dir here",
            {"SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "3"},
            "put {seed} into it",
        ),
        (
            "describe_container /j",
            {"RLHF_DIST_CONTAINER": "image"},
            "is 'image', but must be an existing .sif",
        ),
        ("describe_container /j", {"RLHF_DIST_CONTAINER": "no.sif"}, "no such file on"),
    ],
)
def test_what_is_rejected_before_anything_starts(line: str, variables: dict[str, str], says: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_text("run_dir: runs/ppo\n")
    (tmp_path / "seeds.yaml").write_text("run_dir: runs/{seed}\n")
    done = bash(f"source {SLURM}/run.sh; {line}", tmp_path, **variables)
    assert done.returncode == 2
    assert says in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"c.yaml", "seeds.yaml"}


@pytest.mark.parametrize("arguments", ["seeds.yaml", "c.yaml --run_dir r/{seed}", "c.yaml --run_dir=r/{seed}"])
def test_a_task_of_an_array_gets_its_seed(arguments: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_text("run_dir: runs/ppo\n")
    (tmp_path / "seeds.yaml").write_text("run_dir: runs/{seed}\n")
    code = f'source {SLURM}/run.sh; seed_of_array_task {arguments}; echo "${{seed_arguments[@]}}"'
    assert bash(code, tmp_path, SLURM_ARRAY_TASK_ID="3").stdout == "--seed 3\n"


CONTAINER = f"""\
source {SLURM}/run.sh; apptainer() {{ :; }}; describe_container /j
printf '%s\\n' "${{container_options[@]}}" -- "${{container_command[@]}}\""""


def test_apptainer(tmp_path: Path):
    (tmp_path / "i.sif").touch()
    # GPUs of the node that the batch script runs on: other nodes of the job may have none, or they alone.
    done = bash(CONTAINER, tmp_path, RLHF_DIST_CONTAINER="i.sif", RLHF_DIST_MOUNTS="/data", SLURM_GPUS_ON_NODE="8")
    mounts = f"/j,{SLURM},{tmp_path},/data"
    options, _, command = done.stdout.partition("--\n")
    assert not options.strip()
    assert command.split() == ["bash", f"{SLURM}/in_apptainer.sh", "--bind", mounts, "--pwd", str(tmp_path), "i.sif"]
    done = bash(CONTAINER, tmp_path, RLHF_DIST_CONTAINER="docker://org/i:1")
    assert done.stdout.endswith("docker://org/i:1\n")


@pytest.mark.parametrize(("gpus", "option"), [({"SLURM_GPUS_ON_NODE": "8"}, "--nv "), ({}, "")])
def test_each_node_gives_the_container_the_gpus_it_has(gpus: dict[str, str], option: str, tmp_path: Path):
    apptainer = tmp_path / "apptainer"
    apptainer.write_text('#!/bin/bash\necho "$@"\n')
    apptainer.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = bash(f"bash {SLURM}/in_apptainer.sh --pwd /x i.sif run it", tmp_path, PATH=path, **gpus)
    assert done.stdout == f"exec {option}--pwd /x i.sif run it\n"


def test_pyxis(tmp_path: Path):
    done = bash(CONTAINER, tmp_path, RLHF_DIST_CONTAINER="pyxis:org/i:1", RLHF_DIST_MOUNTS="/data:/d")
    options, _, command = done.stdout.partition("--\n")
    assert not command.strip()
    mounts = f"/j:/j,{SLURM}:{SLURM},{tmp_path}:{tmp_path},/data:/d"
    expected = ["--container-image=org/i:1", f"--container-mounts={mounts}", f"--container-workdir={tmp_path}"]
    assert options.splitlines() == expected


@pytest.mark.parametrize(
    ("activate", "status", "printed"),
    [
        ("", 0, "here\n"),
        ("WORD=there", 0, "there\n"),
        ("FILE", 0, "sourced\n"),
        ("false", 1, ""),
        ("PATH=", 2, ""),
    ],
)
def test_the_environment_of_a_step(activate: str, status: int, printed: str, tmp_path: Path):
    (tmp_path / "activate").write_text('echo "$UNSET" >/dev/null; export WORD=sourced\n')
    shell = shutil.which("bash")
    code = f"export WORD=here; {shell} {SLURM}/in_environment.sh bash -c 'echo $WORD'"
    done = bash(code, tmp_path, RLHF_DIST_ACTIVATE=activate.replace("FILE", str(tmp_path / "activate")))
    assert (done.returncode, done.stdout) == (status, printed)
    if status == 2:
        assert "there is no 'bash' on" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_the_linter_has_nothing_to_say(script: Path):
    linter = shutil.which("shellcheck")
    if linter is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([linter, "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_document_names_every_variable_and_no_other():
    sources = [*SCRIPTS, *(ROOT / "rlhf_dist").rglob("*.py")]
    used = {name for path in sources for name in re.findall(r"RLHF_DIST_[A-Z]+(?:_[A-Z]+)*", path.read_text())}
    named = set(re.findall(r"RLHF_DIST_[A-Z]+(?:_[A-Z]+)*", (SLURM / "README.md").read_text()))
    assert named == {name for name in used if name.startswith("RLHF_DIST_")}
