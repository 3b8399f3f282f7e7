"""One optimiser step under ZeRO, normalised by global counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

from rlhf_dist.algo.losses import Sums
from rlhf_dist.batches import StepReport
from rlhf_dist.config import TrainedModel
from rlhf_dist.engine import distributed, zero
from rlhf_dist.engine.schedule import learning_rate_factor
from rlhf_dist.errors import RunFolderError, TrainingError

CHECKPOINT_TAG = "state"


@dataclass(frozen=True)
class LossTerm:
    """A part of the objective of one optimiser step: coefficient · Σ loss / count."""

    name: str
    micro_batches: Sequence[Any]
    """This rank's micro-batches. Every rank has the same number of them; an idle one is None."""
    loss_sum: Callable[[Any], tuple[Tensor, Sums]]
    """Micro-batch → (sum of losses over its tokens or pairs, sums for metrics)."""
    idle_batch: Any
    """What an idle micro-batch runs forward and backward on, at weight 0, so that ZeRO-3's collectives stay aligned."""
    global_count: int
    """Tokens or pairs in this optimiser step over all ranks."""
    coefficient: float = 1.0


class TrainEngine:
    """A module under DeepSpeed ZeRO.

    DeepSpeed averages gradients over ranks. A loss that is a *sum* over this rank's share, scaled by
    world_size / global_count, therefore ends as the mean over the whole step, whatever the split:

        (1/W) Σ_ranks  W/N · Σ_i ℓ_i  =  1/N Σ ℓ
    """

    def __init__(
        self, module: nn.Module, config: TrainedModel, context: distributed.RankContext, num_steps: int
    ) -> None:
        self.device = torch.device(context.device)
        self.world_size = context.world_size
        self.config = config
        if config.gradient_checkpointing:
            module.model.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore
        decay = [p for p in module.parameters() if _num_dims(p) > 1]
        no_decay = [p for p in module.parameters() if _num_dims(p) <= 1]
        settings = config.optimizer
        groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=settings.learning_rate, betas=settings.betas, eps=settings.eps
        )
        scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, num_steps, settings)
        )
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=train_ds_config(config),
            dist_init_required=False,
        )
        self._engine: Any = engine
        _undo_trial_step(engine.optimizer)

    @property
    def module(self) -> nn.Module:
        """The wrapped module (its parameters may be sharded)."""
        return self._engine.module

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def step(self, terms: Sequence[LossTerm]) -> StepReport:
        """Accumulate all terms' micro-batches and take one optimiser step.

        Raises:
            TrainingError: a loss is not finite on some rank; no weight is touched.
        """
        report = StepReport(learning_rate=self._engine.get_lr()[0])
        work = [(term, batch) for term in terms for batch in term.micro_batches]
        self._engine.train()
        finite = True
        for i, (term, batch) in enumerate(work):
            self._engine.set_gradient_accumulation_boundary(i == len(work) - 1)
            idle = batch is None
            loss, sums = term.loss_sum((term.idle_batch if idle else batch).to(self.device))
            scale = 0.0 if idle else term.coefficient * self.world_size / term.global_count
            finite = finite and bool(torch.isfinite(loss.detach()))
            self._engine.backward(loss * scale)
            if not idle:
                totals = report.sums.setdefault(term.name, {})
                for key, value in sums.items():
                    totals[key] = totals.get(key, 0.0) + float(value)
        self._refuse_non_finite(not finite, terms)
        # Without ZeRO and in fp32, DeepSpeed clips by the norm but does not keep it; the gradients are whole here.
        plain_norm = (
            _grad_norm(self.module) if self.config.zero_stage == 0 and self.config.precision == "fp32" else None
        )
        self._engine.step()
        report.grad_norm = float(self._engine.get_global_grad_norm() if plain_norm is None else plain_norm)
        if not math.isfinite(report.grad_norm):
            raise TrainingError(
                f"the gradient norm is {report.grad_norm}; weights of this step are not to be used. Resume from the last "
                "checkpoint with a lower learning rate, or in fp32."
            )
        return report

    def _refuse_non_finite(self, mine: bool, terms: Sequence[LossTerm]) -> None:
        if distributed.any_rank(mine, self.device):
            self._engine.zero_grad()
            names = ", ".join(term.name for term in terms)
            raise TrainingError(
                f"a loss ({names}) is not finite; the step was not taken and no weight was touched. Look at the samples of "
                "this step, lower the learning rate, or use fp32."
            )

    @torch.no_grad()
    def infer(self, *args: Any) -> Any:
        """Forward pass in evaluation mode without gradients."""
        self._engine.eval()
        return self._engine(*args)

    def save_checkpoint(self, path: Path) -> None:
        """Every rank writes its shard of parameters, optimiser and schedule under `path`."""
        self._engine.save_checkpoint(str(path), tag=CHECKPOINT_TAG, save_latest=False)

    def load_checkpoint(self, path: Path) -> None:
        """Restore what `save_checkpoint` wrote under the same ZeRO stage and number of ranks.

        Raises:
            RunFolderError: there is nothing to load.
        """
        # DeepSpeed only asserts that there is something to load.
        found = (path / CHECKPOINT_TAG).is_dir()
        if not found or self._engine.load_checkpoint(str(path), tag=CHECKPOINT_TAG)[0] is None:
            raise RunFolderError(f"no checkpoint of this layout in {path}; remove that step's folder or use resume: no")


def train_ds_config(config: TrainedModel) -> dict[str, Any]:
    """The DeepSpeed configuration of a trained model."""
    return zero.ds_config(
        zero_stage=config.zero_stage,
        precision=config.precision,
        max_grad_norm=config.optimizer.max_grad_norm,
        path=config.ds_config_path,
    )


def _undo_trial_step(optimizer: Any) -> None:
    """Without ZeRO and in bf16, DeepSpeed allocates optimiser state by a step on zero gradients, which counts as Adam's
    first and decays the master weights once. Take both back."""
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.optimizer.state.clear()
        with torch.no_grad():
            for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
                for master, parameter in zip(masters, parameters, strict=True):
                    master.copy_(parameter)


def _grad_norm(module: nn.Module) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def _num_dims(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))
