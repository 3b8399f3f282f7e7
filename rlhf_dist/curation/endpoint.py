"""Completions from a server that speaks OpenAI's protocol, by OpenAI's own client."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlhf_dist.core.errors import ConfigError, ModelError
from rlhf_dist.core.proxies import proxy_hint
from rlhf_dist.curation.config.generator import GeneratorConfig
from rlhf_dist.curation.generators import Completion, FinishReason, Request, cut_at_stop, request_seed

_FINISH: Mapping[str | None, FinishReason] = {"stop": "eos", "length": "length", None: "eos"}
_OF_ONE_REQUEST = (400, 413, 422)
"""Status codes by which servers reject what is asked rather than who asks."""


class EndpointGenerator:
    """A model behind an OpenAI-compatible endpoint.

    Chats go to `chat/completions`, texts to `completions`. The client repeats what the server was too busy for, with
    growing pauses and as the server's Retry-After says. `seed` is sent with every request, if the configuration does not
    leave it out; servers honor it as they can.
    """

    def __init__(self, settings: GeneratorConfig, seed: int) -> None:
        """Opens no connection yet.

        Raises:
            ConfigError: the package or the key is missing.
        """
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                "engine openai needs the package openai; run `pip install 'rlhf-dist[curation]'`, or use another engine"
            ) from error
        assert settings.endpoint is not None, "the schema asks for it"
        self.settings = settings
        self.endpoint = settings.endpoint
        self.seed = seed
        self._errors: Any = openai
        self._client = openai.OpenAI(
            base_url=self.endpoint.base_url,
            api_key=_key(self.endpoint.api_key_env),
            timeout=self.endpoint.timeout_s,
            max_retries=self.endpoint.max_retries,
        )
        self._pool = ThreadPoolExecutor(settings.batch_size, thread_name_prefix="endpoint")

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request.

        Raises:
            ModelError: the server cannot be reached, is still too busy after all retries, or rejects the key or model.
        """
        futures = [self._pool.submit(self._ask, request) for request in requests]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def _ask(self, request: Request) -> Completion:
        try:
            return self._answer(request)
        except self._errors.APIStatusError as error:
            said = f"status {error.status_code}: {_first_line(error)}"
            if error.status_code in _OF_ONE_REQUEST:
                return Completion.failed(said)
            raise ModelError(
                f"the endpoint {self.endpoint.base_url} rejects requests for {self.settings.model!r} ({said}); check model, "
                "key and quota, then give the same command again: what is done is kept"
            ) from error
        except self._errors.APIConnectionError as error:  # timeouts are among them
            cause = error.__cause__ or error
            raise ModelError(
                f"the endpoint {self.endpoint.base_url} does not answer ({type(cause).__name__}: {_first_line(cause)}) after "
                f"{self.endpoint.max_retries} retries of {self.endpoint.timeout_s:g} s; check base_url and the server, or "
                "raise timeout_s, then give the same command again: what is done is kept."
                f"{proxy_hint(self.endpoint.base_url)}"
            ) from error
        except self._errors.OpenAIError as error:
            return Completion.failed(f"{type(error).__name__}: {_first_line(error)}")

    def _answer(self, request: Request) -> Completion:
        request = request.arranged(self.settings)
        sampling = request.sampling
        drawn = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request_seed(self.seed, request.key),
        }
        body: dict[str, Any] = {key: value for key, value in drawn.items() if key not in self.endpoint.omit}
        body |= {"model": self.settings.model, "extra_body": dict(self.endpoint.extra_body)}
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if isinstance(request.prompt, str):
            body["max_tokens"] = sampling.max_response_tokens
            answer = self._client.completions.create(prompt=request.prompt, **body)
            return self._completion(answer, request, lambda choice: choice.text)
        body[self.endpoint.max_tokens_key] = sampling.max_response_tokens
        if request.tools:
            body["tools"] = [_tool(tool) for tool in request.tools]
        messages: Any = [_message(message) for message in request.prompt]
        answer = self._client.chat.completions.create(messages=messages, **body)
        return self._completion(answer, request, lambda choice: choice.message.content)

    def _completion(self, answer: Any, request: Request, text_of: Any) -> Completion:
        """Servers differ in what they omit, so nothing of an answer is taken for granted."""
        choices = getattr(answer, "choices", None)
        if not choices:
            return Completion.failed("the answer holds no choices")
        text, reason = text_of(choices[0]), choices[0].finish_reason
        if not isinstance(text, str) or reason not in _FINISH:
            return Completion.failed(f"the answer holds no text (finish_reason {reason!r})")
        text, stopped = cut_at_stop(text, request.sampling.stop)
        tokens = getattr(getattr(answer, "usage", None), "completion_tokens", None) or 0
        return Completion(text, "eos" if stopped else _FINISH[reason], int(tokens))


def _tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A description as the protocol has it, also of one that is the function alone."""
    return {"type": "function", "function": tool} if "function" not in tool and "type" not in tool else tool


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the protocol has it: arguments of calls are JSON in a string."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else dict(message)


def _key(variable: str | None) -> str:
    if variable is None:
        return "none"  # the client insists on one
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"endpoint.api_key_env is {variable}, but that environment variable is not set or empty; export the key in it, or "
            "set api_key_env to null where the server asks for none"
        )
    return key


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
