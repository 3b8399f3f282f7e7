"""Completions from models in this process: with transformers, or with vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf_dist.core.batches import TRUNCATED, PromptBatch, pad_rows
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.curation.config.generator import GeneratorConfig
from rlhf_dist.curation.generators import STREAM, Completion, Request, batches, cut_at_stop
from rlhf_dist.data.chat_template import stop_token_ids
from rlhf_dist.data.encoding import encode_prompt
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.models.generation_config import check_generation_config, stop_tokens
from rlhf_dist.models.loading import (
    DTYPES,
    check_causal_lm,
    check_weights,
    context_length,
    load_causal_lm,
    load_model_config,
    skeleton,
)
from rlhf_dist.models.vocabulary import check_embeddings, num_token_ids
from rlhf_dist.rollout.engine import Engine
from rlhf_dist.rollout.hf import HFEngine


class _Local:
    """What local engines share: requests become token ids, or the reason why not; what an engine writes becomes text."""

    engine: Engine

    def __init__(self, settings: GeneratorConfig) -> None:
        self.settings = settings
        model_config = load_model_config(settings.model_path)
        check_causal_lm(model_config, "generating")
        check_generation_config(settings.model_path)
        check_weights(settings.model_path, scalar=False)
        self.context = context_length(model_config)
        self.tokenizer: Any = load_tokenizer(settings.model_path, settings.template_path)
        check_embeddings(model_config, self.tokenizer, "generating", "use the tokenizer that it was trained with")
        self.num_tokens = num_token_ids(self.tokenizer)

    def stop_ids(self, model: Any) -> list[int]:
        """Tokens that end a response of `model`."""
        return stop_tokens(model, stop_token_ids(self.tokenizer))

    @property
    def at_once(self) -> int:
        """Requests that the engine is given at a time."""
        return self.settings.batch_size

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request; the same on every run for the same requests in the same order."""
        encoded = [self.encode(request) for request in requests]
        done: dict[int, Completion] = {row: found for row, found in enumerate(encoded) if isinstance(found, Completion)}
        rows = [row for row in range(len(requests)) if row not in done]
        for batch in batches([requests[row] for row in rows], self.at_once):
            done.update(self._decode([rows[i] for i in batch], requests, encoded))
        return [done[row] for row in range(len(requests))]

    def close(self) -> None:
        """Let go of the model."""
        self.engine.close()

    def encode(self, request: Request) -> list[int] | Completion:
        """Ids of the prompt; a failed completion where the model cannot take it."""
        request = request.arranged(self.settings)
        try:
            if isinstance(request.prompt, str):
                ids = _encode_open_text(self.tokenizer, request.prompt)
            else:
                ids = encode_prompt(self.tokenizer, request.prompt, request.tools)
        except DataError as error:
            return Completion.failed(str(error))
        longest = request.sampling.max_response_tokens
        if self.context is not None and len(ids) + longest > self.context:
            return Completion.failed(
                f"the prompt has {len(ids)} tokens, which with max_response_tokens {longest} exceeds the model's context of "
                f"{self.context}; shorten the prompt or lower max_response_tokens"
            )
        return ids

    def _decode(self, rows: list[int], requests: Sequence[Request], encoded: Sequence[Any]) -> dict[int, Completion]:
        """Completions of requests with one sampling setting."""
        prompts = PromptBatch(
            tokens=pad_rows([torch.tensor(encoded[row]) for row in rows]),
            lengths=torch.tensor([len(encoded[row]) for row in rows]),
            sample_ids=torch.tensor([requests[row].key for row in rows]),
        )
        out = self.engine.generate(prompts, requests[rows[0]].sampling, stream=STREAM, iteration=0)
        made = {}
        for i, row in enumerate(rows):
            start, length = int(out.prompt_lengths[i]), int(out.response_lengths[i])
            ids = out.tokens[i, start : start + length].tolist()
            made[row] = self._completion(ids, requests[row], int(out.finish_reasons[i]) == TRUNCATED)
        return made

    def _completion(self, ids: Sequence[int], request: Request, truncated: bool) -> Completion:
        """The text of response tokens."""
        whole = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        text, stopped = cut_at_stop(whole, request.sampling.stop)
        return Completion(text, "length" if truncated and not stopped else "eos", len(ids))


class HFGenerator(_Local):
    """A Hugging Face model, run with the decoding loop of PPO's rollouts (`rollout/hf.py`)."""

    def __init__(self, settings: GeneratorConfig, seed: int) -> None:
        super().__init__(settings)
        model: Any = load_causal_lm(settings.model_path, DTYPES[settings.precision]).to(torch.device(_device(settings)))
        self.engine = HFEngine(
            model, self.stop_ids(model), seed=seed, num_tokens=self.num_tokens, tokenizer=self.tokenizer
        )


class VLLMGenerator(_Local):
    """A Hugging Face model under vLLM, with the same counter-based draws; vLLM batches requests as it sees fit."""

    def __init__(self, settings: GeneratorConfig, seed: int) -> None:
        super().__init__(settings)
        from rlhf_dist.rollout.vllm import VLLMEngine

        longest = settings.vllm_options.get("max_model_len")
        self.context = min((n for n in (self.context, longest) if isinstance(n, int)), default=None)
        model = skeleton(settings.model_path)
        self.engine = VLLMEngine(
            settings.model_path,
            self.stop_ids(model),
            {name: parameter.shape for name, parameter in model.named_parameters()},
            precision=settings.precision,
            seed=seed,
            device=_device(settings),
            max_sequences=settings.batch_size,
            num_tokens=self.num_tokens,
            stop_texts=True,
            options=settings.vllm_options,
        )

    @property
    def at_once(self) -> int:
        """All: vLLM keeps `batch_size` of them under way."""
        return 2**31


def _device(settings: GeneratorConfig) -> str:
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise ConfigError("device is cuda, but torch finds no GPU here; set device to cpu or auto")
    return "cuda" if there and settings.device != "cpu" else "cpu"


def _encode_open_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that is to be continued: begun as the tokenizer begins texts, not ended. What it spells is text: no
    special token can be forged in it (as `data/encoding.py` has it)."""
    ids = list(tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    if not ids:
        raise DataError(f"the prompt {text[:40]!r} tokenizes to nothing; give it text")
    return ids
