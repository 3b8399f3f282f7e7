"""What an optimizer step is asked for, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_dist.core.batches import TokenBatch


@dataclass(frozen=True)
class TextShare:
    """One rank's share of the plain text that is mixed into a supervised step."""

    batch: TokenBatch
    micro_batches: list[list[int]]
    """Rows of `batch`, an idle micro-batch being empty."""
    num_targets: int
    """Targets of the step's text over all ranks."""
    coefficient: float
    """Weight of its mean loss."""


@dataclass(frozen=True)
class StepShare:
    """One rank's share of an optimizer step: micro-batches of row indices, an idle one being empty."""

    micro_batches: list[list[int]]
    num_tokens: int
    """Response tokens of the step over all ranks."""
    ptx_micro_batches: list[list[int]] = field(default_factory=list)
    num_ptx_targets: int = 0
    """PTX targets of the step over all ranks."""


NON_FINITE_LOSS, NON_FINITE_GRADIENT = "a loss is not finite", "the gradient is not finite"
"""Why a step is aborted whatever the algorithm."""
EARLY_STOP_KL = "the KL to the old policy is above ppo.early_stop_kl"
"""Why the rest of an update is skipped, on request."""


@dataclass
class StepReport:
    """What one optimizer step did on one rank."""

    sums: dict[str, dict[str, float]] = field(default_factory=dict)
    """Loss term → metric → sum over this rank's tokens or pairs."""
    grad_norm: float = 0.0
    """Global L2 norm before clipping (the same on every rank)."""
    learning_rate: float = 0.0
    term_grad_norms: dict[str, float] = field(default_factory=dict)
    """Loss term → global L2 norm of its own gradient, coefficient included; where it was measured."""
    aborted: str = ""
    """Why the step was not taken (the same on every rank); "" if it was."""
    suspects: list[tuple[str, int, int]] = field(default_factory=list)
    """(loss term, micro-batch, row in it) of this rank whose loss or gradient by itself is not finite; where no row's is, all
    that took part."""


@dataclass(frozen=True)
class UpdateReport:
    """What an update did, already averaged over ranks, tokens and optimizer steps."""

    metrics: dict[str, float] = field(default_factory=dict)
    num_steps: int = 0
    """Optimizer steps taken."""
