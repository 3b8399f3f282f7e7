"""Paths that processes elsewhere use are absolute; a DeepSpeed file may not contradict its role."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from rlhf_dist.config.deepspeed import read_ds_config
from rlhf_dist.config.load import load_config
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.sft.config import SFTConfig


def test_paths_are_meant_from_where_the_command_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm").mkdir()
    data = {"train": [{"path": "x.jsonl", "kind": "text"}], "template_path": "t.jinja"}
    config = SFTConfig.model_validate({"run_dir": "runs/a", "model": {"model_path": "lm"}, "data": data})
    assert config.run_dir == tmp_path / "runs" / "a"
    assert config.model.model_path == str(tmp_path / "lm")
    assert config.data.template_path == tmp_path / "t.jinja"
    hub = SFTConfig.model_validate({"run_dir": "runs/a", "model": {"model_path": "owner/name"}, "data": data})
    assert hub.model.model_path == "owner/name"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            b'{"zero_optimization": {"stage": 2}, "fp16": {"enabled": true}}',
            r"fp16.enabled true but the role's precision is fp32; remove the section fp16 .* or change precision",
        ),
        (b'{"amp": {"enabled": false}, "zero_optimization": {"stage": 2}}', r"amp is set by precision"),
        (b'{"data_types": {}, "zero_optimization": {"stage": 2}}', r"data_types is set by precision"),
        (b'{"bfloat16": {"enabled": false}, "zero_optimization": {"stage": 2}}', r"bfloat16 is set by precision"),
        (b'{"zero_optimization": true}', r'zero_optimization: True; it must be an object such as \{"stage": 2\}'),
        (b'{"bf16": 1, "zero_optimization": {"stage": 2}}', r"bf16: 1; remove it"),
        (b'{"bf16": {"enabled": "auto"}}', r'bf16.enabled "auto" .* precision is fp32; remove'),
        (b'{"torch_autocast": {"enabled": true}}', r"torch_autocast is set by precision"),
        (b"\xff\xfe", r"is not UTF-8"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_used_is_rejected(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=words):
        read_ds_config(path, 2, "fp32")


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_gradients_that_could_not_be_checked_are_rejected(tmp_path: Path, part: str):
    path = tmp_path / "ds.json"
    for device, rejected in (("cpu", False), ("nvme", True)):
        path.write_text(json.dumps({"zero_optimization": {"stage": 3, part: {"device": device}}}), encoding="utf-8")
        with pytest.raises(ConfigError, match=f"{part} on nvme, .* offload to cpu") if rejected else nullcontext():
            read_ds_config(path, 3, "fp32")


def test_one_configuration_serves_several_seeds(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: runs/seed_{seed}\nmodel: {model_path: m}\ndata: {train: [{path: x, kind: text}]}\n")
    for seed, overrides in ((0, []), (7, ["--seed", "7"])):
        assert load_config(SFTConfig, path, overrides).run_dir == Path(f"runs/seed_{seed}").absolute()
    given = load_config(SFTConfig, path, ["--run_dir", f"{tmp_path}/{{seed}}", "--seed=3"])
    assert given.run_dir == tmp_path / "3"


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        (
            {"stage": 3, "zero_hpz_partition_size": 4},
            r"zero_hpz_partition_size 4, which does not divide the role's 6 ranks",
        ),
        (
            {"stage": 3, "zero_hpz_partition_size": 12},
            r"divide the role's 6 ranks; use the number of its ranks on one node",
        ),
        ({"stage": 3, "zero_hpz_partition_size": "2"}, r"zero_hpz_partition_size '2'; it must be a number of ranks"),
        (
            {"stage": 2, "zero_hpz_partition_size": 2},
            r"zero_hpz_partition_size at ZeRO stage 2, .*; use stage 3 or remove it",
        ),
        ({"stage": 2, "zero_quantized_weights": True}, r"zero_quantized_weights at ZeRO stage 2"),
        (
            {"stage": 3, "zero_quantized_gradients": True},
            r"zero_quantized_gradients: .* NaN .* remove it",
        ),
        (
            {"stage": 2, "zenflow": {"topk_ratio": 0.1}},
            r"zenflow: it applies a part of the gradient before .* remove it",
        ),
        ({"stage": 2, "cpu_offload": True}, r"cpu_offload: write offload_optimizer: \{device: cpu\}"),
        ({"stage": 2, "offload_optimizer": True}, r"offload_optimizer: True; it must be an object"),
        (
            {"stage": 0, "offload_optimizer": {"device": "cpu"}},
            r"offload_optimizer at ZeRO stage 0, .* use stage 1 or higher",
        ),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, r"offload_param at ZeRO stage 2, .* use stage 3 or higher"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, r"ratio 0\.5: .* learning-rate schedule"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}, r"super_offload: .* remove it"),
    ],
)
def test_settings_of_zero_that_no_role_can_train_with_are_rejected(tmp_path: Path, zero: dict, words: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_ds_config(path, zero["stage"], "fp32", num_ranks=6)


def test_what_only_switches_a_rejected_setting_off_is_accepted(tmp_path: Path) -> None:
    zero = {"stage": 3, "zero_quantized_gradients": False, "zero_hpz_partition_size": 1, "offload_param": None}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    assert read_ds_config(path, 3, "fp32", num_ranks=6)["zero_optimization"] == zero
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}), encoding="utf-8")
    assert read_ds_config(path, 3, "fp32", num_ranks=6)
    assert read_ds_config(path, 3, "fp32")  # the number of ranks is not known


def test_a_partition_that_does_not_divide_the_ranks_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    from rlhf_dist.config.hosting import TrainedModel
    from rlhf_dist.run.checks import check_ds_config

    path = tmp_path / "ds.json"
    content = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}, "bf16": {"enabled": True}}
    path.write_text(json.dumps(content), encoding="utf-8")
    model = TrainedModel(model_path="m", zero_stage=3, num_ranks=12, ds_config_path=path)
    with pytest.raises(ConfigError, match="does not divide the role's 12 ranks"):
        check_ds_config(model)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("said", [None, "fp32", "bf16", "fp16"])
def test_precision_is_the_roles_which_a_file_may_repeat(tmp_path: Path, precision: str, said: str | None) -> None:
    path = tmp_path / "ds.json"
    zero = {"zero_optimization": {"stage": 2}}
    sections = {name: {"enabled": said == name} for name in ("bf16", "fp16")} if said else {}
    path.write_text(json.dumps(zero | sections), encoding="utf-8")
    if said in (None, precision):
        assert read_ds_config(path, 2, precision) == zero
    else:
        with pytest.raises(ConfigError, match=rf"(bf|fp)16\.enabled .* precision is {precision}; remove the section"):
            read_ds_config(path, 2, precision)


@pytest.mark.parametrize(
    ("precision", "keys"),
    [
        ("fp16", ["initial_scale_power", "loss_scale"]),
        ("bf16", ["bf16_master_weights_and_grads", "check_grad_overflow"]),
    ],
)
def test_a_precision_section_holds_nothing_but_enabled(tmp_path: Path, precision: str, keys: list[str]) -> None:
    path = tmp_path / "ds.json"
    section = {"enabled": True} | dict.fromkeys(keys, 1)
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, precision: section}), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"sets {', '.join(keys)} in {precision}; remove it: .* no step is skipped"):
        read_ds_config(path, 2, precision)
