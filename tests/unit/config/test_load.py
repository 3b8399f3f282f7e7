from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.config.keys import nearest_key, schema_keys
from rlhf_dist.config.load import dump_yaml, json_schema, load_config, overrides_help
from rlhf_dist.config.yaml_file import parse_yaml, to_yaml
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.evaluation.config import EvalConfig
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.sft.config import SFTConfig

PPO = """\
run_dir: runs/a
resume: no
tracking: {wandb: off}
policy:
  model_path: p
  optimizer: {learning_rate: 1e-5}
reward: {model_path: r}
data:
  prompts:
    - {path: a.jsonl, kind: prompt}
"""


@pytest.fixture
def ppo(tmp_path: Path) -> Path:
    path = tmp_path / "ppo.yaml"
    path.write_text(PPO, encoding="utf-8")
    return path


def rejection(path: Path | None, *overrides: str, schema: type = PPOConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(schema, path, overrides)
    return str(caught.value)


def test_words_mean_what_the_help_says(ppo: Path):
    """YAML 1.1 would read `no` and `off` as false, and 1e-5 as text."""
    config = load_config(PPOConfig, ppo)
    assert config.resume == "no"
    assert config.tracking.wandb == "off"
    assert config.policy.optimizer.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("text", "value"), [("010", 10), ("-7", -7), ("0x1F", 31), ("0o17", 15), ("1:30", "1:30"), ("1_0", "1_0")]
)
def test_integers_are_those_of_yaml_1_2(text: str, value: object):
    assert parse_yaml(f"a: {text}") == {"a": value}
    assert parse_yaml(to_yaml({"a": value})) == {"a": value}
    assert parse_yaml(to_yaml(text)) == text, "a string that looks like a number is quoted"


def test_overrides_of_every_type(ppo: Path):
    overrides = ["--ppo.kl_coef", "0.1", "--seed=4", "--overwrite", "true", "--tracking.tensorboard=false"]
    overrides += ["--ppo.value_clip_range", "null", "--policy.optimizer.betas", "[0.5, 0.75]"]
    overrides += ["--data.prompts", "[{path: 'a, b.csv', kind: prompt, fields: {prompt: q}, columns: [q, a]}]"]
    overrides += ["--reference", '{"num_ranks": 2}', "--policy.zero_stage=3"]
    config = load_config(PPOConfig, ppo, overrides)
    assert config.ppo.kl_coef == 0.1
    assert config.seed == 4
    assert config.overwrite is True
    assert config.tracking.tensorboard is False
    assert config.ppo.value_clip_range is None
    assert config.policy.optimizer.betas == (0.5, 0.75)
    assert [s.model_dump(exclude_unset=True) for s in config.data.prompts] == [
        {"path": "a, b.csv", "kind": "prompt", "fields": {"prompt": "q"}, "columns": ("q", "a")}
    ]
    assert config.reference.num_ranks == 2
    assert config.policy.zero_stage == 3
    assert config.policy.optimizer.learning_rate == 1e-5, "the file's other keys of the section stay"


def test_without_a_file():
    config = load_config(
        SFTConfig, None, ["--run_dir=r", "--model.model_path=m", "--data.train", "[{path: a, kind: text}]"]
    )
    assert config.run_dir == Path("r").absolute()


@pytest.mark.parametrize("source", ["file", "overrides"])
def test_environment_variables_are_not_settings(ppo: Path, monkeypatch: pytest.MonkeyPatch, source: str):
    monkeypatch.setenv("SEED", "7")
    monkeypatch.setenv("PPO", '{"kl_coef": 5}')
    config = load_config(PPOConfig, ppo, [] if source == "file" else ["--device=cpu"])
    assert config.seed == 0
    assert config.ppo.kl_coef == 0.05


def test_every_problem_is_named_at_once(ppo: Path):
    with ppo.open("a", encoding="utf-8") as file:
        file.write("kl_coef: 2\nppo:\n  gamma: 1.5\n  num_epoch: 3\n")
    message = rejection(ppo, "--ppo.ptx_coeff", "3", "--rollout.temperature", "0", "--seed=-1")
    assert "6 problems" in message
    assert "line 11: kl_coef: there is no such key; did you mean ppo.kl_coef?" in message
    assert "line 13: ppo.gamma is 1.5, but must be less than or equal to 1" in message
    assert "line 14: ppo.num_epoch: there is no such key; did you mean ppo.num_epochs?" in message
    assert "--ppo.ptx_coeff: there is no such key; did you mean --ppo.ptx_coef?" in message
    assert "rollout.temperature is '0', but must be greater than 0" in message
    assert "Change --rollout.temperature." in message
    assert "seed is '-1', but must be greater than or equal to 0" in message


def test_unknown_key_in_a_list(ppo: Path):
    ppo.write_text(PPO.replace("kind: prompt", "kind: prompt, colums: [a]"), encoding="utf-8")
    message = rejection(ppo)
    assert "line 10: data.prompts[0].colums: there is no such key; did you mean data.prompts[0].columns?" in message
    assert "1 problem " in message, "a list with a wrong item is not also called too short"


def test_unknown_key_unlike_any_other_lists_the_section(ppo: Path):
    assert "policy.optimizer has betas, eps, learning_rate" in rejection(ppo, "--policy.optimizer.zzz=3")
    in_a_list = yaml.safe_load(ppo.read_text(encoding="utf-8"))
    in_a_list["data"]["prompts"][0]["zzzzzzz"] = 3
    ppo.write_text(yaml.safe_dump(in_a_list), encoding="utf-8")
    assert "data.prompts[0] has " in (message := rejection(ppo))
    assert ", path, " in message


