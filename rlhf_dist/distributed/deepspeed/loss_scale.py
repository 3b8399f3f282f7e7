"""fp16 gradients are scaled while they are computed, so that small ones do not vanish. DeepSpeed applies the scale and takes it
off again; which scale, and what follows from an overflow, is decided here."""

from __future__ import annotations

from typing import Any

GROWTH_STEPS = 1000
"""Optimizer steps without an overflow after which the scale is doubled."""
LARGEST_SCALE = 2.0**24


class LossScale:
    """The scale of a trained model's losses: 1 unless it computes in fp16.

    A power of two, hence without influence on a gradient that neither overflows nor vanishes. A step whose gradient overflows
    is run again with half of it: no step is skipped, as DeepSpeed's own dynamic scaling would. At 1 an overflow is the
    gradient's own, and the step is aborted.
    """

    def __init__(self, optimizer: Any, first: float | None) -> None:
        """`first`: the scale to start from; None for a model that does not compute in fp16."""
        self._optimizer = optimizer
        self.in_use = first is not None
        self.value = 1.0
        self.clean_steps = 0
        """Optimizer steps since the scale was changed."""
        if first is not None:
            self.set(first)

    def set(self, value: float) -> None:
        """Scale by `value` from the next backward pass on."""
        self.value = value
        if self.in_use:
            self._optimizer.loss_scale = value

    @property
    def by_hand(self) -> float:
        """What a loss is to be multiplied by before it is given to DeepSpeed, which scales it itself under ZeRO only."""
        from deepspeed.runtime.base_optimizer import ZeROOptimizer  # the driver imports workers, and never DeepSpeed

        return 1.0 if isinstance(self._optimizer, ZeROOptimizer) else self.value

    def halve(self) -> bool:
        """Halve it, if it is above 1; whether it was."""
        if self.value <= 1:
            return False
        self.set(self.value / 2)
        self.clean_steps = 0
        return True

    def step_taken(self) -> None:
        """Count a step; the scale grows again when many were taken."""
        self.clean_steps += 1
        if self.in_use and self.clean_steps >= GROWTH_STEPS and self.value < LARGEST_SCALE:
            self.set(self.value * 2)
            self.clean_steps = 0

    def state(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"loss_scale": self.value, "clean_steps": self.clean_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        if self.in_use:
            self.set(float(state["loss_scale"]))
            self.clean_steps = int(state["clean_steps"])
