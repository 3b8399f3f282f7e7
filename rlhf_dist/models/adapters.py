"""Low-rank adapters (LoRA): put into a model by peft, initialized and merged here so that no layout shows.

y = W x + s B A x with s = alpha / rank (Hu et al. 2021). peft's modules are put into the model in place, so that it stays the
transformers model it was: forward passes, packing, gradient checkpointing and ZeRO meet nothing new. An adapted matrix
`...q_proj.weight` is then called `...q_proj.base_layer.weight`, with `...q_proj.lora_A.default.weight` [rank, in] and
`...q_proj.lora_B.default.weight` [out, rank] beside it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.config.freeze import LoRAConfig
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.core.random import uniforms
from rlhf_dist.models.freeze import head_of

_ADAPTER = "default"
_BASE = ".base_layer."


@dataclass(frozen=True)
class PlainParameter:
    """A parameter as the model without adapters has it."""

    name: str
    """In the model without adapters."""
    base: nn.Parameter
    down: nn.Parameter | None = None
    """A, [rank, in]; None where no adapter belongs to it."""
    up: nn.Parameter | None = None
    """B, [out, rank]."""
    scale: float = 1.0
    transposed: bool = False
    """Whether `base` is [in, out] (GPT-2's Conv1D)."""

    @property
    def sources(self) -> list[nn.Parameter]:
        """What has to be whole for `value`."""
        return [p for p in (self.base, self.down, self.up) if p is not None]

    def value(self) -> Tensor:
        """W + s B A, added up in fp32 and rounded once to W's dtype; W itself where there is no adapter."""
        if self.down is None or self.up is None:
            return self.base.data
        delta = self.scale * (self.up.data.float() @ self.down.data.float())
        return (self.base.data.float() + (delta.T if self.transposed else delta)).to(self.base.dtype)


def add_adapters(model: Any, config: LoRAConfig, train_embeddings: bool = False) -> None:
    """Put adapters into `model` (in place) and freeze all but them, a scalar head, and with `train_embeddings` the embeddings
    and the language-model head (they have rows of new tokens, which adapters do not reach).

    A is left as drawn by `initialize_adapters`, B is 0, so that the model computes what it did before. May be called with a
    model on the meta device, or sharded by ZeRO-3: adapters are made whole.

    Raises:
        ConfigError: peft is not installed, or a target is no linear layer of this model.
    """
    from_peft = _peft()
    scalar = isinstance(getattr(model, "score", None), nn.Module)
    _check_targets(model, config)
    if train_embeddings and _named_head(model, config):
        raise ConfigError(
            f"lora.target_modules {_named(config)} names the head, which resize_embeddings trains whole; leave it out"
        )
    peft_config = peft_settings(config, scalar)
    meta = any(p.device.type == "meta" for p in model.parameters())
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that Conv1D is transposed, which peft then takes care of
        try:
            from_peft.inject_adapter_in_model(peft_config, model, low_cpu_mem_usage=meta)
        except ValueError as error:
            raise ConfigError(
                f"lora.target_modules {_named(config)} cannot be adapted: {str(error).splitlines()[0]} Name linear layers of "
                "the model, or use all-linear"
            ) from error
    dtype = next(p for name, p in model.named_parameters() if _BASE in name).dtype
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)  # on the meta device peft leaves them in fp32
    if scalar:
        model.score.requires_grad_(True)
    if train_embeddings:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                module.requires_grad_(True)