def test_missing_key_says_how_to_give_it(tmp_path: Path):
    path = tmp_path / "sft.yaml"
    path.write_text("run_dir: r\ndata: {train: [{path: a, kind: text}]}\nmodel: {}\n", encoding="utf-8")
    message = rejection(path, schema=SFTConfig)
    assert "model.model_path is missing, and has no default" in message
    assert "pass --model.model_path VALUE" in message


def test_cross_field_rules_see_the_overrides(ppo: Path):
    message = rejection(ppo, "--ppo.mini_batch_size", "7")
    assert "ppo: mini_batch_size 7 does not divide the 64 responses" in message
    assert load_config(PPOConfig, ppo, ["--ppo.mini_batch_size=7", "--ppo.prompts_per_iteration=14"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1, 2\nb: 3\n", "line 2"),
        ("- 1\n- 2\n", "holds a list; a configuration is a mapping"),
        ("seed: 1\nseed: 2\n", "line 2: the key 'seed' is already in line 1"),
        ("seed: !!python/object:os.system 1\n", "is not valid YAML"),
    ],
)
def test_broken_files_name_file_and_line(tmp_path: Path, content: str, expected: str):
    path = tmp_path / "broken.yaml"
    path.write_text(content, encoding="utf-8")
    message = rejection(path)
    assert expected in message
    assert str(path) in message


def test_files_that_cannot_be_read(tmp_path: Path):
    assert "does not exist" in rejection(tmp_path / "none.yaml")
    assert "cannot be read" in rejection(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9\n")
    assert "not UTF-8" in rejection(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--ppo.kl_coef"], "expected one argument"),
        (["other.yaml"], "'other.yaml' stands where an override is expected"),
        (["--seed", "1", "other.yaml"], "other.yaml"),
        (["--data.ptx", "[{path: a"], "--data.ptx, line 1"),
        (["--ppo.kl", "0.1"], "--ppo.kl: there is no such key"),
    ],
)
def test_overrides_that_cannot_be_read(ppo: Path, overrides: list[str], expected: str):
    assert expected in rejection(ppo, *overrides)


@pytest.mark.parametrize(
    "overrides", [[], ["--policy.optimizer.eps=1e-12", "--run_dir=chạy/1e3", "--reward.model_path=no"]]
)
def test_a_dumped_configuration_reads_back(ppo: Path, tmp_path: Path, overrides: list[str]):
    config = load_config(PPOConfig, ppo, overrides)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(PPOConfig, dumped) == config
    assert yaml.safe_load(dumped.read_text(encoding="utf-8"))["resume"] == "no", "other YAML readers see the word, too"


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(
        ["no", "off", "y", "1e5", "1e-5", "null", "~", "2020-01-01", "0x1F", "1_0", "", " a: b", "é", ".inf"]
    )
    | st.text(st.characters(min_codepoint=32, exclude_categories=["C", "Zl", "Zp"])),
    lambda children: st.lists(children) | st.dictionaries(st.text("abc_", min_size=1), children),
    max_leaves=6,
)


@given(values)
def test_yaml_round_trip(value: object):
    assert parse_yaml(to_yaml(value)) == value


def test_every_key_has_a_help_text_or_is_a_section():
    for schema in (SFTConfig, RewardConfig, PPOConfig, EvalConfig):
        keys = schema_keys(schema)
        leaves = [k for k in keys if not any(other.startswith((f"{k}.", f"{k}[]")) for other in keys)]
        assert [k for k in leaves if not keys[k]] == []


def test_nearest_key_prefers_the_section_at_hand():
    keys = schema_keys(PPOConfig)
    assert nearest_key(("value", "learning_rate"), keys) == "value.optimizer.learning_rate"
    assert nearest_key(("reward", "num_rank"), keys) == "reward.num_ranks"
    assert nearest_key(("xyzzy",), keys) is None


def test_help_and_schema_have_every_key():
    keys = schema_keys(PPOConfig)
    text = overrides_help(PPOConfig, "prog", "usage", "")
    assert [k for k in keys if "[]" not in k and f"--{k} " not in text] == []
    words = " ".join(text.split())
    assert "weight of the per-token KL penalty" in words
    assert "(default: 0.05)" in words
    assert '"kl_coef"' in json_schema(PPOConfig)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["value_warmup_iterations", "100"], "value_warmup_iterations 100 leaves none of the 100 iterations"),
        (["kl_in", "loss"], "kl_in is loss and kl_estimator is k1, whose gradient is 0"),
        (["adaptive_kl_target", "6", "--ppo.kl_coef", "0"], "adaptive_kl_target is 6.0 but kl_coef is 0"),
        (
            ["adaptive_kl_target", "6", "--ppo.kl_horizon", "32"],
            "kl_horizon 32 is shorter than one iteration of 64 responses",
        ),
        (
            ["early_stop_kl", "1", "--ppo.num_epochs", "1", "--ppo.mini_batch_size", "64"],
            "one optimizer step",
        ),
        (["overlong_penalty", "1", "--ppo.overlong_buffer_tokens", "999"], "overlong_buffer_tokens 999 is more than"),
        (["clip_range", "1"], "clip_range"),
        (["dual_clip", "1"], "dual_clip"),
        (["ema_decay", "0"], "ema_decay"),
    ],
)
def test_settings_of_ppo_that_cannot_work_are_rejected(ppo: Path, overrides: list[str], said: str):
    assert said in rejection(ppo, f"--ppo.{overrides[0]}", *overrides[1:])
