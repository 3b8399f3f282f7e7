"""`rlhf-dist chat`: talk to a saved model on the terminal."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.data.chat_template import stop_token_ids
from rlhf_dist.data.encoding import encode_prompt
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.models.generation_config import check_generation_config, stop_tokens
from rlhf_dist.models.loading import load_causal_lm, load_model_config
from rlhf_dist.models.vocabulary import check_embeddings, num_token_ids


class Chat:
    """A conversation with a model: it answers with all earlier turns in view."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float = 1.0,
        max_response_tokens: int = 256,
        streamer: TextStreamer | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.max_response_tokens = max_response_tokens
        self.streamer = streamer
        self.messages: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = []

    def say(self, text: str) -> str:
        """The model's reply to `text`; both enter the conversation.

        Raises ConfigError, and leaves the conversation as it was, when it no longer fits the model's context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = torch.tensor([encode_prompt(self.tokenizer, messages)])
        num_prompt = ids.shape[1]
        room = getattr(self.model.config, "max_position_embeddings", None)
        if room is not None and num_prompt + self.max_response_tokens > room:
            raise ConfigError(
                f"The conversation has {num_prompt} tokens; with a reply of up to {self.max_response_tokens} it "
                f"exceeds the model's context of {room}. Type /reset, or lower --max-response-tokens."
            )
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            # All filters off: what is heard is the distribution that was trained, not a trimmed one.
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        with torch.no_grad():
            out = self.model.generate(
                ids.to(self.model.device),
                attention_mask=torch.ones_like(ids).to(self.model.device),
                max_new_tokens=self.max_response_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                # As PPO's rollouts stop: also where the chat template ends turns with another token than EOS.
                eos_token_id=stop_tokens(self.model, stop_token_ids(self.tokenizer)),
                suppress_tokens=list(range(num_token_ids(self.tokenizer), self.model.config.vocab_size)) or None,
                streamer=self.streamer,
                **sampling,
            )
        reply = str(self.tokenizer.decode(out[0, num_prompt:], skip_special_tokens=True)).strip()
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        return reply


def run(model_dir: str, temperature: float, max_response_tokens: int, device: str, seed: int) -> None:
    """Load the model, then answer line after line until /exit or the end of the input.

    Input that is not a terminal is read as one prompt a line, without prompts in between. Raises ConfigError for
    options that cannot be run, ModelError for a directory that holds no language model.
    """
    _check(temperature, max_response_tokens)
    tokenizer = load_tokenizer(model_dir)
    check_generation_config(model_dir)
    model = _load(model_dir, device)
    check_embeddings(model.config, tokenizer, "loaded", "use the tokenizer that it was trained with")
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
    chat = Chat(model, tokenizer, temperature, max_response_tokens, streamer)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (line editing and history for input())

        print("/reset forgets the conversation, /exit or Ctrl-D ends it.")
    while (line := _next_line(interactive)) is not None:
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            chat.reset()
        elif text.startswith("/"):
            print(f"There is no command {text}; there are /reset and /exit.", file=sys.stderr)
        elif text:
            _answer(chat, text)


def _answer(chat: Chat, text: str) -> None:
    try:
        chat.say(text)
    except ConfigError as error:
        print(error, file=sys.stderr)
    sys.stdout.flush()


def _next_line(interactive: bool) -> str | None:
    try:
        return input("> " if interactive else "")
    except EOFError:
        if interactive:
            print()
        return None


def _check(temperature: float, max_response_tokens: int) -> None:
    if temperature < 0:
        raise ConfigError(f"--temperature is {temperature}; it must be 0 (the likeliest token) or more. Raise it.")
    if max_response_tokens < 1:
        raise ConfigError(f"--max-response-tokens is {max_response_tokens}; it must be at least 1. Raise it.")


def _load(model_dir: str, device: str) -> Any:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch finds no GPU here. Use --device cpu or auto.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16  # A saved run holds fp32 master weights; bf16 halves memory on a GPU, where it is also fast.
    if device == "cpu":
        saved = getattr(load_model_config(model_dir), "dtype", None)
        dtype = saved if isinstance(saved, torch.dtype) else torch.float32
    return load_causal_lm(model_dir, dtype).to(device).eval()
