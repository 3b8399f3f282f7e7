"""Rates and efficiencies that times are estimated by, beside the datasheet's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.planning.hardware import GPU

PHASES = ("generate", "score", "update", "sync")
"""Of an iteration, in the order they come in."""

Seconds = dict[str, float]
"""What the time goes into → seconds."""

COLLECTIVES = "ZeRO's collectives"


@dataclass(frozen=True)
class Rates:
    """Efficiencies and rates beside the datasheet's. A JSON file may replace any of them."""

    train_efficiency: float = 0.40
    """Of the GPU's operations a second, in forward and backward passes of training."""
    forward_efficiency: float = 0.50
    """In forward passes: scoring, reading prompts."""
    decode_efficiency: float = 0.60
    """Of the GPU's memory bandwidth, in decoding."""
    link_efficiency: float = 0.70
    """Of the bandwidth between GPUs, in collectives."""
    layer_launch_s: float = 0.8e-3
    """Python and kernel launches of one layer for one token step of the `hf` engine."""
    step_launch_s: float = 1e-3
    """Between two token steps of the `vllm` engine: scheduling, and the launch of a CUDA graph."""
    all_reduce_latency_s: float = 10e-6
    """Of an all-reduce among the GPUs of an engine, beside its bytes."""
    host_copy_bytes_per_s: float = 8e9
    """Between a GPU and pageable host memory."""
    host_memory_bytes_per_s: float = 10e9
    """That a rank's AdamW gets where optimizer states are offloaded."""
    store_bytes_per_s: float = 2e9
    """Into Ray's object store, and between the stores of two nodes."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Phase → measured over estimated seconds of a real run."""

    @classmethod
    def read(cls, values: Mapping[str, object], source: str) -> Rates:
        """From a mapping.

        Raises:
            ConfigError: an unknown name, or a value that is no positive number.
        """
        known = sorted({f.name for f in fields(cls)} - {"factors"})
        rates = {name: value for name, value in values.items() if name != "factors"}
        factors = values.get("factors", {})
        if not isinstance(factors, Mapping):
            raise ConfigError(f"{source} sets factors to {factors!r}; it must be an object of numbers by phase")
        for name in rates.keys() - set(known):
            raise ConfigError(f"{source} names the rate {name!r}; known ones are {', '.join(known)}, factors")
        for name in factors.keys() - set(PHASES):
            raise ConfigError(f"{source} has a factor of {name!r}; phases are {', '.join(PHASES)}")
        for name, value in [*rates.items(), *((f"factors.{phase}", value) for phase, value in factors.items())]:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                raise ConfigError(f"{source} sets {name} to {value!r}; it must be a positive number")
        return cls(**rates, factors=dict(factors))  # pyright: ignore[reportArgumentType]

    def memory_bandwidth(self, gpu: GPU) -> float:
        """Bytes a second of a GPU's memory."""
        return gpu.memory_bytes_per_s * self.decode_efficiency

    def ring_s(self, num_bytes: float, num_ranks: int, link_bytes_per_s: float) -> float:
        """Seconds in which a ring gathers, or scatters, `num_bytes` of all its ranks together."""
        return num_bytes * (num_ranks - 1) / num_ranks / (link_bytes_per_s * self.link_efficiency)


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and responses: what is expected on average, and the longest response, to which engines decode."""

    prompt: float
    response: float
    longest_response: int
