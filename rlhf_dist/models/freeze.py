"""Which parameters of a model are trained, and what of it is frozen."""

from __future__ import annotations

from typing import Any

from torch import nn

from rlhf_dist.config.freeze import FreezeConfig
from rlhf_dist.core.errors import ConfigError

Counts = dict[str, tuple[int, int]]
"""Part of the model → (tensors, elements)."""


def apply_freeze(model: Any, config: FreezeConfig) -> None:
    """Take the gradient from the parameters that `config` freezes; whole or sharded, on any device.

    Raises:
        ConfigError: the model has fewer layers than are to be frozen, or none that can be told by their structure.
    """
    for parameter in _frozen(model, config):
        parameter.requires_grad_(False)


def head_of(model: Any) -> nn.Module:
    """The scalar head (reward, value), or the language-model head."""
    score = getattr(model, "score", None)
    return score if isinstance(score, nn.Module) else model.get_output_embeddings()


def count_parameters(model: Any) -> tuple[Counts, Counts]:
    """(trained, frozen) parameters of a model by the part they belong to: `embeddings`, `layers`, `head`, `adapters`, `rest`
    (final norms). Tied embeddings count once, as embeddings."""
    parts = _parts(model)
    trained: Counts = {}
    frozen: Counts = {}
    for name, parameter in model.named_parameters():
        side = trained if parameter.requires_grad else frozen
        part = "adapters" if ".lora_" in name else parts.get(id(parameter), "rest")
        tensors, elements = side.get(part, (0, 0))
        side[part] = (tensors + 1, elements + getattr(parameter, "ds_numel", parameter.numel()))
    return trained, frozen


def _frozen(model: Any, config: FreezeConfig) -> list[nn.Parameter]:
    if config.all_but_head:
        kept = {id(parameter) for parameter in head_of(model).parameters()}
        return [parameter for parameter in model.parameters() if id(parameter) not in kept]
    found: list[nn.Parameter] = []
    if config.embeddings:
        found += [parameter for module in _embeddings(model) for parameter in module.parameters()]
    if config.num_layers:
        layers = _layers(model)
        if config.num_layers > len(layers):
            raise ConfigError(
                f"freeze.num_layers is {config.num_layers} but the model has {len(layers)} layers; lower it to at most "
                f"{len(layers)}, or set freeze.all_but_head"
            )
        found += [parameter for layer in layers[: config.num_layers] for parameter in layer.parameters()]
    return found


def _embeddings(model: Any) -> list[nn.Module]:
    return [module for module in model.base_model.modules() if isinstance(module, nn.Embedding)]


def _layers(model: Any) -> list[nn.Module]:
    """The transformer layers, lowest first: the one list of modules that is as long as the config says."""
    number = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    outer = lists[:1]  # modules come before what is inside of them
    if not outer:
        raise ConfigError(
            f"freeze.num_layers cannot be applied to {type(model).__name__}, in which no list of {number} layers is found; "
            "use freeze.embeddings or freeze.all_but_head, or adapters (lora)"
        )
    return list(outer[0])


def _parts(model: Any) -> dict[int, str]:
    """Parameter → the part it belongs to; an embedding that is also the head is an embedding."""
    number = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    owners = [("head", head_of(model)), *(("layers", layer) for layer in lists[:1])]
    owners += [("embeddings", module) for module in _embeddings(model)]
    return {id(parameter): part for part, module in owners for parameter in module.parameters()}
