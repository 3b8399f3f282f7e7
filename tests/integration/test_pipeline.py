"""The pipeline recipe on real reviews: run, skipped, run in part, killed and resumed, and what its lineage says.

With the tiny model and a few steps, through the command line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.runs import cli, metrics, weights
from support.tiny import save_tiny_lm

pytestmark = [pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "launch" / "recipes" / "movie_pipeline.yaml"
STAGES = ("data", "sft", "reward", "ppo", "eval")
NUM_STEPS = 40
"""Of SFT: enough for a kill to land in the middle."""


class Job:
    """The recipe on a model and reviews of its own, in one run folder."""

    def __init__(self, folder: Path, shared_data: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.model = save_tiny_lm(folder / "base", max_position_embeddings=256)
        whole = (shared_data / "movieReviewSnippets_GroundTruth.txt").read_bytes().splitlines(keepends=True)
        # Short ones: the tiny tokenizer has about a token a letter.
        self.reviews = folder / "reviews.txt"
        self.reviews.write_bytes(b"".join([line for line in whole if len(line) < 90][:240]))

    def options(self, cluster: str = "inline") -> list[str]:
        columns = "columns: [id, rating, text], fields: {response: text}, min_margin: 1.0"
        reviews = f"{{name: reviews, sources: [{{path: {self.reviews}, kind: ratings, {columns}}}], "
        reviews += "parts: {sft: 0.45, reward: 0.45, eval: 0.1}}"
        prompts = "{name: prompts, sources: [{path: launch/recipes/movie_prompts.jsonl, kind: prompt}]}"
        values: dict[str, Any] = {
            "run_dir": self.run_dir,
            "cluster": cluster,
            "device": "cpu",
            "checkpoint.every_steps": 4,
            "data.sets": f"[{reviews}, {prompts}]",
            "sft.model.model_path": self.model,
            "sft.sft.num_steps": NUM_STEPS,
            "sft.sft.batch_size": 4,
            "reward.reward.num_steps": 20,
            "reward.reward.batch_size": 4,
            "ppo.ppo.num_iterations": 4,
            "ppo.ppo.prompts_per_iteration": 4,
            "ppo.ppo.mini_batch_size": 4,
            "ppo.ppo.ptx_batch_size": 2,
            "ppo.rollout.max_response_tokens": 8,
            "ppo.checkpoint.every_steps": 1,
            "eval.rollout.max_response_tokens": 8,
        }
        values |= {f"{stage}.data.max_length_tokens": 192 for stage in STAGES[1:]}
        models = ("sft.model", "reward.model", "ppo.policy", "ppo.value", "ppo.reference", "ppo.reward")
        values |= {f"{model}.precision": "fp32" for model in models}
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    def start(self, *more: str, cluster: str = "inline") -> subprocess.Popen[str]:
        return cli("pipeline", str(RECIPE), *self.options(cluster), *more, cwd=ROOT)

    def run(self, *more: str, cluster: str = "inline") -> str:
        process = self.start(*more, cluster=cluster)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output

    def record(self) -> dict[str, dict[str, Any]]:
        return json.loads((self.run_dir / "pipeline.json").read_text())["stages"]

    def folders(self) -> dict[str, Path]:
        return {name: self.run_dir / stage["folder"] for name, stage in self.record().items()}

    def lineages(self) -> dict[str, dict[str, Any]]:
        return {name: json.loads((folder / "lineage.json").read_text()) for name, folder in self.folders().items()}

    def times(self) -> dict[str, int]:
        """When each file of each stage was last changed."""
        return {str(p): p.stat().st_mtime_ns for p in self.run_dir.glob("0*/**/*") if p.is_file()}


def states(output: str) -> dict[str, str]:
    """Stage → state, of the first table that a call prints."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 4 and row[0] in STAGES}


