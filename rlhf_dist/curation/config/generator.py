"""What writes text for the commands that make data: a local model, a vLLM engine, or an endpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rlhf_dist.config.base import AbsolutePath, Count, NonNegative, Positive, PositiveInt, Schema
from rlhf_dist.config.hosting import Precision
from rlhf_dist.rollout.config import SamplingConfig


class Sampling(SamplingConfig):
    """How a completion is drawn. What ends it at a text of `stop` is no part of it."""

    max_response_tokens: PositiveInt = 512
    """Longest completion in tokens."""
    temperature: NonNegative = 1.0
    """Softmax temperature; 0 takes the likeliest token."""


class Endpoint(Schema):
    """An HTTP server that speaks OpenAI's protocol."""

    base_url: str
    """Address up to and including the version, such as `http://127.0.0.1:8000/v1`."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key. The key itself is never written down; null where the server asks for none."""
    timeout_s: Positive = 120.0
    """Longest wait for an answer."""
    max_retries: Count = 5
    """How often a request is repeated that the server was too busy for or that got no answer, with growing pauses."""
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the server calls the longest completion of a chat; reasoning models know `max_completion_tokens` alone."""
    omit: tuple[Literal["temperature", "top_p", "seed"], ...] = ()
    """What is not sent, for servers that reject it; they then take their own value."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further keys of every request, such as a server's own sampling settings."""

    @field_validator("base_url")
    @classmethod
    def _address(cls, base_url: str) -> str:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url {base_url!r} is no HTTP address; write it as http://HOST:PORT/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "base_url holds a user, a password or a query, and the configuration is written down; put a key into the "
                "environment variable that api_key_env names"
            )
        return base_url

    @field_validator("api_key_env")
    @classmethod
    def _names_a_variable(cls, name: str | None) -> str | None:
        # The message omits the value: it may be the key itself, pasted into the wrong place.
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("api_key_env is no name of an environment variable; give the variable, not the key")
        return name


class GeneratorConfig(Schema):
    """A language model that answers requests."""

    engine: Literal["hf", "vllm", "openai"] = "hf"
    """`hf` runs a model with transformers in this process, `vllm` with vLLM, `openai` asks an OpenAI-compatible endpoint."""
    model: str
    """A directory in Hugging Face format or a hub name; under `openai`, what the endpoint calls the model."""
    name: str | None = None
    """How records call it; null takes `model`."""
    sampling: Sampling = Sampling()
    batch_size: PositiveInt = 16
    """Requests under way at the same time."""
    precision: Precision = "bf16"
    """Precision of a local model's weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where an `hf` model runs; `auto` takes a GPU where there is one."""
    template_path: AbsolutePath | None = None
    """A Jinja chat template for a local model, used in place of its own; null takes its own, or the built-in instruction
    template where it has none."""
    system: Literal["keep", "merge_into_user"] = "keep"
    """`merge_into_user` puts a system message before the next user message's text, for models without a system turn."""
    same_role_turns: Literal["keep", "merge"] = "keep"
    """`merge` joins messages of one role that follow each other, for chat templates whose roles must alternate."""
    endpoint: Endpoint | None = None
    """Where the endpoint is; needed under `openai`."""
    vllm_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `vllm.LLM`, such as {tensor_parallel_size: 2}."""

    @model_validator(mode="after")
    def _one_place(self) -> GeneratorConfig:
        if self.engine == "openai" and self.endpoint is None:
            raise ValueError(
                "engine is openai but endpoint is not given; add endpoint: {base_url: http://HOST:PORT/v1}"
            )
        if self.engine != "openai" and self.endpoint is not None:
            raise ValueError(
                f"engine is {self.engine}, which asks no endpoint; set engine to openai, or remove endpoint"
            )
        for name in self.endpoint.omit if self.endpoint else ():
            value, usual = getattr(self.sampling, name, None), getattr(Sampling(), name, None)
            if value != usual:
                raise ValueError(
                    f"sampling.{name} is {value}, but endpoint.omit leaves it out; remove it there, or do not set it"
                )
        if self.engine != "vllm" and self.vllm_options:
            raise ValueError(f"engine is {self.engine}, which has no vllm_options; set engine to vllm, or remove them")
        return self

    @property
    def label(self) -> str:
        """How records call it."""
        return self.name or self.model

    @property
    def model_path(self) -> str:
        """A local model's directory, absolute, or its hub name."""
        path = Path(self.model).expanduser()
        return str(path.absolute()) if path.is_dir() else self.model
