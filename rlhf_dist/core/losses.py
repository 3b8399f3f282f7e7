"""Losses are *sums* over the tokens they are given; what every room shares of them.

`distributed/deepspeed/` alone divides, by the count over the whole optimizer step on all ranks, so that no loss depends on
how a batch is split. Each loss function also returns the sums that metrics are made of.
"""

from __future__ import annotations

from torch import Tensor

Sums = dict[str, Tensor]


def nll_loss(logprobs: Tensor) -> tuple[Tensor, Sums]:
    """−Σ log p(target) (SFT, pretraining, PTX).

    Args:
        logprobs: [N] log-probs of the target tokens.
    """
    loss = -logprobs.sum()
    return loss, {"loss": loss.detach()}
