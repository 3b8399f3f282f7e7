"""Adapters, frozen layers and down-weighted pairs: the weights after several steps are those of plain PyTorch in any layout.

Adapters are written out here as reparametrized matrices W + s B A, without peft; frozen parameters by their names.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import layouts
import pytest
import reference_loop as plain
import torch
from deviations import MAX_LARGEST, MAX_RELATIVE, Weights, deviation
from layouts import BASE, MAX_GRAD_NORM, NUM_STEPS
from objectives import RM, SFT, Trainings, copied, language_model, role_of, scalar_model
from support.bench import Layout, saved_weights
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rlhf_dist.core.random import uniforms
from rlhf_dist.reward.low_margin import LowMargin
from rlhf_dist.reward.roles import PreferenceModelRole
from rlhf_dist.sft.roles import LanguageModelRole

SEED = 0
"""Of the bench."""
RANK, ALPHA = 3, 12.0
NAMES = ("q_proj", "v_proj", "down_proj")
LINEAR = (*NAMES, "k_proj", "o_proj", "gate_proj", "up_proj")
PARTS: dict[str, dict[str, Any]] = {
    "lora all-linear": {"lora": {"rank": RANK, "alpha": ALPHA}},
    "lora by names": {"lora": {"rank": RANK, "alpha": ALPHA, "target_modules": list(NAMES)}},
    "frozen layers": {"freeze": {"num_layers": 1, "embeddings": True}},
    "head only": {"freeze": {"all_but_head": True}},
}
LAYOUTS = [(1, 0), (2, 0), (1, 2), (2, 2), (1, 3), (2, 3)]


class LowRank(nn.Module):
    """W → W + s B A."""

    def __init__(self, down: Tensor, num_rows: int) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(num_rows, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ALPHA / RANK * self.up @ self.down


@dataclass
class Expected:
    start: Weights
    weights: Weights
    trace: plain.Trace


def prepared(model: Any, part: str) -> Callable[[], Weights]:
    """Freeze and adapt `model`; returns what gives its weights by their plain names."""
    head = "score.weight" if hasattr(model, "score") else "lm_head.weight"
    if part.startswith("lora"):
        targets = LINEAR if part == "lora all-linear" else NAMES
        model.requires_grad_(False)
        if head == "score.weight":
            model.score.requires_grad_(True)
        names = [name for name, module in model.named_modules() if name.rpartition(".")[2] in targets]
        shapes = {name: model.get_submodule(name).weight.shape for name in names}
        for name, (rows, columns) in shapes.items():
            drawn = uniforms(SEED, f"LoRA {name}.weight", 0, range(RANK), columns)
            low_rank = LowRank(((2 * drawn - 1) / columns**0.5).float(), rows)
            parametrize.register_parametrization(model.get_submodule(name), "weight", low_rank)
    for name, parameter in model.named_parameters():
        if part == "frozen layers" and name.startswith(("model.embed_tokens.", "model.layers.0.")):
            parameter.requires_grad_(False)
        if part == "head only" and name != head:
            parameter.requires_grad_(False)

    def weights() -> Weights:
        found = {name: p.detach().clone() for name, p in model.named_parameters() if ".parametrizations." not in name}
        for name, module in model.named_modules():
            if parametrize.is_parametrized(module):
                found[f"{name}.weight"] = module.weight.detach().clone()
        return found

    return weights


def descended(model: Any, objective: str, part: str, loss_of: Callable[[Any, int], Tensor]) -> Expected:
    start = copied(model)
    weights = prepared(model, part)

    def loss(i: int, trace: plain.Trace) -> Tensor:
        value = loss_of(model, i)
        trace.see("loss", value)
        return value

    trace = plain.descend(model, layouts.optimizer(MAX_GRAD_NORM[objective]), loss, lambda: None)
    return Expected(start, weights(), trace)


@functools.cache
def expected(trainings: Trainings, objective: str, part: str) -> Expected:
    if objective == SFT:
        model = language_model(trainings.models.policy)
        return descended(model, SFT, part, lambda model, i: plain.nll(model, layouts.TEXTS[i]))
    model = scalar_model(trainings.models.reward)
    return descended(model, RM, part, lambda m, i: plain.ranking(m, layouts.RANKINGS[i], **layouts.RANKING))


def compare(found: Weights, metrics: dict[str, float], reference: Expected, layout: Layout) -> None:
    measured = deviation(found, reference.weights, reference.start)
    print(f"{layout}: {measured}")
    assert measured.relative <= MAX_RELATIVE, layout
    assert measured.largest <= MAX_LARGEST, layout
    for name, value in reference.trace.means().items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, layout)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("objective", [SFT, RM])
@pytest.mark.parametrize(("ranks", "stage"), LAYOUTS)
def test_partly_trained_models_do_not_depend_on_the_layout(
    trainings: Trainings, objective: str, part: str, ranks: int, stage: int
):
    layout = replace(BASE, ranks=ranks, zero_stage=stage, training=PARTS[part])
    outcome, reference = trainings.train(objective, layout), expected(trainings, objective, part)
    compare(outcome.weights, outcome.metrics, reference, layout)
    untouched = [name for name, start in reference.start.items() if torch.equal(reference.weights[name], start)]
    assert untouched
    for name in untouched:
        assert torch.equal(outcome.weights[name], reference.start[name]), f"{name} is frozen"


# -- low-margin pairs ------------------------------------------------------------------------------------------------------

BELOW = 0.5
"""The rankings' ratings fall by 0.4: neighbors are low-margin pairs."""
WEIGHTS = (0.0, 0.3)


