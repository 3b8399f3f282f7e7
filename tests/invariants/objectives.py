"""Four trainings, each twice: through the real roles in some layout, and by the reference loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import layouts
import reference_loop as plain
import torch
from deviations import Weights
from layouts import (
    EXTENDED,
    INSTRUCT,
    MAX_GRAD_NORM,
    NUM_STEPS,
    PTX,
    PTX_COEF,
    RANKING,
    STEPS,
    TEMPERATURE,
    VALUE_CLIP,
    Models,
)
from support.bench import Bench, Layout, saved_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.core.batches import Experience
from rlhf_dist.distributed.metrics_reduce import Shares
from rlhf_dist.ppo.roles import PolicyRole, ValueRole
from rlhf_dist.reward.roles import PreferenceModelRole
from rlhf_dist.sft.roles import LanguageModelRole

SFT, RM, POLICY, EXTENDED_POLICY, VALUE = OBJECTIVES = tuple(MAX_GRAD_NORM)


@dataclass(frozen=True)
class Outcome:
    """What a training ended with."""

    weights: Weights
    metrics: dict[str, float]
    """Means over the steps: `loss`, `grad_norm`, and what else an update reports of its terms."""
    shares: list[Shares] = field(default_factory=list)
    """How the rows of each step were split; for PPO with PTX, the responses of all steps and then the texts."""


@dataclass(frozen=True)
class Reference(Outcome):
    """By the reference loop, which also says where it started and what it saw."""

    start: Weights = field(default_factory=dict)
    trace: plain.Trace = field(default_factory=plain.Trace)
    steps: list[Weights] = field(default_factory=list)
    """The weights after each step."""


def role_of(role_class: Any, group: Any, model: Any) -> Any:
    """A role as the command line makes it."""
    return role_class.of(group, model)


def splits_of(role: Any) -> list[Shares]:
    """Fills up with how the role splits what it is given from now on."""
    seen: list[Shares] = []
    split = role.split

    def watched(*args: Any, **kwargs: Any) -> Shares:
        seen.append(split(*args, **kwargs))
        return seen[-1]

    role.split = watched
    return seen


def language_model(path: Path) -> Any:
    """The model, in fp32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def scalar_model(path: Path) -> Any:
    """The model, in fp32."""
    return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)


