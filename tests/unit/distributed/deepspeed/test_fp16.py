"""fp16 with fp32 master weights: an overflow is computed again at a smaller scale, and no step is skipped."""

from __future__ import annotations

import json
import os
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from support.aborting import MICRO, lm_term, steps_around_rejections
from support.ranks import run_ranks
from support.tiny import hosted, token_batch, trained, whole_weights, worker_of

from rlhf_dist.config.hosting import FrozenModel
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.distributed.deepspeed import loss_scale, zero
from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.deepspeed.zero import FIRST_LOSS_SCALE
from rlhf_dist.distributed.role_groups import ReferenceRole
from rlhf_dist.distributed.workers.inference import pick
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.distributed.workers.reference import ReferenceWorker
from rlhf_dist.sft.roles import LanguageModelRole

LM = LanguageModelWorker
BATCHES = [token_batch([9, 4, 13, 6, 7], seed=step) for step in range(4)]
STAGES = [0, 1, 2, 3]


@pytest.fixture(autouse=True)
def fp16_on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes in fp16 on any CPU, if slowly; DeepSpeed would reject one without instructions for it."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


def config(model: Path, stage: int, precision: str = "fp16", **optimizer):
    # 1e-8 would turn gradients that are 0 but for rounding into steps of full length.
    return trained(model, zero_stage=stage, precision=precision, optimizer={"eps": 1e-5} | optimizer)


def four_steps(model: Path, stage: int, precision: str, first_scale: float | None = None):
    """(metrics, weights, scales) of four steps."""
    with hosted(LM, config=config(model, stage, precision), num_steps=4) as group:
        role, engine = LanguageModelRole(group, 2), worker_of(group).engine
        if first_scale is not None:
            engine._scale.set(first_scale)
        metrics, scales = [], []
        for step, batch in enumerate(BATCHES):
            metrics.append(role.update(batch, step).result().metrics)
            scales.append(engine._scale.value)
        return metrics, whole_weights(group), scales


@pytest.mark.parametrize("stage", STAGES)
def test_it_takes_the_steps_of_fp32(tiny_lm: Path, stage: int):
    expected, whole, _ = four_steps(tiny_lm, stage, "fp32")
    metrics, weights, scales = four_steps(tiny_lm, stage, "fp16")
    assert {t.dtype for t in weights.values()} == {torch.float16}
    assert scales == [FIRST_LOSS_SCALE] * 4
    for key in ("sft/loss", "train/grad_norm", "train/learning_rate"):
        assert [m[key] for m in metrics] == pytest.approx([m[key] for m in expected], rel=2e-3)
    for name, tensor in whole.items():
        # A norm's weight of 1 has a last bit of 1e-3; a matrix's are small, and a step that was skipped would show.
        assert (weights[name].float() - tensor).abs().mean() < (4e-4 if tensor.dim() == 1 else 1e-4), name


@pytest.mark.parametrize("stage", STAGES)
def test_the_scale_leaves_no_trace_in_the_result(tiny_lm: Path, stage: int):
    """From 2^40 each first attempt overflows, and the scale is halved until none does."""
    expected, weights, _ = four_steps(tiny_lm, stage, "fp16")
    for first in (2.0**40, 2.0**12):
        metrics, others, scales = four_steps(tiny_lm, stage, "fp16", first)
        assert scales[-1] < 2.0**20 if first > 2.0**20 else scales == [first] * 4
        # The norm alone is a sum of squares that are scaled: on some CPUs its last bits in fp32 depend on the scale.
        norms = [[m.pop("train/grad_norm") for m in found] for found in (metrics, deepcopy(expected))]
        assert norms[0] == pytest.approx(norms[1], rel=1e-7)
        assert metrics == [{k: v for k, v in m.items() if k != "train/grad_norm"} for m in expected]
        assert all(torch.equal(others[name], tensor) for name, tensor in weights.items())


@pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "c++")) and shutil.which("ninja")),
    reason="no C++ compiler or no ninja: DeepSpeed's CPUAdam cannot be compiled",
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_overflows_with_the_optimizer_in_cpu_memory(tiny_lm: Path, tmp_path: Path, stage: int):
    """DeepSpeed keeps account of overflows of its own there, which must not outlive the attempt."""
    file = tmp_path / "ds.json"
    section = {"stage": stage, "overlap_comm": False, "offload_optimizer": {"device": "cpu"}}
    file.write_text(json.dumps({"zero_optimization": section, "fp16": {"enabled": True}}), encoding="utf-8")
    results = []
    for first in (FIRST_LOSS_SCALE, 2.0**40):
        role_config = config(tiny_lm, stage).model_copy(update={"ds_config_path": file})
        with hosted(LM, config=role_config, num_steps=4) as group:
            role = LanguageModelRole(group, 2)
            worker_of(group).engine._scale.set(first)
            metrics = [role.update(batch, step).result().metrics for step, batch in enumerate(BATCHES)]
            results.append((metrics, whole_weights(group)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(t, results[0][1][name]) for name, t in results[1][1].items())


@pytest.mark.parametrize("stage", STAGES)
def test_an_aborted_step_leaves_no_trace(tiny_lm: Path, stage: int):
    """Nor is a sample named that only overflows at a large scale."""
    results = []
    for reject in (False, True):
        with hosted(LM, config=config(tiny_lm, stage), num_steps=4) as group:
            weights, last = steps_around_rejections(group, BATCHES, reject)
            results.append((weights, last.grad_norm, worker_of(group).engine._scale.state()))
    assert results[0][1:] == results[1][1:]
    assert all(torch.equal(t, results[0][0][name]) for name, t in results[1][0].items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_continues_bit_for_bit_with_its_scale(
    tiny_lm: Path, tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    results = []
    for resumed in (False, True):
        with hosted(LM, config=config(tiny_lm, stage), num_steps=4) as group:
            role, engine = LanguageModelRole(group, 2), worker_of(group).engine
            engine._scale.set(2.0**12)
            if resumed:
                role.load_checkpoint(tmp_path / "model").result()
            else:
                for step in range(2):
                    role.update(BATCHES[step], step).result()
                role.save_checkpoint(tmp_path / "model").result()
            metrics = [role.update(BATCHES[step], step).result().metrics for step in (2, 3)]
            results.append((whole_weights(group), metrics, engine._scale.state()))
    assert results[0][1:] == results[1][1:]
    assert results[0][2] == {"loss_scale": 2.0**13, "clean_steps": 1}  # it grew with the third step
    assert all(torch.equal(t, results[0][0][name]) for name, t in results[1][0].items())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_attempts_at_a_step_draw_the_same_dropout(tiny_lm: Path, tmp_path: Path, stage: int):
    folder = tmp_path / "lm"
    shutil.copytree(tiny_lm, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_dropout": 0.5}), encoding="utf-8")
    assert four_steps(folder, stage, "fp16")[0] == four_steps(folder, stage, "fp16", 2.0**20)[0]
    assert four_steps(folder, stage, "fp16")[0] != four_steps(tiny_lm, stage, "fp16")[0]  # there is dropout


def test_measuring_a_terms_gradient_survives_an_overflow(tiny_lm: Path):
    with hosted(LM, config=config(tiny_lm, 2), num_steps=4) as group:
        worker = worker_of(group)
        worker.engine._scale.set(2.0**30)
        report = worker.engine.step([lm_term(worker, BATCHES[0])], measure_terms=True)
    assert report.term_grad_norms["lm"] == pytest.approx(report.grad_norm, rel=1e-6)


def test_gradients_that_would_vanish_do_not(tiny_lm: Path):
    """A loss 1e-7 times as large: without a scale most gradients are below fp16's smallest number."""
    shares = {}
    for scale in (1.0, FIRST_LOSS_SCALE):
        with hosted(LM, config=config(tiny_lm, 2), num_steps=4) as group:
            worker = worker_of(group)
            worker.engine._scale.set(scale)
            shares[scale] = worker.engine.step([lm_term(worker, BATCHES[0])]).grad_norm
            small = worker.nll_term("lm", pick(BATCHES[1], MICRO), BATCHES[1].num_targets, coefficient=1e-7)
            shares[scale] = worker.engine.step([small]).grad_norm * 1e7
    assert shares[FIRST_LOSS_SCALE] == pytest.approx(6.86, rel=0.02)
    assert shares[1.0] < 0.9 * shares[FIRST_LOSS_SCALE]


@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_models(tiny_lm: Path, stage: int):
    sums = []
    for precision in ("fp32", "fp16"):
        frozen = FrozenModel(model_path=str(tiny_lm), precision=precision, zero_stage=stage)  # pyright: ignore
        with hosted(ReferenceWorker, config=frozen) as group:
            sums.append(ReferenceRole(group, 2).evaluate(BATCHES[0]).result()["nll"])
    assert sums[1] == pytest.approx(sums[0], rel=1e-3)
    assert sums[1] != sums[0]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_processor_without_it_is_rejected_before_the_model_loads(
    tiny_lm: Path, stage: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    monkeypatch.setattr(
        "rlhf_dist.distributed.workers.trained.load_causal_lm", lambda *_: pytest.fail("the model was loaded")
    )
    with pytest.raises(ConfigError, match=r"fp16, which DeepSpeed does not run on this cpu .* use bf16 or fp32"):  # noqa: SIM117
        with hosted(LM, config=config(tiny_lm, stage), num_steps=4):
            pass


def train_on_two_ranks(context: RankContext, model: Path) -> dict[int, list]:
    """Stage → (gradient norms, weights, scale) of four steps from a fitting scale, and from one that overflows."""
    get_accelerator().is_fp16_supported = lambda: True  # this process is the test's own
    results: dict[int, list] = {}
    for stage in STAGES:
        for first in (FIRST_LOSS_SCALE, 2.0**40):
            settings = config(model, stage).model_copy(update={"num_ranks": 2})
            worker = LanguageModelWorker(settings, context, num_steps=4)
            worker.engine._scale.set(first)
            # The last row alone: rank 1 idles in its second micro-batch.
            mine = [[0, 1], [4]] if context.rank == 0 else [[2, 3], []]
            norms = [worker.update(batch, mine, batch.num_targets, i).grad_norm for i, batch in enumerate(BATCHES)]
            weights = {k: t.clone() for part in zero.whole_parameters(worker.model, 1) for k, t in part.items()}
            results.setdefault(stage, []).append((norms, weights, worker.engine._scale.value))
    return results


@pytest.mark.slow
def test_two_ranks_scale_alike(tiny_lm: Path, tmp_path: Path):
    results = run_ranks(2, train_on_two_ranks, tmp_path, tiny_lm)
    for stage in STAGES:
        expected = [m["train/grad_norm"] for m in four_steps(tiny_lm, stage, "fp32")[0]]
        (norms, weights, scale), (others, same, lowered) = results[0][stage]
        assert norms == pytest.approx(expected, rel=2e-3)
        assert others == norms
        assert 2.0**12 <= scale <= FIRST_LOSS_SCALE  # losses are multiplied by the number of ranks, and overflow sooner
        assert scale <= lowered < 2.0**20
        for mine, theirs in zip(results[0][stage], results[1][stage], strict=True):
            assert (mine[0], mine[2]) == (theirs[0], theirs[2])
            assert all(torch.equal(theirs[1][name], tensor) for name, tensor in mine[1].items())
        assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())
