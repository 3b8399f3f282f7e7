"""Loading models from Hugging Face directories and hub names."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as hf_logging

from rlhf_dist.core.errors import ModelError
from rlhf_dist.models.generation_config import make_savable

LANGUAGE_MODEL_HEADS = {"lm_head", "embed_out", "output"}
"""What transformers' causal language models call their heads."""
_OLD_BUFFERS = (".attn.masked_bias", ".attn.bias", ".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
"""Buffers that older versions of transformers saved (GPT-2, GPT-NeoX, Llama), and models now compute."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model_config(path: str) -> PretrainedConfig:
    """The model's config.json.

    Raises:
        ModelError: `path` is neither a model directory nor a hub name that can be reached.
    """
    if (Path(path).is_absolute() or path.startswith(".")) and not Path(path).is_dir():
        raise ModelError(
            f"no model at {path!r}: there is no such directory; give one that holds config.json and weights"
        )
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model at {path!r}: {str(error).splitlines()[0]} Give a directory that holds config.json and "
            "safetensors weights, or a hub name that this machine can reach."
        ) from error


def context_length(config: PretrainedConfig) -> int | None:
    """Longest sequence the model has positions for; None when the config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_causal_lm(config: PretrainedConfig, role: str) -> None:
    """Reject, by its config, a model without a language-model head. Raises ModelError."""
    if _is_classifier(config):
        raise ModelError(
            f"the {role} model at {config.name_or_path!r} is {_architecture(config)}, which has no language-model head; give a "
            "causal language model"
        )


def check_scalar_model(config: PretrainedConfig, role: str) -> None:
    """Reject, by its config, a model without one trained scalar output. Raises ModelError."""
    if not _is_classifier(config) or config.num_labels != 1:
        raise ModelError(
            f"the {role} model at {config.name_or_path!r} is {_architecture(config)} with {config.num_labels} outputs, not a "
            "reward model; give the model/ folder of a `rlhf-dist reward` run or another sequence-classification model with "
            "one label"
        )


def check_weights(path: str, *, scalar: bool) -> None:
    """Reject, by the headers of a folder's safetensors files, weights of other names or shapes than the model's: the loader
    would reject them when the GPUs are taken. Hub names and other formats are left to it.

    Args:
        path: of the model.
        scalar: whether it is to be loaded by `load_scalar_model`, not by `load_causal_lm`.

    Raises:
        ModelError: the weights are not those of the model, or a file is damaged.
    """
    weights = _headers(Path(path))
    if weights is None:
        return
    config = load_model_config(path)
    may_be_new = scalar and not _is_classifier(config)
    if scalar:
        config.num_labels = 1
    mapping = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if scalar else MODEL_FOR_CAUSAL_LM_MAPPING
    model_class = mapping.get(type(config), None)
    if model_class is None:  # the loader says what there is
        return
    with _quiet_transformers():
        _, info = _from_pretrained(model_class, path, weights, config=config, device_map="meta")
    _check_info(path, info, scalar=scalar, head_is_new=may_be_new and _lacks_scalar_head(info))


def _headers(folder: Path) -> dict[str, torch.Tensor] | None:
    """Empty tensors of the names and shapes in a folder's safetensors files; None where it has none."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = [SAFE_WEIGHTS_NAME]
        files = [folder / name for name in names]
        if not index.is_file() and not files[0].is_file():
            return None
        found = {}
        for file in files:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (no mapping)
                    found[name] = torch.empty(weights.get_slice(name).get_shape(), device="meta")
        return found
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise ModelError(
            f"the weights at {str(folder)!r} cannot be read ({type(error).__name__}: {error}); fetch or save the model again"
        ) from error


def load_causal_lm(path: str, dtype: torch.dtype) -> nn.Module:
    """A causal LM. Under ZeRO-3 (see `engine.zero.sharded_init`) it is built and loaded sharded."""
    model, info = _from_pretrained(AutoModelForCausalLM, path, dtype=dtype)
    _check_info(path, info, scalar=False)
    make_savable(model.generation_config)
    return model


def skeleton(path: str) -> Any:
    """A causal LM without weights (on torch's meta device), with its config and generation config.

    Raises:
        ModelError: transformers has no causal LM of that type.
    """
    config = load_model_config(path)
    try:
        with torch.device("meta"), _quiet_transformers():
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError) as error:
        raise ModelError(
            f"no language model can be made of {path!r} ({str(error).splitlines()[0]}); give a causal language model"
        ) from error
    if (Path(path) / GENERATION_CONFIG_NAME).is_file() or not Path(path).is_dir():
        with contextlib.suppress(OSError):  # a hub name may have none
            model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def load_scalar_model(path: str, dtype: torch.dtype, pad_token_id: int | None) -> tuple[Any, bool]:
    """A sequence-classification model with one output.

    Args:
        path: a reward model, or a causal LM, whose backbone then gets a new head.
        dtype: of the parameters.
        pad_token_id: written into the config, so that transformers' own pooling finds the last real token.

    Returns:
        The model, and whether its head is new (its weights are then arbitrary and the caller initializes them).

    Raises:
        ModelError: the folder's weights are not those of the model: only a new head may be missing, and only the
            language-model head that it replaces be left over.
    """
    config = load_model_config(path)
    is_classifier = _is_classifier(config)
    if is_classifier:
        check_scalar_model(config, "scalar")
    model, info = _from_pretrained(AutoModelForSequenceClassification, path, dtype=dtype, num_labels=1)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ModelError(
            f"{path!r} ({type(model).__name__}) has no linear head named `score`; reward and value models need a "
            "decoder-only architecture such as Llama, Qwen, Mistral or Gemma"
        )
    # By the weights: a reward model's config may name another class, or none.
    head_is_new = not is_classifier and _lacks_scalar_head(info)
    _check_info(path, info, scalar=True, head_is_new=head_is_new)
    if pad_token_id is not None:
        model.config.pad_token_id = pad_token_id
    return model, head_is_new


def as_scalar_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config that a reward model trained from a model of `config` will have. Changes `config`.

    Raises:
        ModelError: transformers has no sequence-classification model of that type.
    """
    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)
    if name is None:
        raise ModelError(
            f"no reward model can be made of {config.name_or_path!r}: transformers has no sequence-classification model of "
            f"type {config.model_type!r}; start from another architecture, such as Llama, Qwen, Mistral or Gemma"
        )
    config.architectures = [name]
    config.num_labels = 1
    return config


def _architecture(config: PretrainedConfig) -> str:
    return (config.architectures or ["a model of unnamed architecture"])[0]


def _is_classifier(config: PretrainedConfig) -> bool:
    return _architecture(config).endswith("ForSequenceClassification")


def _from_pretrained(
    model_class: Any, path: str, weights: dict[str, torch.Tensor] | None = None, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """(model, what transformers says of the names); `weights`: in place of those in the files."""
    source = {"pretrained_model_name_or_path": path if weights is None else None, "state_dict": weights}
    try:
        return model_class.from_pretrained(**source, output_loading_info=True, **kwargs)
    except Exception as error:  # what a damaged file makes a reader of pickles raise can be anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            f"cannot load a model from {path!r}: {reason} Give a directory that holds config.json "
            "and safetensors weights, or a hub name that this machine can reach."
        ) from error


def _lacks_scalar_head(info: dict[str, Any]) -> bool:
    return any(key.startswith("score.") for key in info["missing_keys"])


def _check_info(path: str, info: dict[str, Any], *, scalar: bool, head_is_new: bool = False) -> None:
    """Raise ModelError where transformers found other weights than the model's; a new scalar head may be missing, and the
    language-model head that it replaces be left over."""
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    unexpected -= {name for name in unexpected if name.endswith(_OLD_BUFFERS)}
    if not scalar and any(key.startswith("score.") for key in unexpected):
        raise ModelError(
            f"{path!r} has a scalar head in place of a language-model head, so it is no causal language model; give a policy, "
            "not a reward model"
        )
    if head_is_new:
        missing -= {name for name in missing if name.startswith("score.")}
        unexpected -= {name for name in unexpected if name.split(".")[0] in LANGUAGE_MODEL_HEADS}
    _check_names(path, missing, unexpected)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bar and report of what is missing: a check speaks through its error."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _check_names(path: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise ModelError where weights of the model are not in its folder (they would be random) or the folder has others (they
    would be dropped)."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if not missing and not unexpected:
        return
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    prefix = _common_prefix(missing, unexpected)
    remedy = (
        f"their names have the prefix {prefix!r}: save the model without it (unwrap it before save_pretrained)"
        if prefix
        else "give a folder whose config.json and weights belong together"
    )
    raise ModelError(
        f"the weights at {path!r} are not those of the model that its config.json describes: {'; '.join(parts)}; {remedy}"
    )


def _common_prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What stands before the names that the model has, where most missing weights are there with it (a head may not be); else
    ""."""
    some = {*missing[:1], *missing[-1:]}
    ends = [(name, wanted) for name in unexpected for wanted in some if name.endswith("." + wanted)]
    for name, wanted in ends:
        prefix = name.removesuffix(wanted)
        if 2 * sum(prefix + other in unexpected for other in missing) > len(missing):
            return prefix
    return ""


def restore_buffers(model: Any) -> None:
    """Give non-persistent buffers (RoPE frequencies) the values and precision that a plain load gives them.

    DeepSpeed's `zero.Init` casts every tensor that is made while a model is built, buffers too, to the compute precision:
    in bf16 the angle of position 1,000 would be off by more than a radian, and the model trained would not be the one that
    generates. Call it outside of that context.
    """
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers[name].is_floating_point()]
        if names and not list(module.parameters(recurse=False)):
            for name in names:
                module._buffers[name] = module._buffers[name].float()
            model._init_weights(module)


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch every dropout off, in modules and in the configs that attention functions read."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_pdrop", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model
