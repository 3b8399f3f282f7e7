"""`rlhf-dist submit --slurm`: the sbatch files it renders, against files kept in `rendered/`, and what it rejects.

`REWRITE_RENDERED=1 pytest tests/unit/cli/test_submit.py` writes those files anew; read the difference before you keep it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_dist import __version__
from rlhf_dist.cli.main import main
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.jobs.slurm_job import SlurmJob, SlurmRequest, slurm_parts

RENDERED = Path(__file__).parent / "rendered"
SFT = "run_dir: r\ndevice: cpu\nmodel: {model_path: m}\ndata: {train: [{path: a, kind: text}]}\n"
PPO = "run_dir: r\npolicy: {model_path: m}\nreward: {model_path: m}\ndata: {prompts: [{path: a, kind: prompt}]}\n"
PIPELINE = """\
run_dir: r
data: {sets: [{name: s, sources: [{path: a, kind: text}]}]}
sft: {model: {model_path: m, num_ranks: 16}, data: {train: [{path: "${data.s}", kind: text}]}}
"""

JOBS = {
    "plain": SlurmJob(SlurmRequest(), "sft", "sft.yaml", parts=Path("/repo/slurm")),
    "everything": SlurmJob(
        SlurmRequest(
            nodes=8,
            gpus_per_node=8,
            cpus_per_node=96,
            time="2-00:00:00",
            partition="gpu",
            account="team",
            qos="high",
            array="0-4%2",
            job_name="seeds",
            signal_before_end=600,
            container="/images/rlhf dist.sif",
            activate="module load cuda; source '/my venv/bin/activate'",
            interface="ib0",
            sbatch_args=("--exclude=n7", "--comment='a b'"),
        ),
        "ppo",
        "my runs/ppo.yaml",
        ["--run_dir", "/shared/it's {seed}", "--ppo.kl_coef", "0.1", "--data.ptx", "[{path: $HOME/a.txt, kind: text}]"],
        Path("/the repo/slurm"),
    ),
    "no_signal": SlurmJob(
        SlurmRequest(gpus_per_node=0, signal_before_end=0), "reward", "r.yaml", parts=Path("/repo/slurm")
    ),
}


@pytest.fixture
def sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration in the current directory."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("sft", SFT), ("ppo", PPO), ("pipeline", PIPELINE)):
        Path(f"{name}.yaml").write_text(text, encoding="utf-8")
    return "sft.yaml"


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of Slurm's sbatch: keeps its arguments and input in files, and answers with a job id."""
    command = tmp_path / "bin" / "sbatch"
    command.parent.mkdir()
    command.write_text(f'#!/bin/bash\necho "$@" >{tmp_path}/arguments\ncat >{tmp_path}/input\necho "4711;cluster"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    return command


@pytest.mark.parametrize("name", JOBS)
def test_rendered_files(name: str):
    rendered = JOBS[name].render().replace(f"rlhf_dist {__version__}", "rlhf_dist VERSION")
    path = RENDERED / f"{name}.sbatch"
    if os.environ.get("REWRITE_RENDERED"):
        path.write_text(rendered, encoding="utf-8")
    assert rendered == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", JOBS)
def test_rendered_files_hand_on_exactly_what_was_given(name: str, tmp_path: Path):
    """Run by bash, with a run.sh that prints what it is called with: no quoting is lost on the way."""
    job = JOBS[name]
    parts = tmp_path / "it's here"
    parts.mkdir()
    printed = 'printf "%s\\0" "$@" "${RLHF_DIST_CONTAINER:-}" "${RLHF_DIST_ACTIVATE:-}"'
    (parts / "run.sh").write_text(f"run_on_slurm() {{ {printed}; }}\n")
    moved = SlurmJob(job.request, job.command, job.config, job.overrides, parts)
    done = subprocess.run(["bash", "-c", moved.render()], capture_output=True, text=True, check=True)
    expected = [job.command, job.config, *job.overrides, job.request.container or "", job.request.activate or ""]
    assert done.stdout.split("\0")[:-1] == expected


@pytest.mark.parametrize("name", JOBS)
def test_the_linter_has_nothing_to_say(name: str):
    linter = shutil.which("shellcheck")
    if linter is None:
        pytest.skip("shellcheck is not installed")
    # SC1091: the parts do not lie where the example says. SC2016: a user's `$` stays as it was given, on purpose.
    command = [linter, "--exclude=SC1091,SC2016", RENDERED / f"{name}.sbatch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_dry_run_prints_and_submits_nothing(sft: str, sbatch: Path, capsys: pytest.CaptureFixture[str]):
    line = [
        "submit",
        "--slurm",
        "--dry-run",
        "--nodes",
        "2",
        "--gpus-per-node",
        "8",
        "--cpus-per-node",
        "64",
        "sft",
        sft,
        "--sft.num_steps",
        "7",
    ]
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n" in printed
    assert "#SBATCH --gpus-per-node=8\n" in printed
    assert printed.endswith("run_on_slurm sft sft.yaml --sft.num_steps 7\n")
    assert not (sbatch.parents[1] / "input").exists()


def test_where_roles_lie_is_known_without_torch(sft: str):
    code = (
        "import sys; from rlhf_dist.cli.main import main\n"
        "print(main(sys.argv[1:]), [m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, "submit", "--slurm", "--dry-run", "--gpus-per-node", "8", "ppo", "ppo.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_what_a_dry_run_prints_is_what_sbatch_gets(sft: str, sbatch: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["submit", "--slurm", "--dry-run", "sft", sft]) == 0
    printed = capsys.readouterr().out
    assert main(["submit", "--slurm", "sft", sft]) == 0
    assert (sbatch.parents[1] / "input").read_text() == printed
    assert (sbatch.parents[1] / "arguments").read_text().split() == ["--parsable"]
    told = capsys.readouterr().out
    assert "Submitted job 4711: sft sft.yaml, 1 node\n" in told
    for command in ("tail -F rlhf-sft-4711.log", "squeue -j 4711", "scancel 4711"):
        assert command in told


def test_slurms_own_words_reach_the_user(sft: str, sbatch: Path, capsys: pytest.CaptureFixture[str]):
    sbatch.write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    assert main(["submit", "--slurm", "--partition", "gpu", "sft", sft]) == 6
    assert "Slurm rejected the job: sbatch: error: invalid partition specified: gpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sft CONFIG", "one of the arguments --ray --slurm is required"),
        ("--slurm", "COMMAND"),
        ("--slurm quickstart CONFIG", "the command is 'quickstart', but must be sft, reward, ppo"),
        ("--slurm sft", "needs a configuration file behind sft"),
        ("--slurm sft --sft.num_steps 3", "needs a configuration file behind sft"),
        ("--slurm sft CONFIG --sft.num_stepz 3", "did you mean --sft.num_steps?"),
        ("--slurm sft CONFIG --overwrite true --resume auto", "overwrite is true and resume is auto"),
        ("--slurm sft CONFIG --cluster inline", "cluster is 'inline'"),
        ("--slurm --nodes 0 sft CONFIG", "0 is less than 1"),
        ("--slurm --nodes two sft CONFIG", "invalid whole number value: 'two'"),
        ("--slurm --array 0..4 sft CONFIG", "--array is '0..4', but must be a list of seeds"),
        ("--slurm --array 0-4 sft CONFIG", "put {seed} into it"),
        ("--slurm --array 0-4 sft CONFIG --run_dir r{seed} --seed 3", "--seed has nothing to say"),
        ("--slurm --partition a$(b) sft CONFIG", "--partition is 'a$(b)', but must be without"),
        ("--slurm --sbatch-arg exclude=n7 sft CONFIG", "must be one option of sbatch"),
        ("--slurm --container no.sif sft CONFIG", "must be an existing .sif file, docker://IMAGE or pyxis:IMAGE"),
        # The options of the other one, which would be of no effect.
        ("--slurm --no-wait --env A=b sft CONFIG", "--env, --no-wait belong to --ray"),
        ("--ray http://h:1 --nodes 4 --time 1-0 sft CONFIG", "--nodes, --time belong to --slurm"),
        ("--ray http://h:1 --sbatch-arg=--exclude=n7 sft CONFIG", "--sbatch-arg belongs to --slurm"),
        # What is not said, and cannot be known.
        ("--slurm ppo ppo.yaml", "device is auto and --gpus-per-node is not given"),
        (
            "--slurm --nodes 2 sft CONFIG --model.num_ranks 3",
            "--cpus-per-node is not given, and the roles ask for 3 CPUs",
        ),
    ],
)
def test_what_it_rejects(line: str, says: str, sft: str, sbatch: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["submit", *line.replace("CONFIG", sft).split()]) == 2
    assert says in capsys.readouterr().err
    assert not (sbatch.parents[1] / "input").exists()


