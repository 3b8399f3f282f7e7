"""Keys of stages: what changes them and what does not; and what is rejected before the first stage runs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny import save_tiny_lm
from transformers import AutoTokenizer

from rlhf_dist.core.errors import ConfigError, DataError, ModelError, RlhfDistError, RunFolderError
from rlhf_dist.pipeline import command as pipeline
from rlhf_dist.pipeline.config import PipelineConfig
from rlhf_dist.pipeline.stages import Planner, Stage, check_unchanged, state_of, warn_of_version
from rlhf_dist.run.lineage import ContentHashes, write_lineage

Make = Callable[..., PipelineConfig]
TRAINED = ("sft", "reward", "ppo")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {name: merged(under.get(name) or {}, value) for name, value in over.items() if isinstance(value, dict)}
    return under | over | both


@pytest.fixture
def make(tmp_path: Path, tiny_lm: Path) -> Make:
    """A pipeline of all stages on small files of its own; `changes` are laid over it."""
    reviews = write_rows(tmp_path / "reviews.jsonl", [{"text": f"word {i}", "rating": i % 7} for i in range(40)])
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(10)])
    held_out = write_rows(tmp_path / "held_out.jsonl", [{"prompt": f"say it {i}"} for i in range(4)])
    short = {"max_length_tokens": 48}

    def of(**changes: Any) -> PipelineConfig:
        rated = {"path": reviews, "kind": "ratings", "fields": {"response": "text"}}
        whole = {
            "run_dir": str(tmp_path / "run"),
            "cluster": "inline",
            "device": "cpu",
            "data": {
                "sets": [
                    {"name": "reviews", "sources": [rated], "parts": {"sft": 0.5, "reward": 0.5}},
                    {"name": "prompts", "sources": [{"path": prompts, "kind": "prompt"}]},
                ]
            },
            "sft": {
                "model": {"model_path": str(tiny_lm)},
                "data": short | {"train": [{"path": "${data.reviews.sft}", "kind": "text"}]},
                "sft": {"batch_size": 4},
            },
            "reward": {"data": short | {"train": [{"path": "${data.reviews.reward}"}]}, "reward": {"batch_size": 4}},
            "ppo": {
                "data": short | {"prompts": [{"path": "${data.prompts}"}]},
                "rollout": {"max_response_tokens": 8},
                "ppo": {"prompts_per_iteration": 4, "mini_batch_size": 2},
            },
            "eval": {
                "data": short | {"prompts": [{"path": held_out, "kind": "prompt"}]},
                "rollout": {"max_response_tokens": 8},
            },
        }
        return PipelineConfig.model_validate(merged(whole, changes))

    return of


def plan(config: PipelineConfig) -> dict[str, Stage]:
    return {stage.name: stage for stage in Planner(config, ContentHashes()).plan()}


def changed(before: PipelineConfig, after: PipelineConfig) -> list[str]:
    """Stages whose key differs."""
    keys = [{name: stage.key for name, stage in plan(config).items()} for config in (before, after)]
    return [name for name in keys[0] if keys[0][name] != keys[1][name]]


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"eval": {"rollout": {"temperature": 0.5}}}, ["eval"]),
        ({"ppo": {"ppo": {"kl_coef": 0.2}}}, ["ppo", "eval"]),
        ({"reward": {"reward": {"num_steps": 3}}}, ["reward", "ppo", "eval"]),
        ({"sft": {"model": {"optimizer": {"learning_rate": 0.1}}}}, ["sft", "reward", "ppo", "eval"]),
        ({"seed": 3}, ["data", "sft", "reward", "ppo", "eval"]),
        ({"ppo": {"seed": 3}}, ["ppo", "eval"]),
        ({"data": {"seed": 3}}, ["data", "sft", "reward", "ppo", "eval"]),
        ({"tracking": {"tensorboard": True, "num_samples": 1}}, []),
        ({"checkpoint": {"every_steps": 7}, "ppo": {"checkpoint": {"keep_last": 9}}}, []),
        ({"ray": {"placement_timeout_s": 3}}, []),
        ({"ppo": {"ppo": {"self_checks": False}}}, []),
        ({"sft": {"model": {"micro_batch_size": 1, "zero_stage": 3, "num_ranks": 2, "packed": True}}}, []),
        ({"ppo": {"rollout": {"batch_size": 3}, "ppo": {"eval_every_iterations": 2}}}, []),
    ],
)
def test_a_setting_changes_its_stage_and_those_that_come_from_it(
    changes: dict[str, Any], stages: list[str], make: Make
):
    assert changed(make(), make(**changes)) == stages


def test_a_record_changes_what_is_made_of_its_set(make: Make, tmp_path: Path):
    before = {name: stage.key for name, stage in plan(make()).items()}

    def differing() -> list[str]:
        return [name for name, stage in plan(make()).items() if stage.key != before[name]]

    for name, stages in (
        ("held_out", ["eval"]),
        ("prompts", ["data", "ppo", "eval"]),
        ("reviews", ["data", "sft", "reward", "ppo", "eval"]),
    ):
        path = tmp_path / f"{name}.jsonl"
        text = path.read_text()
        path.write_text(text.replace("3", "4", 1))
        assert differing() == stages
        path.write_text(text)
    assert differing() == [], "as it was before"


def test_where_things_lie_does_not_matter(make: Make, tmp_path: Path, tiny_lm: Path):
    (tmp_path / "elsewhere").mkdir()
    prompts = shutil.copy(tmp_path / "prompts.jsonl", tmp_path / "elsewhere" / "p.jsonl")
    model = shutil.copytree(tiny_lm, tmp_path / "elsewhere" / "lm")
    sets = make().model_dump(mode="json")["data"]["sets"]
    sets[1]["sources"][0]["path"] = str(prompts)
    moved = make(run_dir=str(tmp_path / "other"), data={"sets": sets}, sft={"model": {"model_path": str(model)}})
    assert changed(make(), moved) == []
    assert plan(moved)["sft"].folder.parent == tmp_path / "other"


def test_the_weights_of_a_model_matter(make: Make, tmp_path: Path):
    own = {"sft": {"model": {"model_path": str(save_tiny_lm(tmp_path / "lm", seed=0))}}}
    before = plan(make(**own))
    save_tiny_lm(tmp_path / "lm", seed=1)
    after = plan(make(**own))
    assert [name for name in before if before[name].key != after[name].key] == ["sft", "reward", "ppo", "eval"]


def test_a_patch_release_makes_no_stage_new(make: Make, monkeypatch: pytest.MonkeyPatch):
    before = {name: stage.key for name, stage in plan(make()).items()}
    monkeypatch.setattr("rlhf_dist.__version__", "0.1.99")
    assert {name: stage.key for name, stage in plan(make()).items()} == before


@pytest.mark.parametrize("key", ["template_path", "ds_config_path"])
def test_other_files_count_by_what_they_hold(key: str, make: Make, tmp_path: Path):
    path = tmp_path / "file.json"
    text = '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}'
    path.write_text(text)
    changes = {"reward": {"data" if key == "template_path" else "model": {key: str(path)}}}
    before = plan(make(**changes))
    path.write_text(text[:-1] + ', "communication_data_type": "fp16"}')
    after = plan(make(**changes))
    assert [name for name in before if before[name].key != after[name].key] == ["reward", "ppo", "eval"]
    assert str(path) in before["reward"].contents
    if key == "ds_config_path":
        path.write_text(text[:-1] + ', "steps_per_print": 7}')  # what is printed decides nothing
        assert {name: stage.key for name, stage in plan(make(**changes)).items()} == {
            name: stage.key for name, stage in before.items()
        }


def test_a_stage_is_given_what_its_command_would_be(make: Make, tmp_path: Path):
    stages = plan(make())
    reward, ppo, evaluation = stages["reward"].config, stages["ppo"].config, stages["eval"].config
    assert reward.run_dir == stages["reward"].folder
    assert reward.resume == ppo.resume == "auto"
    assert reward.model.model_path == ppo.policy.model_path == str(stages["sft"].folder / "model")
    assert ppo.reward.model_path == ppo.value.model_path == str(stages["reward"].folder / "model")
    assert evaluation.policy.model_path == str(stages["ppo"].folder / "model")
    [source] = reward.data.train
    assert source.path == str(stages["data"].folder / "sets" / "reviews.reward" / "0.jsonl")
    assert (source.kind, source.fields) == ("ratings", {"response": "text"})
    assert source.name == "reviews.reward"
    assert stages["data"].folder.name == f"01_data-{stages['data'].key[:10]}"


def test_text_beside_the_records_of_sft_counts_by_what_it_is(make: Make, tmp_path: Path):
    """From a set of the data stage, and from a file: one that changes makes SFT and what follows another run."""
    web = write_rows(tmp_path / "web.jsonl", [{"text": f"page {i}"} for i in range(6)])
    files = ["${data.reviews.reward}", web]
    data = {
        "pretraining": [{"path": path, "kind": "text", "fields": {}} for path in files],
        "mixing": {"method": "equal"},
    }
    changes: dict[str, Any] = {"sft": {"data": data, "sft": {"pretraining_ratio": 0.5}}}
    before = plan(make(**changes))
    pretraining = before["sft"].config.data.pretraining
    assert [source.name for source in pretraining] == ["reviews.reward", None]
    assert {item.place for item in before["sft"].inputs} >= {"data.pretraining[0].path", "data.pretraining[1].path"}
    pipeline.validate(make(**changes))
    write_rows(tmp_path / "web.jsonl", [{"text": f"page {i}"} for i in range(7)])
    after = plan(make(**changes))
    assert [name for name in before if before[name].key != after[name].key] == ["sft", "reward", "ppo", "eval"]


def test_inputs_that_change_while_the_pipeline_runs_are_noticed(make: Make, tmp_path: Path):
    stages = plan(make())
    check_unchanged(stages["eval"], ContentHashes())
    path = tmp_path / "held_out.jsonl"
    path.write_text(path.read_text().replace("it", "that", 1))
    with pytest.raises(RunFolderError, match=r"held_out\.jsonl has changed since this pipeline was started"):
        check_unchanged(stages["eval"], ContentHashes())
    check_unchanged(stages["ppo"], ContentHashes())


def test_how_far_a_stage_is(make: Make):
    stage = plan(make())["sft"]
    state = lambda: str(state_of(stage, ContentHashes()))  # noqa: E731
    assert state() == "new"
    (stage.folder / "checkpoints").mkdir(parents=True)
    (stage.folder / "config.yaml").write_text("seed: 0")
    assert state() == "begun, starts again"
    for step in (5, 10):
        folder = stage.folder / "checkpoints" / f"step_{step:06d}"
        folder.mkdir()
        (folder / "driver.json").write_text("{}")
    (stage.folder / "checkpoints" / "step_000015").mkdir()  # not whole
    assert state() == "resume from step 10"
    (stage.folder / "summary.json").write_text("{}")
    with pytest.raises(
        RunFolderError, match=f"model is missing, though the stage has ended. Restore it, or remove {stage.folder}"
    ):
        state()
    (stage.folder / "model").mkdir()
    assert state() == "written"
    write_lineage(stage.folder, {"key": stage.key, "outputs": {}})
    assert state() == "done"
    write_lineage(stage.folder, {"key": "other", "outputs": {}})
    with pytest.raises(RunFolderError, match="is of key other"):
        state()


# -- What is rejected before anything runs -----------------------------------------------------------------------------


def rejection(config: PipelineConfig, error: type[RlhfDistError]) -> str:
    with pytest.raises(error) as raised:
        pipeline.run(config)
    left = [path.name for path in config.run_dir.glob("*")] if config.run_dir.exists() else []
    assert set(left) <= {"pipeline.lock", "pipeline.yaml", ".hashes.json"}, "nothing has run"
    assert ".checking_" not in str(raised.value), "a message names what will be there, not what stood in for it"
    return str(raised.value)


def test_files_and_models_of_every_stage_are_looked_for(make: Make, tmp_path: Path):
    config = make(
        ppo={"reward": {"model_path": "/no/model"}},
        eval={"data": {"prompts": [{"path": str(tmp_path / "none.jsonl"), "kind": "prompt"}]}},
    )
    text = rejection(config, ModelError)
    assert "There are 2 problems" in text
    assert "no model at '/no/model'" in text
    assert "none.jsonl does not exist" in text
    assert not config.run_dir.exists()


def test_later_stages_are_checked_on_the_records_that_they_will_get(make: Make):
    config = make(ppo={"data": {"max_length_tokens": 13, "on_too_long": "error"}})
    folder = plan(config)["data"].folder / "sets" / "prompts" / "0.jsonl"
    assert rejection(config, DataError).startswith(f"ppo: {folder}:1: the prompt has")


def test_what_is_wrong_with_several_stages_is_said_together(make: Make, tmp_path: Path):
    text = [{"path": str(tmp_path / "reviews.jsonl"), "kind": "text"}]
    config = make(
        reward={"reward": {"batch_size": 21}},
        eval={
            "policy": {"model_path": "${sft.model}"},
            "data": {"instructions": text, "prompts": [], "max_length_tokens": 4096},
        },
    )
    text = rejection(config, ConfigError)
    assert "There are 2 problems" in text
    assert "- reward: reward.batch_size is 21 but the training set has" in text
    assert "- eval: data.max_length_tokens is 4096 but the policy model at" in text
    assert "ppo:" not in text, "it starts from a stage that is rejected"


def test_a_later_context_is_checked_against_the_model_it_comes_from(make: Make):
    assert "eval: data.max_length_tokens is 4096 but" in rejection(
        make(eval={"data": {"max_length_tokens": 4096}}), ModelError
    )


def test_a_vocabulary_that_a_stage_grows(make: Make, tmp_path: Path, tiny_lm: Path):
    """Later stages are checked against the model that they will get, not against the one that it starts from."""
    path = shutil.copytree(tiny_lm, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(path)
    model = {"model_path": str(path)}
    assert "resize_embeddings" in rejection(make(sft={"model": model}), ModelError)
    pipeline.validate(make(sft={"model": model | {"resize_embeddings": True}}))


def test_a_reward_model_is_no_policy(make: Make):
    config = make(ppo={"policy": {"model_path": "${reward.model}"}})
    assert "is LlamaForSequenceClassification, which has no language-model head" in rejection(config, ModelError)


def test_a_policy_is_no_reward_model(make: Make):
    config = make(ppo={"reward": {"model_path": "${sft.model}"}})
    assert "is LlamaForCausalLM with 2 outputs, not a reward model" in rejection(config, ModelError)


def test_deepspeed_files_are_read(make: Make, tmp_path: Path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    config = make(ppo={"value": {"ds_config_path": str(path)}})
    assert "ppo: ds_config_path" in rejection(config, ConfigError)


def test_bad_records_are_named_by_their_own_file(make: Make, tmp_path: Path):
    path = tmp_path / "reviews.jsonl"
    path.write_text(path.read_text() + '{"text": "a", "rating": "high"}\n')
    assert f"data: {path}:41: field 'rating'" in rejection(make(), DataError)


def test_validate_starts_and_leaves_nothing(make: Make):
    found = pipeline.validate(make())
    assert found["data: reviews.sft"] == found["sft: training records"] == 20
    assert found["data: prompts"] == found["ppo: prompts"] == 10
    assert found["eval: prompts"] == 4
    assert found["ppo"].startswith("new, 04_ppo-")
    assert not make().run_dir.exists()


def test_a_folder_of_something_else_is_left_alone(make: Make):
    config = make()
    config.run_dir.mkdir()
    (config.run_dir / "thesis.tex").write_text("...")
    with pytest.raises(RunFolderError, match="is not empty and holds no pipeline"):
        pipeline.run(config)
    assert [path.name for path in config.run_dir.iterdir()] == ["thesis.tex"]


def test_storage_without_locks_is_not_mistaken_for_another_pipeline(make: Make, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(
        RunFolderError, match=r"pipeline\.lock cannot be locked \(No locks available\).*another run_dir"
    ):
        pipeline.run(make())


def test_two_pipelines_do_not_share_a_folder(make: Make):
    """The other is killed with SIGKILL; the lock goes with it."""
    config = make()
    code = (
        "import sys, time; from pathlib import Path; from rlhf_dist.pipeline.command import _locked\n"
        "with _locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(config.run_dir)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match=f"another pipeline runs in {config.run_dir} .process {other.pid} on"):
            pipeline.run(config)
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        with pipeline._locked(config.run_dir):
            pass
    finally:
        other.kill()
        other.wait()


def test_a_stage_of_another_minor_release_is_kept_with_a_warning(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    stage = plan(make())["eval"]
    stage.folder.mkdir(parents=True)
    for version, warned in (("0.1.0", False), ("0.1.7", False), ("0.2.0", True)):
        caplog.clear()
        write_lineage(stage.folder, {"key": stage.key, "code": {"rlhf_dist": version}})
        monkeypatch.setattr("rlhf_dist.__version__", "0.1.2")
        warn_of_version(stage)
        assert bool(caplog.records) == warned
