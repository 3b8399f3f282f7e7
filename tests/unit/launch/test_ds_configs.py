"""Every file of ds_configs/: read as a role reads it, and stepped on a real model."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from rlhf_dist.config.deepspeed import OWNED_KEYS, PRECISION_SECTIONS, read_ds_config
from rlhf_dist.config.hosting import OptimizerConfig, Precision, TrainedModel
from rlhf_dist.core.batches import TokenBatch
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.distributed.deepspeed.optimizer import uses_cpu_adam
from rlhf_dist.distributed.deepspeed.zero import ds_config
from rlhf_dist.distributed.group import WorkerSpec
from rlhf_dist.distributed.inline import InlineSession
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.models.architecture import architecture
from rlhf_dist.planning.sharding import Sharding, trained_states
from rlhf_dist.sft.roles import LanguageModelRole

FOLDER = Path(__file__).resolve().parents[3] / "ds_configs"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
FILES = sorted(FOLDER.glob("*.json"))
SEVERAL_RANKS = [FOLDER / "zero3_hpz.json", FOLDER / "zero3_zeropp.json"]
"""Made for nodes of eight ranks: tests/unit/distributed/deepspeed/test_hpz.py compares them, on four,
with plain ZeRO-3."""
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32", "fp16")


def role_of(path: Path, model_path: str = "m", precision: Precision = "bf16") -> TrainedModel:
    """A role with the ZeRO stage of the file's name."""
    stage = int(path.stem.removeprefix("zero")[0])
    return TrainedModel(
        model_path=model_path,
        zero_stage=stage,  # pyright: ignore[reportArgumentType]
        precision=precision,
        num_ranks=8 if path in SEVERAL_RANKS else 1,
        micro_batch_size=2,
        ds_config_path=path,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0, schedule="constant"),
    )


def losses(role: TrainedModel, tmp_path: Path, num_steps: int = 3) -> list[float]:
    """Losses of a few steps on one batch."""
    tokens = torch.arange(32).reshape(4, 8) + 10
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[:, 0] = False
    batch = TokenBatch(tokens, torch.full((4,), 8), mask)
    spec = WorkerSpec("model", role, partial(LanguageModelWorker, role, num_steps=num_steps))
    with InlineSession("cpu").place([spec], seed=0, logs_dir=lambda: tmp_path) as groups:
        model = LanguageModelRole(groups["model"], role.micro_batch_size)
        return [model.update(batch, step).result().metrics["sft/loss"] for step in range(num_steps)]


@pytest.mark.parametrize("num_ranks", [1, 8, 64])
@pytest.mark.parametrize("stage", range(4))
def test_the_readme_counts_bytes_as_deepspeed_does(stage: int, num_ranks: int):
    """`planning.sharding` is compared with real engines byte for byte; the table of the README against it."""
    rows = re.findall(r"^\| (\d) \| ([\d/N]+) \| ([\d/N]+) \| ([\d/N]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    *cells, on_eight = rows[stage][1:]
    said = [Fraction(cell.partition("/")[0]) / (num_ranks if "/" in cell else 1) for cell in cells]
    model = architecture(str(FOLDER.parent / "launch" / "recipes" / "model_configs" / "llama-3.1-8b"))
    role = role_of(FOLDER / f"zero{stage}.json")
    states = trained_states(model, Sharding.of(role, num_ranks), 0)
    held = [states.parameters.gpu, states.gradients.gpu, states.optimizer.gpu]
    assert [size / model.num_parameters for size in held] == pytest.approx(list(map(float, said)), rel=0.01)
    if num_ranks == 8:
        assert float(on_eight) == float(sum(said))


def test_one_file_a_stage_or_offload_variant():
    variants = {"zero2_offload", "zero3_offload", "zero3_offload_optimizer", "zero3_hpz", "zero3_zeropp"}
    assert {path.stem for path in FILES} == {f"zero{stage}" for stage in range(4)} | variants


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_it_serves_every_precision(path: Path):
    """The precision is the role's; the file says nothing about it."""
    written = json.loads(path.read_text(encoding="utf-8"))
    assert not written.keys() & {*OWNED_KEYS, *PRECISION_SECTIONS}
    for precision in PRECISIONS:
        role = role_of(path, precision=precision)
        assert read_ds_config(path, role.zero_stage, precision, role.num_ranks) == written
        given = ds_config(zero_stage=role.zero_stage, precision=precision, path=path, num_ranks=role.num_ranks)
        assert [given.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")] == [
            precision == "bf16",
            precision == "fp16",
        ]
    offloaded = {key for key in written["zero_optimization"] if key.startswith("offload_")}
    assert bool(offloaded) == ("offload" in path.stem)


ONE_RANK = [path for path in FILES if path not in SEVERAL_RANKS]
STEPPED = [(path, precision) for path in ONE_RANK for precision in PRECISIONS]


@pytest.mark.parametrize(
    ("path", "precision"), STEPPED, ids=[f"{path.stem}-{precision}" for path, precision in STEPPED]
)
def test_it_trains_like_the_generated_configuration(
    path: Path, precision: Precision, tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Sections of a file change memory and speed only, so the trajectory is that of the role without the file."""
    # Torch computes in fp16 on any CPU, if slowly; DeepSpeed would reject one without instructions for it.
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    role = role_of(path, str(tiny_lm), precision)
    with_file = losses(role, tmp_path)
    assert with_file[-1] < with_file[0] - 0.1
    without = losses(role.model_copy(update={"ds_config_path": None}), tmp_path)
    # CPUAdam adds in another order than torch's AdamW, which a 16-bit weight's rounding magnifies.
    assert with_file == pytest.approx(without, abs=0.02 if "offload" in path.stem else 1e-5)


def test_offloaded_optimizers_step_with_deepspeeds_own_adam():
    """Whether it can be compiled and takes AdamW's steps is tests/unit/distributed/deepspeed/test_cpu_adam.py's."""
    offloading = [path for path in FILES if "offload" in path.stem]
    assert len(offloading) >= 3
    for path in offloading:
        assert uses_cpu_adam(json.loads(path.read_text(encoding="utf-8")))


def test_the_file_for_zeropp_is_hpz_with_quantized_weights(tiny_lm: Path, tmp_path: Path):
    """On a CPU it is rejected for its kernels, before the model is loaded; all else of it is a file that runs."""
    hpz, zeropp = (json.loads(path.read_text(encoding="utf-8")) for path in SEVERAL_RANKS)
    assert zeropp["zero_optimization"].pop("zero_quantized_weights") is True
    assert zeropp == hpz
    file = tmp_path / "ds.json"
    zeropp["zero_optimization"] |= {"zero_quantized_weights": True, "zero_hpz_partition_size": 1}
    file.write_text(json.dumps(zeropp), encoding="utf-8")
    role = role_of(SEVERAL_RANKS[1], str(tiny_lm)).model_copy(update={"ds_config_path": file, "num_ranks": 1})
    with pytest.raises(ConfigError, match="whose kernels are CUDA's, and device is cpu"):
        losses(role, tmp_path)


def test_the_readme_names_every_file_and_key():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in FILES:
        assert f"`{path.name}`" in text
        config = json.loads(path.read_text(encoding="utf-8"))
        sections = config.pop("zero_optimization"), config
        for key in {*sections[0], *sections[1]} - {"stage"}:
            assert f"`{key}`" in text, f"{key} of {path.name} is not explained"
