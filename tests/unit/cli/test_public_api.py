"""The public Python API: what `import rlhf_dist` offers, and the example in launch/."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_dist

ROOT = Path(__file__).resolve().parents[3]


def test_every_public_name_can_be_imported_and_is_documented():
    names = set(rlhf_dist.__all__) - {"__version__"}
    assert names == set(rlhf_dist._WHERE)
    for name in names:
        assert getattr(rlhf_dist, name).__doc__, name
    assert {"load_config", "run_sft", "run_reward", "run_ppo", "run_eval"} <= names
    assert (Path(rlhf_dist.__file__).parent / "py.typed").is_file()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = rlhf_dist.no_such_name


def test_importing_the_package_loads_nothing_heavy():
    program = "import rlhf_dist, sys; print(*{'torch', 'ray', 'transformers', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_example_runs(tmp_path: Path, tiny_lm: Path):
    (tmp_path / "texts.jsonl").write_text('{"text": "good and bad and kind"}\n' * 4, encoding="utf-8")
    config = {
        "run_dir": str(tmp_path / "run"),
        "cluster": "inline",
        "model": {"model_path": str(tiny_lm), "precision": "fp32"},
        "data": {"train": [{"path": str(tmp_path / "texts.jsonl"), "kind": "text"}], "max_length_tokens": 32},
        "sft": {"batch_size": 2},
    }
    (tmp_path / "sft.yaml").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, str(ROOT / "launch" / "python_api.py"), "sft", str(tmp_path / "sft.yaml")]
    done = subprocess.run(
        [*command, "--sft.num_steps", "1", "--seed", "7"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2] == "7"
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    wrong = subprocess.run([*command, "--sft.no_key", "1"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "ConfigError" in wrong.stderr
    assert "Traceback" not in wrong.stderr