class Trainings:
    """Over the same models and data."""

    def __init__(self, bench: Bench, models: Models) -> None:
        self.bench = bench
        self.models = models

    @functools.cached_property
    def experience(self) -> Experience:
        """On-policy at the first step; returns are near the values, so that clipping takes hold of some."""
        g = torch.Generator().manual_seed(7)
        rollout = layouts.rollout()
        with torch.no_grad():
            logprobs, _ = plain.response_logprobs(language_model(self.models.policy), rollout, TEMPERATURE)
            ref_logprobs, _ = plain.response_logprobs(language_model(self.models.reference), rollout, TEMPERATURE)
            values = [row[:-1] for row in plain.response_values(scalar_model(self.models.value), rollout)]
        noise, advantages = [[torch.randn(len(row), generator=g) for row in values] for _ in range(2)]
        returns = [row + 0.5 * n for row, n in zip(values, noise, strict=True)]
        return layouts.experience(
            rollout,
            old_logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            old_values=values,
            advantages=advantages,
            returns=returns,
        )

    @functools.cached_property
    def weighted(self) -> Experience:
        """The same with importance weights, of which two responses have none left."""
        weights = 0.5 + torch.rand(self.experience.old_logprobs.shape, generator=torch.Generator().manual_seed(8))
        weights[[2, 5]] = 0
        return replace(self.experience, importance_weights=torch.where(self.experience.response_mask, weights, 0.0))

    # -- through the roles -----------------------------------------------------------------------------------------------

    def train(self, objective: str, layout: Layout) -> Outcome:
        """Four optimizer steps in this layout."""
        if objective == SFT:
            return self._supervised(layouts.sft_spec, LanguageModelRole, layouts.TEXTS, layout, "sft")
        if objective == RM:
            return self._supervised(layouts.reward_spec, PreferenceModelRole, layouts.RANKINGS, layout, "reward_model")
        if objective == VALUE:
            return self.update_value(layout, self.experience, STEPS)
        if objective == POLICY:
            return self.update_policy(layout, self.experience, STEPS, PTX)
        return self.update_policy(layout, self.weighted, STEPS, None, EXTENDED)

    def _supervised(self, spec_of: Any, role_class: Any, batches: Any, layout: Layout, prefix: str) -> Outcome:
        model, spec = spec_of(self.models, layout)
        with self.bench.hosted(spec, layout) as group:
            role = role_of(role_class, group, model)
            shares = splits_of(role)
            reports = [role.update(batch, step).result().metrics for step, batch in enumerate(batches)]
            mean = {key: sum(report[key] for report in reports) / NUM_STEPS for key in reports[0]}
            metrics = {"loss": mean[f"{prefix}/loss"], "grad_norm": mean["train/grad_norm"]}
            return Outcome(saved_weights(role), metrics, shares)

    def update_policy(
        self, layout: Layout, experience: Experience, steps: Any, ptx: Any, terms: plain.PolicyTerms = INSTRUCT
    ) -> Outcome:
        """The policy's steps on `experience`."""
        config = layouts.ppo_config(self.models, layout, terms)
        with self.bench.hosted(layouts.ppo_spec(config, "policy"), layout) as group:
            role = role_of(PolicyRole, group, config.policy)
            shares = splits_of(role)
            metrics = role.update(experience, steps, ptx, terms.kl_coef).result().metrics
            names = ["loss", "grad_norm", "clip_fraction", "entropy", "approx_kl"]
            names += (["ptx_loss"] if ptx else []) + (["kl_loss"] if terms.kl_coef else [])
            return Outcome(saved_weights(role), {name: metrics[f"policy/{name}"] for name in names}, shares)

    def update_value(self, layout: Layout, experience: Experience, steps: Any) -> Outcome:
        """The value function's steps on `experience`."""
        config = layouts.ppo_config(self.models, layout)
        with self.bench.hosted(layouts.ppo_spec(config, "value"), layout) as group:
            role = role_of(ValueRole, group, config.value)
            shares = splits_of(role)
            metrics = role.update(experience, steps).result().metrics
            named = {name: metrics[f"value/{name}"] for name in ("loss", "grad_norm")}
            return Outcome(saved_weights(role), named, shares)

    # -- by the reference loop -------------------------------------------------------------------------------------------

    @functools.cache  # noqa: B019 - lives as long as the suite
    def reference(self, objective: str) -> Reference:
        """The same four steps."""
        if objective == SFT:
            nll = lambda model, i, trace: plain.nll(model, layouts.TEXTS[i])  # noqa: E731
            return self.descend(language_model(self.models.policy), SFT, nll)
        if objective == RM:
            ranking = lambda model, i, trace: plain.ranking(model, layouts.RANKINGS[i], **RANKING)  # noqa: E731
            return self.descend(scalar_model(self.models.reward), RM, ranking)
        if objective == VALUE:
            return self.plain_value(self.experience, STEPS)
        if objective == POLICY:
            return self.plain_policy(self.experience, STEPS, PTX)
        return self.plain_policy(self.weighted, STEPS, None, EXTENDED)

    def plain_policy(
        self, experience: Experience, steps: Any, ptx: Any, terms: plain.PolicyTerms = INSTRUCT
    ) -> Reference:
        """The policy's terms and PTX, each a mean over its own tokens of the step."""

        def loss(model: Any, i: int, trace: plain.Trace) -> Tensor:
            objective = plain.policy_objective(model, experience.rows(steps[i]), terms, trace)
            if ptx is None:
                return objective
            nll = plain.nll(model, ptx[i])
            trace.see("ptx_loss", nll)
            return objective + PTX_COEF * nll

        return self.descend(language_model(self.models.policy), POLICY if ptx else EXTENDED_POLICY, loss)

    def plain_value(self, experience: Experience, steps: Any) -> Reference:
        """Clipped squared errors."""

        def loss(model: Any, i: int, trace: plain.Trace) -> Tensor:
            return plain.value_error(model, experience.rows(steps[i]), VALUE_CLIP, trace)

        return self.descend(scalar_model(self.models.value), VALUE, loss)

    def descend(self, model: Any, objective: str, loss_of_step: Callable[[Any, int, plain.Trace], Tensor]) -> Reference:
        """Steps on whatever loss, with the optimizer of `objective`."""
        start, after = copied(model), []

        def loss(i: int, trace: plain.Trace) -> Tensor:
            value = loss_of_step(model, i, trace)
            if len(trace.seen.get("loss", [])) == i:
                trace.see("loss", value)
            return value

        def keep() -> None:
            after.append(copied(model))

        trace = plain.descend(model, layouts.optimizer(MAX_GRAD_NORM[objective]), loss, keep)
        return Reference(after[-1], trace.means(), start=start, trace=trace, steps=after)


def copied(model: Any) -> Weights:
    """Name → parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