def ranked(model: Any, batch: Any, weight: float) -> Tensor:
    """Mean over prompts of the mean over their pairs, pair by pair."""
    prompts = []
    for tokens, lengths, ranks, ratings in zip(batch.tokens, batch.lengths, batch.ranks, batch.ratings, strict=True):
        num = int((lengths > 0).sum())
        scalars = plain.scalars_at(model, tokens[:num], lengths[:num])
        scores = [scalars[k, lengths[k] - 1] for k in range(num)]
        pairs = []
        for i, j in itertools.combinations(range(num), 2):
            if ranks[i] == ranks[j]:
                continue
            difference, margin = scores[i] - scores[j], float(ratings[i] - ratings[j])
            low = margin < BELOW
            if low and not weight:
                continue
            pairs.append(torch.log1p(torch.exp(-difference)) * (weight if low else 1.0))
        prompts.append(plain.mean(pairs) if pairs else 0.0 * scores[0])
    return plain.mean(prompts)


@functools.cache
def expected_low_margin(trainings: Trainings, weight: float) -> Expected:
    model = scalar_model(trainings.models.reward)
    return descended(model, RM, "all", lambda model, i: ranked(model, layouts.RANKINGS[i], weight))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_low_margin_pairs_weigh_the_same_in_every_layout(trainings: Trainings, weight: float, ranks: int, stage: int):
    layout = replace(BASE, ranks=ranks, zero_stage=stage)
    model, spec = layouts.reward_spec(trainings.models, layout)
    rule = {"pair_weights": LowMargin(BELOW, weight), "margin_coef": 0.0, "centering_coef": 0.0}
    with trainings.bench.hosted(replace(spec, build=functools.partial(spec.build, **rule)), layout) as group:
        role = role_of(PreferenceModelRole, group, model)
        reports = [role.update(batch, step).result().metrics for step, batch in enumerate(layouts.RANKINGS)]
        mean = {key: sum(report[key] for report in reports) / NUM_STEPS for key in reports[0]}
        metrics = {"loss": mean["reward_model/loss"], "grad_norm": mean["train/grad_norm"]}
        compare(saved_weights(role), metrics, expected_low_margin(trainings, weight), layout)


# -- the first weights of adapters -------------------------------------------------------------------------------------


def test_adapters_start_the_same_in_every_layout(trainings: Trainings, tmp_path: Any):
    from safetensors.torch import load_file

    found = []
    for ranks, stage in LAYOUTS:
        layout = replace(BASE, ranks=ranks, zero_stage=stage, training=PARTS["lora all-linear"])
        model, spec = layouts.sft_spec(trainings.models, layout)
        with trainings.bench.hosted(spec, layout) as group:
            folder = tmp_path / f"{ranks}x{stage}"
            role_of(LanguageModelRole, group, model).save(folder).result()
            found.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    drawn = {name for name in found[0] if "lora_A" in name}
    assert len(drawn) == 2 * len(LINEAR)
    assert len({found[0][name].sum().item() for name in drawn}) == len(drawn)
    assert all(not tensor.any() for name, tensor in found[0].items() if name not in drawn)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())
