"""What hosting rejects before anything starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from rlhf_dist.config.hosting import RayConfig
from rlhf_dist.config.load import load_config
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.sft.config import SFTConfig

SFT = """\
run_dir: runs/a
cluster: inline
model: {model_path: p}
data: {train: [{path: a.jsonl, kind: instruction}]}
ray: {env_vars: {NCCL_DEBUG: INFO}}
"""


def test_variables_of_rank_processes_are_not_dropped_where_there_are_none(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(SFT, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"ray\.env_vars sets NCCL_DEBUG .*cluster: inline.*set them in the shell"):
        load_config(SFTConfig, path)
    assert load_config(SFTConfig, path, ["--cluster", "ray"]).ray.env_vars == {"NCCL_DEBUG": "INFO"}


@pytest.mark.parametrize("variable", ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"])
def test_two_configured_interfaces_are_rejected(variable: str):
    said = rf"network_interface is 'ib0' and env_vars sets {variable} 'eth0'; keep one"
    with pytest.raises(ValidationError, match=re.escape(said)):
        RayConfig(network_interface="ib0", env_vars={variable: "eth0"})
    assert RayConfig(env_vars={variable: "eth0"}).network_interface is None
