"""Paths that processes elsewhere use are absolute; a DeepSpeed file may not contradict its role."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from rlhf_dist.config import SFTConfig
from rlhf_dist.config.deepspeed import read_ds_config
from rlhf_dist.config.load import load_config
from rlhf_dist.errors import ConfigError


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
            r"sets fp16; remove it: fp16 is set by precision",
        ),
        (b'{"amp": {"enabled": false}, "zero_optimization": {"stage": 2}}', r"amp is set by precision"),
        (b'{"data_types": {}, "zero_optimization": {"stage": 2}}', r"data_types is set by precision"),
        (b'{"bfloat16": {"enabled": false}, "zero_optimization": {"stage": 2}}', r"bfloat16 is set by precision"),
        (b'{"zero_optimization": true}', r'zero_optimization: True; it must be an object such as \{"stage": 2\}'),
        (b'{"bf16": 1, "zero_optimization": {"stage": 2}}', r"bf16: 1; it must be an object"),
        (b"\xff\xfe", r"is not UTF-8"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_used_is_refused(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=words):
        read_ds_config(path, 2, "fp32")


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_gradients_that_could_not_be_checked_are_refused(tmp_path: Path, part: str):
    path = tmp_path / "ds.json"
    for device, refused in (("cpu", False), ("nvme", True)):
        path.write_text(json.dumps({"zero_optimization": {"stage": 3, part: {"device": device}}}), encoding="utf-8")
        with pytest.raises(ConfigError, match=f"{part} on nvme, .* offload to cpu") if refused else nullcontext():
            read_ds_config(path, 3, "fp32")


def test_one_configuration_serves_several_seeds(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: runs/seed_{seed}\nmodel: {model_path: m}\ndata: {train: [{path: x, kind: text}]}\n")
    for seed, overrides in ((0, []), (7, ["--seed", "7"])):
        assert load_config(SFTConfig, path, overrides).run_dir == Path(f"runs/seed_{seed}").absolute()
    given = load_config(SFTConfig, path, ["--run_dir", f"{tmp_path}/{{seed}}", "--seed=3"])
    assert given.run_dir == tmp_path / "3"