def sha256sum(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def sha256sum_of_folder(folder: Path) -> str:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256("".join(f"{sha256sum(folder / n)}  {n}\n" for n in names).encode()).hexdigest()


@pytest.fixture(scope="module")
def whole(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A pipeline that ran undisturbed, in one process. Not to be written to."""
    job = Job(tmp_path_factory.mktemp("pipeline"), shared_data)
    assert states(job.run()) == dict.fromkeys(STAGES, "new")
    return job


def copy_of(job: Job, folder: Path) -> Job:
    """The finished job at another place."""
    shutil.copytree(job.folder, folder, dirs_exist_ok=True)
    other = object.__new__(Job)
    other.folder, other.run_dir, other.model, other.reviews = (
        folder,
        folder / "run",
        folder / "base",
        folder / "reviews.txt",
    )
    return other


def test_every_stage_runs_and_is_a_run_folder(whole: Job):
    assert [stage["state"] for stage in whole.record().values()] == ["done"] * 5
    folders = whole.folders()
    for number, (name, folder) in enumerate(folders.items(), start=1):
        assert folder.name.startswith(f"{number:02d}_{name}-")
        assert {"config.yaml", "summary.json", "lineage.json"} <= {path.name for path in folder.iterdir()}
    for name in ("sft", "reward", "ppo"):
        assert weights(folders[name])
    summary = json.loads((folders["eval"] / "summary.json").read_text())
    assert {"policy", "reward", "generation"} <= summary.keys()
    assert summary["generation"]["num_prompts"] == 32


def test_parts_hold_every_review_once(whole: Job):
    sets = whole.folders()["data"] / "sets"
    rows = [json.loads(line) for part in sets.glob("reviews.*/0.jsonl") for line in part.read_text().splitlines()]
    given = [line.split("\t") for line in whole.reviews.read_bytes().decode("utf-8").split("\r\n")[:-1]]
    assert sorted([row["id"], row["rating"], row["text"]] for row in rows) == sorted(given)
    manifest = json.loads((sets.parent / "manifest.json").read_text())
    assert sum(file["records"] for file in manifest["reviews"]["files"].values()) == len(given)
    for name, file in {**manifest["reviews"]["files"], **manifest["prompts"]["files"]}.items():
        assert file["sha256"] == sha256sum(sets / name)


def test_the_lineage_verifies(whole: Job):
    """Against sha256sum, and the other stages' own lineages."""
    folders, lineages = whole.folders(), whole.lineages()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    for name, lineage in lineages.items():
        assert lineage["key"] == whole.record()[name]["key"]
        assert lineage["config_sha256"] == sha256sum(folders[name] / "config.yaml")
        assert lineage["code"]["git_commit"] == commit
        assert lineage["libraries"]["torch"] == torch.__version__
        for file, digest in lineage["outputs"].items():
            assert digest == sha256sum(folders[name] / file)
        for item in lineage["data"]:
            assert item["sha256"] == sha256sum(Path(item["path"]))
            assert item["records"] == len(
                [line for line in Path(item["path"]).read_bytes().splitlines() if line.strip()]
            )
        for model in lineage["models"]:
            assert model["sha256"] == sha256sum_of_folder(Path(model["path"]))
    came_from = {
        name: {model["place"]: model["stage"] for model in lineage["models"]} for name, lineage in lineages.items()
    }
    assert came_from == {
        "data": {},
        "sft": {"model.model_path": None},
        "reward": {"model.model_path": "sft"},
        "ppo": {
            "policy.model_path": "sft",
            "reference.model_path": "sft",
            "reward.model_path": "reward",
            "value.model_path": "reward",
        },
        "eval": {"policy.model_path": "ppo", "reward.model_path": "reward", "reference.model_path": "sft"},
    }
    assert lineages["data"]["data"][0]["path"] == str(whole.reviews)
    chain = {lineage["stage"]: lineage for lineage in lineages["eval"]["ancestors"].values()}
    assert chain.keys() == set(STAGES) - {"eval"}
    for name, lineage in chain.items():
        assert lineage | {"ancestors": None} == lineages[name] | {"ancestors": None}


def test_a_second_call_does_nothing_and_a_changed_key_runs_what_depends_on_it(whole: Job, tmp_path: Path):
    # At another place: the paths enter no key.
    job = copy_of(whole, tmp_path)
    before = job.times()
    assert states(job.run()) == dict.fromkeys(STAGES, "done")
    assert job.times() == before

    assert states(job.run("--ppo.ppo.kl_coef", "0.5")) == {
        "data": "done",
        "sft": "done",
        "reward": "done",
        "ppo": "new",
        "eval": "new",
    }
    after = job.times()
    assert {path: after[path] for path in before} == before, "nothing is overwritten"
    changed = {Path(path).relative_to(job.run_dir).parts[0] for path in after.keys() - before.keys()}
    assert changed == {job.record()["ppo"]["folder"], job.record()["eval"]["folder"]}
    assert (job.folders()["ppo"] / "config.yaml").read_text().count("kl_coef: 0.5") == 1
    assert states(job.run()) == dict.fromkeys(STAGES, "done"), "back to what was there"


def test_a_changed_record_runs_what_depends_on_it(whole: Job, tmp_path: Path):
    job = copy_of(whole, tmp_path)
    lines = job.reviews.read_bytes().splitlines(keepends=True)
    lines[17] = lines[17].replace(b"\r\n", b"!\r\n")
    job.reviews.write_bytes(b"".join(lines))
    before = job.times()
    assert states(job.run()) == dict.fromkeys(STAGES, "new"), "every stage reads reviews"
    assert before.items() <= job.times().items()
    # What the reviews are not part of stays.
    prompts = "[{path: %s, kind: prompt}]" % (tmp_path / "prompts.jsonl")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Say something."}\n')
    found = states(job.run("--eval.data.prompts", prompts))
    assert found == dict.fromkeys(STAGES[:-1], "done") | {"eval": "new"}


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_a_result_that_is_not_what_was_written_is_rejected(what: str, whole: Job, tmp_path: Path):
    job = copy_of(whole, tmp_path)
    model = job.folders()["sft"] / "model" / "model.safetensors"
    if what == "gone":
        model.unlink()
    else:
        content = bytearray(model.read_bytes())
        content[-1] ^= 1
        model.write_bytes(content)
    process = job.start()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 5
    assert str(model) in output
    assert f"or remove {model.parents[1]} to run the stage again" in output
    assert "Traceback" not in output


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, stage: str, step: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for path in run_dir.glob(f"*_{stage}-*/metrics.jsonl"):
            lines = path.read_text().splitlines()
            if lines and json.loads(lines[-1])["step"] >= step:
                return
        if process.poll() is not None:
            pytest.fail(
                f"the pipeline ended before step {step} of {stage}:\n{process.stdout and process.stdout.read()}"
            )
        time.sleep(0.01)
    pytest.fail(f"step {step} of {stage} was not reached")


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL, for the driver and all that it started, as when a machine goes down."""
    children = psutil.Process(process.pid).children(recursive=True)
    for victim in [psutil.Process(process.pid), *children]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]


def assert_same_models(found: Job, expected: Job) -> None:
    for name in ("sft", "reward", "ppo"):
        mine, theirs = weights(found.folders()[name]), weights(expected.folders()[name])
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[tensor], theirs[tensor]) for tensor in theirs)
        assert metrics(found.folders()[name]) == metrics(expected.folders()[name])
    summaries = [json.loads((job.folders()["eval"] / "summary.json").read_text()) for job in (found, expected)]
    assert summaries[0]["generation"] == summaries[1]["generation"]


def test_killed_and_interrupted_it_ends_where_the_undisturbed_one_ends(whole: Job, tmp_path: Path, shared_data: Path):
    job = Job(tmp_path, shared_data)
    process = job.start()
    wait_for_step(process, job.run_dir, "sft", NUM_STEPS // 2)
    kill(process)
    assert job.record()["sft"]["state"] == "running"
    assert not (job.folders()["sft"] / "lineage.json").exists()

    # As Slurm does before it takes the machine away, and as a user does.
    process = job.start("--reward.checkpoint.every_steps", "0")
    wait_for_step(process, job.run_dir, "reward", 2)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert states(output)["sft"].startswith("resume from step ")
    assert job.record()["reward"]["reason"].startswith("Preempted: The run stopped after step ")

    process = job.start()
    wait_for_step(process, job.run_dir, "reward", 8)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert states(output)["reward"].startswith("resume from step "), "when checkpoints are written enters no key"
    record = job.record()
    assert [record[name]["state"] for name in STAGES[:3]] == ["done", "done", "stopped"]
    assert record["reward"]["reason"].startswith("KeyboardInterrupt")

    before = {path: time for path, time in job.times().items() if "_sft-" in path}
    found = states(job.run())
    assert (found["data"], found["sft"], found["ppo"]) == ("done", "done", "new")
    assert before.items() <= job.times().items()
    assert not list(job.run_dir.glob(".checking_*"))
    mine, theirs = job.lineages(), whole.lineages()
    assert mine["sft"]["resumed_from_step"] in range(NUM_STEPS // 2 - 4, NUM_STEPS, 4)
    assert [mine[name]["key"] for name in STAGES] == [theirs[name]["key"] for name in STAGES]
    assert_same_models(job, whole)


def test_on_ray_killed_in_ppo_it_ends_where_the_one_in_one_process_ends(whole: Job, tmp_path: Path, shared_data: Path):
    job = Job(tmp_path, shared_data)
    process = job.start(cluster="ray")
    wait_for_step(process, job.run_dir, "ppo", 2)
    kill(process)
    found = states(job.run(cluster="ray"))
    assert (found["sft"], found["reward"], found["eval"]) == ("done", "done", "new")
    assert found["ppo"].startswith("resume from step ")
    assert_same_models(job, whole)
