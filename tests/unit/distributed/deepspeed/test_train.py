"""An optimizer step under ZeRO against a plain torch loop."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path

import pytest
import torch
from support.tiny import hosted, token_batch, trained, whole_weights, worker_of
from transformers import AutoModelForCausalLM

from rlhf_dist.core.batches import TokenBatch
from rlhf_dist.core.errors import RunFolderError, SampleError
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.sft.roles import LanguageModelRole

LM = LanguageModelWorker
BATCHES = [token_batch([9, 4, 13, 6, 7], seed=step) for step in range(3)]
FACTORS = [0.5, 1.0, 0.5]
"""Warm-up over one of three steps, then linear."""


def targets_nll(model, batch: TokenBatch) -> list[torch.Tensor]:
    """−log p of every target, from one whole forward pass a row."""
    out = []
    for i, n in enumerate(batch.lengths.tolist()):
        log_p = torch.log_softmax(model(batch.tokens[i : i + 1, :n]).logits[0].float(), -1)
        out += [-log_p[t - 1, batch.tokens[i, t]] for t in range(n) if batch.loss_mask[i, t]]
    return out


def plain_adamw(model, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8)


@pytest.fixture(scope="module")
def plain(tiny_lm: Path):
    """Losses, gradient norms and final weights of three steps written down the plain way."""
    model = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32).train()
    optimizer = plain_adamw(model, 1e-3, 0.1)
    losses, norms = [], []
    for batch, factor in zip(BATCHES, FACTORS, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * factor
        nll = targets_nll(model, batch)
        loss = torch.stack(nll).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    assert max(norms) > 1.5  # clipping takes part
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("stage", "micro_batch_size", "checkpointing"),
    [(0, 1, False), (0, 5, True), (1, 2, False), (2, 1, False), (2, 3, False), (3, 2, True), (3, 5, False)],
)
def test_three_steps_equal_a_plain_torch_loop(tiny_lm: Path, plain, stage, micro_batch_size, checkpointing):
    losses, norms, expected = plain
    config = trained(tiny_lm, zero_stage=stage, gradient_checkpointing=checkpointing)
    with hosted(LM, config=config, num_steps=3) as group:
        role = LanguageModelRole(group, micro_batch_size)
        reports = [role.update(batch, step).result().metrics for step, batch in enumerate(BATCHES)]
        actual = whole_weights(group)
    assert [r["sft/loss"] for r in reports] == pytest.approx(losses, rel=1e-5)
    assert [r["train/grad_norm"] for r in reports] == pytest.approx(norms, rel=1e-4)
    assert [r["train/learning_rate"] for r in reports] == pytest.approx([1e-3 * factor for factor in FACTORS])
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        # Adam turns a gradient of 1e-9 into a full step, so a last bit of noise can move single weights.
        difference = (actual[name] - tensor).abs()
        assert difference.mean() < 1e-6, name
        assert difference.max() < 3e-4, name


def test_without_clipping_the_norm_is_reported_and_nothing_is_clipped(tiny_lm: Path, plain):
    with hosted(LM, config=trained(tiny_lm, optimizer={"max_grad_norm": 0.0}), num_steps=3) as group:
        report = LanguageModelRole(group, 5).update(BATCHES[0], 0).result()
        first = worker_of(group).engine.module.model.lm_head.weight.grad
    assert report.metrics["train/grad_norm"] == pytest.approx(plain[1][0], rel=1e-4)
    assert first is None or not first.any()  # gradients of a step do not leak into the next


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_evaluation_takes_no_step_and_equals_the_plain_loss(tiny_lm: Path, stage: int):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32)
    with torch.no_grad():
        nll = targets_nll(model, BATCHES[0])
    with hosted(LM, config=trained(tiny_lm, zero_stage=stage), num_steps=3) as group:
        before = whole_weights(group)
        sums = LanguageModelRole(group, 2).evaluate(BATCHES[0]).result()
        after = whole_weights(group)
    assert sums["num_targets"] == len(nll)
    assert sums["nll"] == pytest.approx(float(sum(nll)), rel=1e-5)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite_touches_no_weight(tiny_lm: Path, stage: int):
    with hosted(LM, config=trained(tiny_lm, zero_stage=stage), num_steps=3) as group:
        role, worker = LanguageModelRole(group, 2), worker_of(group)
        role.update(BATCHES[0], 0).result()
        before = whole_weights(group)
        healthy, calls = worker._nll, []

        def one_bad_micro_batch(batch):
            loss, sums = healthy(batch)
            calls.append(batch)
            return (loss * math.nan if len(calls) == 2 else loss), sums

        worker._nll = one_bad_micro_batch
        said = r"a loss is not finite in optimizer step 1 of the update \(lm: rows .*not taken"
        with pytest.raises(SampleError, match=said) as caught:
            role.update(BATCHES[1], 1).result()
        after = whole_weights(group)
        micro_batches = role.split(BATCHES[1].lengths)[0]
    # It did not happen again: all of the micro-batch are named.
    assert caught.value.rows == {"lm": sorted(micro_batches[1])}
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_a_loaded_checkpoint_continues_bit_for_bit(tiny_lm: Path, tmp_path: Path, stage: int, precision: str):
    config = trained(tiny_lm, zero_stage=stage, precision=precision)
    with hosted(LM, config=config, num_steps=3) as group:
        role = LanguageModelRole(group, 2)
        for step in range(2):
            role.update(BATCHES[step], step).result()
        role.save_checkpoint(tmp_path / "model").result()
        last = role.update(BATCHES[2], 2).result()
        expected = whole_weights(group)
    with hosted(LM, config=config, num_steps=3) as group:
        role = LanguageModelRole(group, 2)
        role.load_checkpoint(tmp_path / "model").result()
        again = role.update(BATCHES[2], 2).result()
        actual = whole_weights(group)
    assert again == last
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_that_is_not_there_is_rejected(tiny_lm: Path, tmp_path: Path, stage: int):
    with hosted(LM, config=trained(tiny_lm, zero_stage=stage), num_steps=3) as group:
        role = LanguageModelRole(group, 2)
        with pytest.raises(RunFolderError, match="no checkpoint of this layout"):
            role.load_checkpoint(tmp_path / "none").result()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bf16_learns_with_small_steps(tiny_lm: Path, stage: int):
    # Steps of 1e-4 are below bf16's resolution of most weights: without fp32 master weights they would be lost.
    optimizer = {"learning_rate": 1e-4, "schedule": "constant", "warmup_fraction": 0.0, "weight_decay": 0.0}
    config = trained(tiny_lm, zero_stage=stage, precision="bf16", optimizer=optimizer)
    with hosted(LM, config=config, num_steps=20) as group:
        role = LanguageModelRole(group, 5)
        losses = [role.update(BATCHES[0], step).result().metrics["sft/loss"] for step in range(12)]
        assert {p.dtype for p in worker_of(group).model.parameters()} == {torch.bfloat16}
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_buckets_go_with_the_engine(tiny_lm: Path, stage):
    """A second run in the same process must find the memory of the first."""
    with hosted(LM, config=trained(tiny_lm, zero_stage=stage), num_steps=1) as group:
        LanguageModelRole(group, 2).update(BATCHES[0], 0).result()
        buckets = worker_of(group).engine._engine.optimizer.ipg_buckets
        held = [weakref.ref(bucket) for bucket in buckets.values()]
    del group, buckets
    gc.collect()
    assert held
    assert not any(bucket() for bucket in held)
