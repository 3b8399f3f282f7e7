"""Loading a tokenizer that every later step can rely on: fast, with EOS, pad and a chat template."""

from __future__ import annotations

import logging
from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_dist.core.errors import ConfigError, ModelError
from rlhf_dist.data.chat_template import stop_token_ids

log = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
NEW_PAD_TOKEN = "<|pad|>"
_PAD_CANDIDATES = ("<pad>", "<|pad|>", "[PAD]", "<PAD>", "<|padding|>", "<|finetune_right_pad_id|>", "<unk>", "[UNK]")


def load_tokenizer(model_path: str, template_path: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub name, made ready for training.

    It has an EOS token, a pad token (an existing token; the vocabulary never grows, so embeddings fit) and a chat
    template: the one at `template_path`, else its own, else the built-in instruction template. What was set is saved
    with the model by `save_pretrained`.

    Raises:
        ModelError: no tokenizer there, the hub cannot be reached, a slow tokenizer, no EOS token.
        ConfigError: `template_path` cannot be read or is not a Jinja template.
    """
    tokenizer = _from_pretrained(model_path)
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {model_path} is a slow one ({type(tokenizer).__name__}), which cannot tell which "
            "characters a token covers; convert it to a fast one (a tokenizer.json file) and save it beside the model"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model_path} has no EOS token, so a model could not learn to end a response; set "
            '"eos_token" in its tokenizer_config.json to a token of its vocabulary'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _pad_token(tokenizer)
    _set_template(tokenizer, template_path)
    if "strftime_now" in str(tokenizer.chat_template):
        _warn_of_clock(model_path)
    return tokenizer


@cache
def _warn_of_clock(model_path: str) -> None:
    log.warning(
        "the chat template of %s prints the date (strftime_now), so what is trained on changes each day, and a run cannot "
        "be resumed on another; set data.template_path to a copy of it with a fixed date",
        model_path,
    )


def add_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token of its own where EOS or the template's end of turn pads.

    For reward models: transformers reads a sequence's score at its last token that is not padding, so that with EOS as padding
    it would be read before the EOS that ends a response. The new token's id is one that the embeddings may not have.
    """
    if tokenizer.pad_token_id in stop_token_ids(tokenizer):
        tokenizer.add_special_tokens({"pad_token": NEW_PAD_TOKEN})


def _from_pretrained(model_path: str) -> PreTrainedTokenizerBase:
    folder = Path(model_path).expanduser()
    remedy = "give a directory in Hugging Face format with a tokenizer.json, or a hub name that can be reached"
    if folder.is_dir():
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise ModelError(f"{model_path} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); {remedy}")
        model_path = str(folder)
    elif folder.exists() or folder.is_absolute() or model_path.startswith((".", "~")) or model_path.count("/") > 1:
        raise ModelError(f"{model_path} is not a directory; {remedy}")
    try:
        return AutoTokenizer.from_pretrained(model_path)
    except Exception as err:  # transformers, hub and tokenizers each raise their own kinds
        reason = str(err).strip().split("\n")[0] or type(err).__name__
        raise ModelError(f"the tokenizer of {model_path} cannot be loaded ({reason}); {remedy}") from err


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """An existing token to pad with, if possible not EOS. Lengths are explicit everywhere, so EOS does no harm."""
    vocab = tokenizer.get_vocab()
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    reserved = [token for token in special if "reserved" in token or "unused" in token]
    for token in (tokenizer.unk_token, *_PAD_CANDIDATES, *reserved):
        if token in vocab and token != tokenizer.eos_token:
            return str(token)
    return str(tokenizer.eos_token)


def has_builtin_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template is the built-in one, for want of one of its own."""
    return tokenizer.chat_template == _builtin_template(tokenizer)


def _builtin_template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = resources.files("rlhf_dist.data").joinpath("instruction_template.jinja").read_text(encoding="utf-8")
    return _bos_prefix(tokenizer) + template


def _set_template(tokenizer: PreTrainedTokenizerBase, template_path: Path | None) -> None:
    if template_path is None:
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has the chat templates {', '.join(tokenizer.chat_template)} and "
                "none named default; set data.template_path to one"
            )
        if tokenizer.chat_template:
            return
        tokenizer.chat_template = _builtin_template(tokenizer)
        return
    if tokenizer.chat_template:
        log.warning(
            "data.template_path %s replaces the tokenizer's own chat template, and is saved with the model",
            template_path,
        )
    try:
        tokenizer.chat_template = template_path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"data.template_path {template_path} cannot be read ({err}); name a UTF-8 text file") from err
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        tokenizer.apply_chat_template(probe, tokenize=False)
    except TemplateError as err:
        raise ConfigError(
            f"data.template_path {template_path} is not a chat template that can render a user and an assistant "
            f"message ({err}); see rlhf_dist/data/instruction_template.jinja for one that can"
        ) from err


def _bos_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """Renders BOS exactly where the tokenizer itself would begin a text with it.

    Rendered conversations are tokenized without special tokens, because templates render their own: tokenizing them
    with special tokens is how a second BOS gets in.
    """
    bos = tokenizer.bos_token_id
    return "{{- bos_token -}}\n" if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else ""
