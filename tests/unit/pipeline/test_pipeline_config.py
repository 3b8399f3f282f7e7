"""A pipeline's configuration: stages of the ordinary schemas, and interpolation between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.config.keys import schema_keys
from rlhf_dist.config.load import dump_yaml, json_schema, load_config
from rlhf_dist.config.yaml_file import to_yaml
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.pipeline.config import PipelineConfig
from rlhf_dist.ppo.config import PPOConfig

PROMPTS = [{"path": "p.jsonl", "kind": "prompt"}]
REVIEWS = {"path": "r.tsv", "kind": "ratings", "columns": ["id", "rating", "text"], "fields": {"response": "text"}}


def whole(**changes: Any) -> dict[str, Any]:
    """All stages, with no more than must be said; a change of None leaves a stage out."""
    stages: dict[str, Any] = {
        "run_dir": "runs/p",
        "data": {
            "sets": [{"name": "reviews", "sources": [REVIEWS | {"min_margin": 1.5}], "parts": {"a": 0.5, "b": 0.5}}]
        },
        "sft": {"model": {"model_path": "base"}, "data": {"train": [{"path": "${data.reviews.a}", "kind": "text"}]}},
        "reward": {"data": {"train": [{"path": "${data.reviews.b}"}]}},
        "ppo": {"data": {"prompts": PROMPTS}},
        "eval": {"data": {"prompts": PROMPTS, "preferences": [{"path": "${data.reviews.b}", "kind": "ratings"}]}},
    }
    return {name: value for name, value in (stages | changes).items() if value is not None}


def check(config: dict[str, Any], tmp_path: Path, *overrides: str) -> PipelineConfig:
    path = tmp_path / "pipeline.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    return load_config(PipelineConfig, path, overrides)


def rejection(config: dict[str, Any], tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        check(config, tmp_path, *overrides)
    return str(error.value)


def at(config: PipelineConfig, key: str) -> Any:
    """The value of a dotted key; None below a section that is absent."""
    value: Any = config
    for name in key.split("."):
        value = None if value is None else getattr(value, name)
    return value


MODELS = (
    "reward.model",
    "ppo.policy",
    "ppo.reward",
    "ppo.value",
    "ppo.reference",
    "eval.policy",
    "eval.reference",
    "eval.reward",
)


def paths(config: PipelineConfig) -> dict[str, str | None]:
    return {name: at(config, f"{name}.model_path") for name in MODELS}


def test_models_that_are_skipped_come_from_the_natural_earlier_stage(tmp_path: Path):
    assert paths(check(whole(), tmp_path)) == {
        "reward.model": "${sft.model}",
        "ppo.policy": "${sft.model}",
        "ppo.reward": "${reward.model}",
        "ppo.value": "${reward.model}",  # PPO itself takes the reward model's
        "ppo.reference": "${sft.model}",
        "eval.policy": "${ppo.model}",
        "eval.reference": "${sft.model}",
        "eval.reward": "${reward.model}",
    }


def test_what_is_set_stays(tmp_path: Path):
    config = check(
        whole(),
        tmp_path,
        *("--reward.model.model_path", "base", "--ppo.policy.model_path=other", "--ppo.reward.precision", "fp32"),
    )
    found = paths(config)
    assert (found["reward.model"], found["ppo.policy"], found["ppo.reward"]) == ("base", "other", "${reward.model}")
    assert found["eval.reference"] == "other", "the evaluation measures from where PPO started"
    assert at(config, "ppo.reward.precision") == "fp32"


def test_an_evaluation_without_ppo_measures_the_sft_model_against_nothing(tmp_path: Path):
    config = check(whole(ppo=None), tmp_path)
    assert at(config, "eval.policy.model_path") == "${sft.model}"
    assert at(config, "eval.reference") is None


def test_an_evaluation_takes_no_model_that_it_has_no_records_for(tmp_path: Path):
    config = check(whole(eval={"data": {"preferences": [{"path": "${data.reviews.b}"}]}}), tmp_path)
    assert at(config, "eval.policy") is None
    assert at(config, "eval.reference") is None
    assert at(config, "eval.reward.model_path") == "${reward.model}"


def test_a_source_has_the_reading_of_its_set(tmp_path: Path):
    config = check(whole(), tmp_path)
    [same], [other] = at(config, "reward.data.train"), at(config, "sft.data.train")
    assert (same.kind, same.fields, same.min_margin) == ("ratings", {"response": "text"}, 1.5)
    assert same.columns is None, "the set is written with its columns' names"
    assert (other.kind, other.fields) == ("text", {}), "of another kind, a source says itself what its fields are"


def test_stages_have_every_key_of_their_commands_but_those_of_hosting():
    own = {"policy", "reward", "value", "reference", "rollout", "data", "ppo", "colocate"}
    shared = {"seed", "tracking", "checkpoint"}
    expected = {f"ppo.{key}": text for key, text in schema_keys(PPOConfig).items() if key.split(".")[0] in own | shared}
    found = {key: text for key, text in schema_keys(PipelineConfig).items() if key.startswith("ppo.")}
    assert found.keys() == expected.keys()
    assert all(found[key] == expected[key] for key in expected if key.startswith("ppo.ppo."))
    hosting = {"run_dir", "cluster", "device", "ray", "resume", "overwrite"}
    assert {key.split(".")[0] for key in schema_keys(PPOConfig)} == own | shared | hosting


def test_the_resolved_configuration_reads_back_the_same(tmp_path: Path):
    config = check(
        whole() | {"tracking": {"tensorboard": True}, "checkpoint": {"every_steps": 5}},
        tmp_path,
        *("--sft.tracking.num_samples", "9", "--ppo.checkpoint.every_steps", "2", "--ppo.ppo.kl_coef", "0.2"),
    )
    assert at(config, "sft.tracking.tensorboard") is True, "laid over the pipeline's"
    assert at(config, "sft.tracking.num_samples") == 9
    assert (at(config, "ppo.checkpoint.every_steps"), at(config, "ppo.ppo.kl_coef")) == (2, 0.2)
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(PipelineConfig, again) == config


def test_all_problems_are_reported_together(tmp_path: Path):
    config = whole(
        data={"sets": [{"name": "reviews", "sources": [REVIEWS], "parts": {"a": 0.5, "b": 0.6}}]},
        sft=None,
        reward={"data": {"train": [{"path": "${data.review}", "kind": "text"}], "max_length_token": 3}},
    )
    text = rejection(config, tmp_path, "--ppo.ppo.kl_coff", "1", "--ppo.ppo.num_epochs", "0")
    assert "There are 7 problems" in text
    assert "--ppo.ppo.kl_coff: there is no such key; did you mean --ppo.ppo.kl_coef?" in text
    assert "the parts of set 'reviews' add up to 1.1, more than 1; lower a share" in text
    assert "did you mean reward.data.max_length_tokens?" in text
    assert "ppo.ppo.num_epochs is '0', but must be greater than or equal to 1" in text
    assert "reward.data.train[0].path: is '${data.review}', but no set has that name; did you mean reviews?" in text
    for place in ("reward.model", "ppo.policy"):
        assert (
            f"{place}.model_path: is missing, and there is no sft stage to take it from; set it, or add an sft stage"
            in text
        )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--ppo.policy.model_path", "${ppo.model}"], "ppo does not run before ppo; name an earlier stage"),
        (["--sft.model.model_path", "${reward.model}"], "reward does not run before sft"),
        (["--ppo.policy.model_path", "${sft.modl}"], "sft makes no 'modl'; write ${sft.model}"),
        (["--eval.policy.model_path", "${ppo.model_ema}"], "set ppo.ppo.ema_decay, or write ${ppo.model}"),
        (["--ppo.policy.model_path", "${data.reviews.a}"], "only a model_path takes a model and only the path of a source"),
        (["--sft.model.model_path", "x/${sft.model}"], "which is not an interpolation; write ${STAGE.model} for a model"),
        (["--ppo.data.template_path", "${sft.model}"], "only a model_path takes a model"),
        (["--eval.data.prompts", '[{path: "${data.reviews}", kind: text}]'], "name one of them: ${data.reviews.a}"),
        (["--data", "null"], "the pipeline has no data stage; add it, or give a path"),
        (["--reward", "null"], "there is no reward stage to take it from; set it, or add a reward stage"),
    ],
)  # fmt: skip
def test_an_interpolation_that_does_not_resolve(overrides: list[str], expected: str, tmp_path: Path):
    assert expected in rejection(whole(), tmp_path, *overrides)


def test_a_set_that_is_not_divided_has_no_parts(tmp_path: Path):
    sets = [{"name": "reviews", "sources": [REVIEWS]}]
    assert "has no parts; write ${data.reviews}, or give the set parts" in rejection(
        whole(data={"sets": sets}), tmp_path
    )


def test_the_average_of_the_policy_can_be_evaluated_where_it_is_kept(tmp_path: Path):
    config = check(whole(), tmp_path, "--eval.policy.model_path", "${ppo.model_ema}", "--ppo.ppo.ema_decay", "0.9")
    assert at(config, "eval.policy.model_path") == "${ppo.model_ema}"


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ([{"name": "a", "sources": [REVIEWS]}] * 2, "sets has a more than once"),
        ([{"name": "a", "sources": [REVIEWS, *PROMPTS]}], "are of kinds prompt, ratings; make a set of each kind"),
        ([{"name": "a.b", "sources": [REVIEWS]}], "data.sets[0].name is 'a.b'"),
        ([{"name": "a", "sources": [REVIEWS], "parts": {"x": 0}}], "must be greater than 0"),
        ([], "data.sets"),
    ],
)
def test_sets_that_cannot_be_made(sets: list[Any], expected: str, tmp_path: Path):
    assert expected in rejection({"run_dir": "r", "data": {"sets": sets}}, tmp_path)


def test_a_pipeline_needs_a_stage(tmp_path: Path):
    assert "has no stage; add one or more of the sections data, sft, reward, ppo, eval" in rejection(
        {"run_dir": "r"}, tmp_path
    )


def test_any_stage_may_stand_alone(tmp_path: Path):
    assert list(check(whole(sft=None, reward=None, ppo=None, eval=None), tmp_path).stages) == ["data"]
    alone = {
        "run_dir": "r",
        "ppo": {"policy": {"model_path": "a"}, "reward": {"model_path": "b"}, "data": {"prompts": PROMPTS}},
    }
    assert list(check(alone, tmp_path).stages) == ["ppo"]


def test_rules_of_the_commands_hold(tmp_path: Path):
    text = rejection(whole(), tmp_path, "--ppo.ppo.ptx_coef", "0.1", "--eval.rollout.max_response_tokens", "4000")
    assert "ppo.ptx_coef is 0.1 but data.ptx names no text" in text
    assert "rollout.max_response_tokens 4000 leaves no room for a prompt" in text


def test_editors_are_told_what_may_be_skipped():
    definitions = json.loads(json_schema(PipelineConfig))["$defs"]
    assert "model_path" in definitions["TrainedModel"]["required"]
    assert "model_path" not in definitions["PipelineReward"]["properties"]["model"]["required"]
    assert "model_path" not in definitions["PipelinePPO"]["properties"]["value"]["required"]
    assert definitions["PipelinePPO"]["required"] == ["data"]
