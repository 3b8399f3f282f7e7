"""The SFT loss against real optimizer steps of TRL 1.16.0's `SFTTrainer`, prompts ignored, rows padded, two micro-batches."""

from __future__ import annotations

import pytest
import torch
from golden_data import load, tensors
from torch.testing import assert_close

from rlhf_dist.core.logprobs import taken_logprobs
from rlhf_dist.core.losses import nll_loss

STEPS = [[tensors(m) for m in step["micro_batches"]] for step in load("trl_sft.json")["steps"]]
MICRO_BATCHES = [m for step in STEPS for m in step]
IGNORED = -100


def targets_of(micro_batch):
    """(log-probs [N], entropies [N], where they are [b, T − 1]): the logits at t − 1 predict the label at t."""
    labels = micro_batch["labels"][:, 1:]
    kept = labels != IGNORED
    logprobs, entropies = taken_logprobs(micro_batch["logits"][:, :-1][kept], labels[kept])
    assert entropies is not None
    return logprobs, entropies, kept


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_logprobs_and_entropy_of_targets(micro_batch):
    logprobs, entropies, kept = targets_of(micro_batch)
    theirs = micro_batch["logprobs"]
    assert torch.all(theirs[~kept] == 0)
    assert_close(logprobs, theirs[kept], rtol=1e-5, atol=2e-6)
    assert float(entropies.mean()) == pytest.approx(micro_batch["entropy"], rel=1e-5)


@pytest.mark.parametrize("step", STEPS)
def test_the_loss_is_a_sum_over_the_count_of_the_whole_optimizer_step(step):
    """TRL divides each micro-batch by the count of all of them: the same normalization as the engine's."""
    num_targets = sum(int(targets_of(m)[2].sum()) for m in step)
    assert len({int(targets_of(m)[2].sum()) for m in step}) > 1, "micro-batches with as many targets would not tell"
    for m in step:
        assert int(m["num_items"]) == num_targets
        loss, _ = nll_loss(targets_of(m)[0])
        assert float(loss) / num_targets == pytest.approx(m["loss"], rel=1e-5)


def test_ignored_labels_and_padding_were_recorded():
    for m in MICRO_BATCHES:
        padding = m["attention_mask"] == 0
        assert padding.any()
        assert torch.all(m["labels"][padding] == IGNORED)
        assert (m["labels"][~padding] == IGNORED).any()