def test_an_array_whose_runs_have_folders_of_their_own(sft: str, capsys: pytest.CaptureFixture[str]):
    assert main(["submit", "--slurm", "--dry-run", "--array", "0-4", "sft", sft, "--run_dir", "r-{seed}"]) == 0
    assert "#SBATCH --array=0-4\n#SBATCH" in capsys.readouterr().out


def test_without_slurm_it_says_where_to_submit_from(
    sft: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "--slurm", "sft", sft]) == 2
    assert "there is no sbatch here; submit from a login node" in capsys.readouterr().err


def test_where_the_shared_parts_are_looked_for(tmp_path: Path):
    checkout = Path(__file__).resolve().parents[3] / "slurm"
    assert slurm_parts({}) == checkout
    (tmp_path / "run.sh").touch()
    assert slurm_parts({"RLHF_DIST_SLURM_DIR": str(tmp_path)}) == tmp_path
    with pytest.raises(ConfigError, match=r"nowhere/run\.sh; set RLHF_DIST_SLURM_DIR"):
        slurm_parts({"RLHF_DIST_SLURM_DIR": "nowhere"})


SHARED = " ".join(f"--{role}.gpus_per_rank 0.25 --{role}.num_ranks 4" for role in ("reference", "reward", "rollout"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "--nodes 2 --gpus-per-node 8 ppo ppo.yaml --policy.num_ranks 24",
            "the roles ask for 28 GPUs (policy 24 x 1, value 1 x 1, reference 1 x 1, reward 1 x 1, rollout 1 x 1), and 2 nodes "
            "with --gpus-per-node 8 have 16",
        ),
        ("--cpus-per-node 4 ppo ppo.yaml --device cpu", "the roles ask for 5 CPUs"),
        ("--gpus-per-node 8 --cpus-per-node 4 ppo ppo.yaml", "1 node with --cpus-per-node 4 has 4"),
        (
            "--nodes 2 --gpus-per-node 4 ppo ppo.yaml --policy.num_ranks 5 --policy.placement_strategy STRICT_PACK "
            + SHARED.replace("num_ranks 4", "num_ranks 1"),
            "policy must lie on one node (STRICT_PACK)",
        ),
        ("--gpus-per-node 0 sft sft.yaml --device cuda", "the roles ask for 1 GPU "),
        ("--gpus-per-node 8 pipeline pipeline.yaml", "sft: the roles ask for 16 GPUs"),
    ],
)
def test_nodes_that_cannot_hold_the_roles_are_not_waited_for(
    line: str, says: str, sft: str, sbatch: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["submit", "--slurm", *line.split()]) == 6
    assert says in capsys.readouterr().err
    assert not (sbatch.parents[1] / "input").exists()