@torch.no_grad()
def initialize_adapters(model: Any, seed: int) -> None:
    """A ~ U(−1/√in, 1/√in), as LoRA's authors and peft draw it, but as a function of (seed, name of the matrix, row): the same
    on any rank, number of ranks and ZeRO stage. B = 0. The adapters must be whole."""
    for parameter in plain_parameters(model):
        if parameter.down is not None and parameter.up is not None:
            rank, width = parameter.down.shape
            drawn = uniforms(seed, f"LoRA {parameter.name}", 0, range(rank), width)
            parameter.down.copy_((2 * drawn - 1) / width**0.5)
            parameter.up.zero_()


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` was called on the model."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


def plain_parameters(model: nn.Module) -> list[PlainParameter]:
    """The model's parameters as it would have them without adapters, in its order; tied ones once."""
    modules = dict(model.named_modules())
    found = []
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        owner, _, leaf = name.rpartition(_BASE)
        if not owner:
            found.append(PlainParameter(name, parameter))
            continue
        layer: Any = modules[owner]
        if leaf != "weight":
            found.append(PlainParameter(f"{owner}.{leaf}", parameter))
            continue
        down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        scale, transposed = float(layer.scaling[_ADAPTER]), bool(layer.fan_in_fan_out)
        found.append(PlainParameter(f"{owner}.weight", parameter, down, up, scale, transposed))
    return found


def adapter_parameters(model: Any) -> list[tuple[str, nn.Parameter]]:
    """Name in a file of peft's → what is trained: the adapters, and what is trained whole."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if _is_tied(model):  # peft looks for both by their names
        embeddings = model.get_input_embeddings().weight
        heads = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
        trained += [(f"{head}.weight", p) for _, p in trained if p is embeddings for head in heads]
    return [(f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}", p) for name, p in trained]


def save_adapter_config(model: Any, config: LoRAConfig, base_model: str, path: Path) -> None:
    """Write adapter_config.json as peft reads it."""
    scalar = isinstance(getattr(model, "score", None), nn.Module)
    settings = peft_settings(config, scalar)
    settings.base_model_name_or_path = base_model
    adapted = [p.name.removesuffix(".weight") for p in plain_parameters(model) if p.down is not None]
    # The layers by their whole names: another version of peft may understand `all-linear` differently.
    settings.target_modules = set(adapted)
    settings.fan_in_fan_out = any(p.transposed for p in plain_parameters(model))
    settings.inference_mode = True
    # `...score.weight` → score
    whole = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    settings.modules_to_save = sorted(whole) or None
    # A head that is the embedding stays so when peft puts its copy of it in place.
    settings.ensure_weight_tying = _is_tied(model) and model.get_input_embeddings().weight.requires_grad
    settings.save_pretrained(str(path))


def peft_settings(config: LoRAConfig, scalar: bool) -> Any:
    """`config` in peft's words."""
    targets = config.target_modules
    return _peft().LoraConfig(
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - a float does as well
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
    )


def _check_targets(model: Any, config: LoRAConfig) -> None:
    """Reject named layers that are not there, are not linear, are trained whole, or share their matrix with the embeddings."""
    if isinstance(config.target_modules, str):
        return
    head = head_of(model)
    tied = _is_tied(model)
    for target in config.target_modules:
        named = [(name, m) for name, m in model.named_modules() if name == target or name.endswith(f".{target}")]
        if not named:
            linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if _is_linear(m)})
            raise ConfigError(
                f"lora.target_modules names {target!r}, which no layer of {type(model).__name__} is called; its linear layers "
                f"are called {', '.join(linear)}"
            )
        for name, module in named:
            if not _is_linear(module):
                raise ConfigError(
                    f"lora.target_modules names {target!r}, but {name} is a {type(module).__name__}; adapters are for linear "
                    "layers only, so leave it out"
                )
            if module is head and (tied or isinstance(getattr(model, "score", None), nn.Module)):
                why = "is trained whole anyway" if getattr(model, "score", None) is head else "is also the embedding"
                raise ConfigError(f"lora.target_modules names {target!r}, the head, which {why}; leave it out")


def _is_tied(model: Any) -> bool:
    """Whether the language-model head is the embeddings."""
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


def _named_head(model: Any, config: LoRAConfig) -> bool:
    head = model.get_output_embeddings()
    names = () if isinstance(config.target_modules, str) else config.target_modules
    return any(module is head and name.rpartition(".")[2] in names for name, module in model.named_modules())


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D  # seconds to import, and only needed where adapters are made

    return isinstance(module, nn.Linear | Conv1D)


def _named(config: LoRAConfig) -> str:
    return config.target_modules if isinstance(config.target_modules, str) else repr(list(config.target_modules))


def _peft() -> Any:
    try:
        import peft  # a second or two to import: only where adapters are used
    except ImportError as error:
        raise ConfigError(
            f"lora is set, but peft cannot be imported ({error}); pip install 'rlhf-dist[lora]' on every node, or set lora to "
            "null"
        ) from error
    return peft
