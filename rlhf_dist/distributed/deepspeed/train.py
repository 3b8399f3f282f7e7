"""One optimizer step under ZeRO, normalized by global counts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.config.hosting import TrainedModel
from rlhf_dist.core.errors import RunFolderError, TrainingError
from rlhf_dist.core.losses import Sums
from rlhf_dist.core.offload import Level, Offloadable
from rlhf_dist.core.steps import NON_FINITE_GRADIENT, NON_FINITE_LOSS, StepReport
from rlhf_dist.distributed.deepspeed import gradients, zero
from rlhf_dist.distributed.deepspeed import process_group as distributed
from rlhf_dist.distributed.deepspeed.average import WeightAverage
from rlhf_dist.distributed.deepspeed.held_tensors import all_tensors, weight_tensors
from rlhf_dist.distributed.deepspeed.loss_scale import LossScale
from rlhf_dist.distributed.deepspeed.optimizer import compile_ops, make_optimizer
from rlhf_dist.distributed.deepspeed.schedule import learning_rate_factor

CHECKPOINT_TAG = "state"
Suspect = tuple[str, int, int]
"""(loss term, micro-batch, row in it)."""
Veto = Callable[[dict[str, dict[str, float]]], str]
"""Loss term → metric → mean over an optimizer step; returns why the step must not be taken, or ""."""


@dataclass(frozen=True)
class LossTerm:
    """A part of the objective of one optimizer step: coefficient · Σ loss / count."""

    name: str
    micro_batches: Sequence[Any]
    """This rank's micro-batches. Every rank has the same number of them; an idle one is None."""
    loss_sum: Callable[[Any], tuple[Tensor, Sums]]
    """Micro-batch → (sum of losses over its tokens or pairs, sums for metrics)."""
    idle_batch: Any
    """What an idle micro-batch runs forward and backward on, at weight 0, so that ZeRO-3's collectives stay aligned."""
    global_count: int
    """Tokens or pairs in this optimizer step over all ranks."""
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
        ds_config = train_ds_config(config, context.world_size)
        settings = config.optimizer
        optimizer = make_optimizer(module, settings, ds_config)
        scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, num_steps, settings)
        )
        import deepspeed  # here: the driver imports workers, and never DeepSpeed

        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=ds_config,
            dist_init_required=False,
        )
        self._engine: Any = zero.owned_by(self, engine)
        _undo_trial_step(engine.optimizer)
        self._scale = LossScale(engine.optimizer, ds_config["fp16"]["loss_scale"] if "fp16" in ds_config else None)
        self._metric_names: dict[str, set[str]] = {}
        """Loss term → the sums it reports."""
        self.average: WeightAverage | None = None
        """The moving average of the weights, where one is kept."""
        self._memory = Offloadable(self.device)

    def hold(self, level: Level) -> None:
        """Hold what `level` says on the GPU, the rest in host memory. `weights` are enough for `infer` and for reading
        parameters, `full` is needed for everything else."""
        self._memory.hold(level, lambda: weight_tensors(self.module), self._all_tensors)

    def _all_tensors(self) -> Iterator[Tensor]:
        return all_tensors(self.module, self._engine.optimizer, self.average.shards if self.average else {})

    def keep_average(self, decay: float) -> None:
        """Keep an exponential moving average of the weights from now on."""
        self.average = WeightAverage(self.module.model, decay, self.device)  # pyright: ignore[reportArgumentType]

    @property
    def module(self) -> nn.Module:
        """The wrapped module (its parameters may be sharded)."""
        return self._engine.module

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def step(self, terms: Sequence[LossTerm], *, veto: Veto | None = None, measure_terms: bool = False) -> StepReport:
        """Accumulate all terms' micro-batches and take one optimizer step, unless something speaks against it.

        A step is aborted, and then touches no weight and no optimizer state, where a loss or the gradient is not finite on
        some rank, or where `veto` says so. The report says why; every rank decides the same. In fp16 a gradient that overflows
        is first computed again with smaller scales (`loss_scale.py`).

        Args:
            veto: (loss term → metric → mean over the step of all ranks) → why the step must not be taken, or "".
            measure_terms: measure the gradient norm of each term by itself first, at the cost of one more forward and
                backward pass of them all.
        """
        scale_before = self._scale.state()
        norms = {term.name: self._norm_at_any_scale(term) for term in terms} if measure_terms else {}
        report, bad_losses, bad_loss = self._attempt(terms, norms)
        while not bad_loss and not math.isfinite(report.grad_norm) and self._scale.halve():
            gradients.drop_gradients(self._engine)
            report, bad_losses, bad_loss = self._attempt(terms, norms)
        if bad_loss or not math.isfinite(report.grad_norm):
            gradients.drop_gradients(self._engine)
            self._scale.set(1.0)
            report.suspects = self._find_suspects(terms)
            if not distributed.any_rank(bool(report.suspects), self.device):
                # It does not happen again, or in no sample by itself: then all that took part.
                report.suspects = bad_losses if bad_loss else _rows_of(terms)
            return self._aborted(report, NON_FINITE_LOSS if bad_loss else NON_FINITE_GRADIENT, scale_before)
        reason = veto(self._means(terms, report)) if veto is not None else ""
        if reason:
            return self._aborted(report, reason, scale_before)
        skipped = self._engine.skipped_steps
        self._engine.step()
        if self._engine.skipped_steps != skipped:
            raise TrainingError(
                "DeepSpeed skipped an optimizer step whose gradient is finite: a defect, please report it"
            )
        self._scale.step_taken()
        if self.average is not None:
            self.average.update()
        return report

    def skip_steps(self, num_steps: int) -> None:
        """Move the schedule on over optimizer steps that are not taken: the learning rate belongs to the place in the run."""
        for _ in range(num_steps):
            self._engine.lr_scheduler.step()

    def _attempt(self, terms: Sequence[LossTerm], norms: dict[str, float]) -> tuple[StepReport, list[Suspect], bool]:
        """The step's gradient at the present scale: (report, this rank's bad losses, whether any rank has some). All attempts
        at one step draw the same dropout."""
        report = StepReport(learning_rate=self._engine.get_lr()[0], term_grad_norms=norms)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices, enabled=self._scale.in_use):
            bad_losses = self._accumulate(terms, report)
        report.grad_norm = gradients.global_grad_norm(self._engine, self.device) / self._scale.value
        return report, bad_losses, distributed.any_rank(bool(bad_losses), self.device)

    def _accumulate(self, terms: Sequence[LossTerm], report: StepReport) -> list[Suspect]:
        """Forward and backward of all micro-batches, with their sums into the report; the rows of this rank's micro-batches
        whose loss is not finite."""
        work = [(term, i, batch) for term in terms for i, batch in enumerate(term.micro_batches)]
        bad: list[Suspect] = []
        self._engine.train()
        for number, (term, i, batch) in enumerate(work):
            self._engine.set_gradient_accumulation_boundary(number == len(work) - 1)
            idle = batch is None
            loss, sums = term.loss_sum((term.idle_batch if idle else batch).to(self.device))
            scale = 0.0 if idle else term.coefficient * self.world_size / term.global_count
            self._engine.backward(loss * (scale * self._scale.by_hand))
            self._metric_names[term.name] = set(sums)
            if not idle:
                if not torch.isfinite(loss.detach()):
                    bad += [(term.name, i, row) for row in range(len(batch))]
                totals = report.sums.setdefault(term.name, {})
                for key, value in sums.items():
                    totals[key] = totals.get(key, 0.0) + float(value)
        return bad

    def _norm_of(self, terms: Sequence[LossTerm]) -> float:
        """Norm of the gradient of these terms alone, NaN where a loss is not finite; leaves no gradient behind."""
        bad_losses = self._accumulate(terms, StepReport())
        norm = gradients.global_grad_norm(self._engine, self.device) / self._scale.value
        gradients.drop_gradients(self._engine)
        return math.nan if distributed.any_rank(bool(bad_losses), self.device) else norm

    def _norm_at_any_scale(self, term: LossTerm) -> float:
        """`_norm_of` the term, at the first scale from here at which it does not overflow."""
        norm = self._norm_of([term])
        while not math.isfinite(norm) and self._scale.halve():
            norm = self._norm_of([term])
        return norm

    def _find_suspects(self, terms: Sequence[LossTerm]) -> list[Suspect]:
        """Rows of this rank whose loss or gradient by itself is not finite.

        Every rank's micro-batches in turn, then the rows of the bad ones, each while the other ranks are idle: a gradient is
        the sum over all. A run that stops has time for that.
        """
        found = []
        for term in terms:
            for rank in range(self.world_size):
                mine = rank == distributed.my_rank()
                for i in range(len(term.micro_batches)):
                    batch = term.micro_batches[i] if mine else None
                    num_rows = distributed.largest(len(batch) if batch is not None else 0, self.device)
                    if not num_rows or math.isfinite(self._norm_of([replace(term, micro_batches=[batch])])):
                        continue
                    for row in range(num_rows):
                        one = batch.rows([row]) if batch is not None else None
                        if not math.isfinite(self._norm_of([replace(term, micro_batches=[one])])) and mine:
                            found.append((term.name, i, row))
        return found

    def _means(self, terms: Sequence[LossTerm], report: StepReport) -> dict[str, dict[str, float]]:
        """The report's sums over all ranks, divided by their counts."""
        # A rank that was idle throughout has no sums, but every rank knows which there are: from the idle batch's.
        keys = [(term, key) for term in terms for key in sorted(self._metric_names[term.name])]
        values = [report.sums.get(term.name, {}).get(key, 0.0) for term, key in keys]
        totals = distributed.summed(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()
        means: dict[str, dict[str, float]] = {}
        for (term, key), total in zip(keys, totals, strict=True):
            means.setdefault(term.name, {})[key] = total / term.global_count
        return means

    def _aborted(self, report: StepReport, reason: str, scale_before: dict[str, float]) -> StepReport:
        gradients.drop_gradients(self._engine)
        self._scale.load_state(scale_before)
        report.aborted = reason
        return report

    @torch.no_grad()
    def infer(self, *args: Any) -> Any:
        """Forward pass in evaluation mode without gradients."""
        self._engine.eval()
        return self._engine(*args)

    def _follow_schedule(self) -> None:
        """Set the learning rate to that of this run's schedule: a run may be longer than the one that wrote the checkpoint."""
        scheduler = self._engine.lr_scheduler
        for group, base, factor in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(scheduler.last_epoch)

    def save_checkpoint(self, path: Path) -> None:
        """Every rank writes its shard of parameters, optimizer and schedule under `path`."""
        self._engine.save_checkpoint(str(path), tag=CHECKPOINT_TAG, client_state=self._scale.state(), save_latest=False)
        if self.average is not None:
            self.average.save_checkpoint(path)

    def load_checkpoint(self, path: Path) -> None:
        """Restore what `save_checkpoint` wrote under the same ZeRO stage and number of ranks.

        Raises:
            RunFolderError: there is nothing to load.
        """
        # DeepSpeed only asserts that there is something to load.
        found = (path / CHECKPOINT_TAG).is_dir()
        loaded, state = self._engine.load_checkpoint(str(path), tag=CHECKPOINT_TAG) if found else (None, {})
        if loaded is None:
            raise RunFolderError(f"no checkpoint of this layout in {path}; remove that step's folder or use resume: no")
        self._scale.load_state(state)
        self._follow_schedule()
        if self.average is not None:
            self.average.load_checkpoint(path)


@contextlib.contextmanager
def train_init(config: TrainedModel, context: distributed.RankContext) -> Iterator[None]:
    """Inside, a trained model is loaded as its engine will hold it; native code that it needs is compiled before.

    Raises:
        ConfigError: the DeepSpeed file contradicts the role, or asks for native code that this machine cannot compile, or the
            precision for instructions that it does not have.
    """
    ds_config = train_ds_config(config, context.world_size)
    zero.check_precision(config.precision, context.device)
    compile_ops(ds_config, context.device)
    with zero.sharded_init(ds_config):
        yield


def train_ds_config(config: TrainedModel, num_ranks: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a trained model on `num_ranks` ranks."""
    return zero.ds_config(
        zero_stage=config.zero_stage,
        precision=config.precision,
        max_grad_norm=config.optimizer.max_grad_norm,
        path=config.ds_config_path,
        num_ranks=num_ranks,
    )


def _undo_trial_step(optimizer: Any) -> None:
    """Without ZeRO and in bf16, DeepSpeed allocates optimizer state by a step on zero gradients, which counts as Adam's
    first and decays the master weights once. Take both back."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.optimizer.state.clear()
        with torch.no_grad():
            for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
                for master, parameter in zip(masters, parameters, strict=True):
                    master.copy_(parameter)


def _rows_of(terms: Sequence[LossTerm]) -> list[Suspect]:
    batches = [
        (term.name, i, batch) for term in terms for i, batch in enumerate(term.micro_batches) if batch is not None
    ]
    return [(name, i, row) for name, i, batch in batches for row in range(len(batch))]
