"""Language models that write data: one protocol over local models, vLLM and endpoints.

A request that cannot be answered (too long for the model, rejected by the server) costs that request: its completion
says why. What would be so for every request (no such model, no key, no server) raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from rlhf_dist.core.errors import ModelError
from rlhf_dist.core.random import derived_seed
from rlhf_dist.curation.config.generator import GeneratorConfig, Sampling
from rlhf_dist.data.chat_template import Message
from rlhf_dist.data.records import arranged

STREAM = "curation/generate"
"""Stream of the counter-based random numbers that completions are drawn with."""

FinishReason = Literal["eos", "length", "error"]


@dataclass(frozen=True)
class Request:
    """What a model is asked."""

    prompt: str | tuple[Message, ...]
    """A text to continue as it stands, or a chat to answer."""
    sampling: Sampling
    key: int
    """What the completion's random numbers are drawn by, with the generator's seed; 0 ≤ key < 2^63, one for each draw."""
    tools: tuple[Any, ...] = ()
    """Descriptions of tools that a chat is given with."""

    def arranged(self, settings: GeneratorConfig) -> Request:
        """As the model of `settings` is to get it: `system` and `same_role_turns`."""
        if isinstance(self.prompt, str):
            return self
        messages, _ = arranged(self.prompt, settings.system, settings.same_role_turns)
        return replace(self, prompt=messages)


@dataclass(frozen=True)
class Completion:
    """What a model wrote."""

    text: str
    finish_reason: FinishReason
    """`eos`: it ended by itself or at a stop text; `length`: at the longest length; `error`: there is none."""
    response_tokens: int = 0
    """Tokens written, where known."""
    error: str = ""
    """Why there is none."""

    @classmethod
    def failed(cls, error: str) -> Completion:
        """No completion, and why."""
        return cls("", "error", 0, error)

    def as_row(self) -> dict[str, Any]:
        """For a journal; `Completion(**row)` reads it back."""
        return {key: value for key, value in asdict(self).items() if value or key == "text"}


class Generator(Protocol):
    """Anything that completes requests."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in their order.

        Raises:
            ModelError, ConfigError: no request can be answered.
        """
        ...

    def close(self) -> None:
        """Let go of memory and connections."""
        ...


def load_generator(settings: GeneratorConfig, seed: int) -> Generator:
    """The generator of a configuration.

    Args:
        settings: which model, and where it runs.
        seed: of the run; with a request's key it determines what a local model writes.

    Raises:
        ModelError: no model there.
        ConfigError: a package, a device or a key is missing.
    """
    if settings.engine == "openai":
        from rlhf_dist.curation.endpoint import EndpointGenerator

        return EndpointGenerator(settings, seed)
    from rlhf_dist.curation import local_models

    return (local_models.HFGenerator if settings.engine == "hf" else local_models.VLLMGenerator)(settings, seed)


def request_seed(seed: int, key: int) -> int:
    """A seed in [0, 2^31) for an engine that keeps a generator of its own for every request."""
    return derived_seed(seed, STREAM, 0, key) & 0x7FFFFFFF


def cut_at_stop(text: str, stop: Iterable[str]) -> tuple[str, bool]:
    """`text` before the first stop text, and whether there was one."""
    ends = [at for at in map(text.find, stop) if at >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def batches(requests: Sequence[Request], size: int) -> Iterator[list[int]]:
    """Row numbers in batches of at most `size`, each of one sampling setting; what is where depends on `requests` alone."""
    groups: dict[Sampling, list[int]] = {}
    for row, request in enumerate(requests):
        groups.setdefault(request.sampling, []).append(row)
    for rows in groups.values():
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def check_some_answered(completions: Sequence[Completion], name: str, answered_before: bool = False) -> None:
    """A first batch without one answer is no accident of a request.

    Raises:
        ModelError: all failed, and none was answered before.
    """
    if completions and not answered_before and all(completion.finish_reason == "error" for completion in completions):
        raise ModelError(
            f"{name} answered none of {len(completions)} requests; the first: {completions[0].error}. Fix what it names and "
            "give the same command again: what is done is kept"
        )