@pytest.mark.parametrize(
    ("line", "gpus", "cpus"),
    [
        ("ppo ppo.yaml --device cpu --policy.num_ranks 3", None, 7),
        ("--gpus-per-node 8 ppo ppo.yaml --policy.cpus_per_rank 4 --policy.num_ranks 2", 8, 12),
        # Whatever lies on which node, eight of the largest fit.
        ("--nodes 2 --gpus-per-node 8 ppo ppo.yaml --policy.cpus_per_rank 4 --policy.num_ranks 10", 8, 32),
        ("--nodes 2 ppo ppo.yaml --device cuda --policy.num_ranks 9", 7, 7),
        ("--gpus-per-node 8 --cpus-per-node 64 ppo ppo.yaml --policy.num_ranks 3 --value.num_ranks 1 " + SHARED, 8, 64),
        ("--nodes 2 --gpus-per-node 8 --cpus-per-node 16 pipeline pipeline.yaml", 8, 16),
        # In sbatch's own words: the site knows what they come to.
        ("--sbatch-arg=--gres=gpu:a100:8 --nodes 2 --cpus-per-node 64 ppo ppo.yaml --policy.num_ranks 9", None, 64),
        ("--sbatch-arg=--exclusive --gpus-per-node 8 ppo ppo.yaml", 8, None),
        ("--sbatch-arg=-N4 --gpus-per-node 8 ppo ppo.yaml --policy.num_ranks 20", 8, None),
    ],
)
def test_what_is_not_said_is_asked_for_as_the_roles_need_it(
    line: str, gpus: int | None, cpus: int | None, sft: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["submit", "--slurm", "--dry-run", *line.split()]) == 0
    shown = capsys.readouterr()
    options = dict(line[8:].partition("=")[::2] for line in shown.out.splitlines() if line.startswith("#SBATCH --"))
    assert options.get("--gpus-per-node") == (gpus and str(gpus))
    assert options.get("--cpus-per-task") == (cpus and str(cpus))
    for option, number in (("--gpus-per-node", gpus), ("--cpus-per-node", cpus)):
        told = f"{option} is not given; the roles ask for {number}\n" in shown.err
        assert told == (number is not None and option not in line)


@pytest.mark.parametrize("option", ["--gres=gpu:8", "--gres gpu:8", "--gpus 8", "-G 8"])
def test_gpus_in_sbatchs_own_words_are_recognized(option: str, sft: str):
    assert main(["submit", "--slurm", "--dry-run", f"--sbatch-arg={option}", "ppo", "ppo.yaml"]) == 0


def test_how_gpus_are_bound_says_not_how_many(sft: str):
    line = ["submit", "--slurm", "--dry-run", "--sbatch-arg=--gres-flags=enforce-binding", "ppo", "ppo.yaml"]
    assert main(line) == 2


@pytest.mark.parametrize(("resume", "exit_code"), [("no", 0), ("auto", 2)])
def test_a_run_whose_file_says_not_to_resume_may_overwrite(resume: str, exit_code: int, sft: str):
    Path(sft).write_text(f"{SFT}resume: '{resume}'\noverwrite: true\n", encoding="utf-8")
    assert main(["submit", "--slurm", "--dry-run", "sft", sft]) == exit_code


def test_to_overwrite_is_enough(sft: str):
    Path(sft).write_text(f"{SFT}overwrite: true\n", encoding="utf-8")
    assert main(["submit", "--slurm", "--dry-run", "sft", sft]) == 0
