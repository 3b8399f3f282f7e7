"""A small byte-level BPE tokenizer trained on the starter texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from jinja2 import Template
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "</s>"
"""Two tokens, so that padding can never be taken for the end of a response."""

VOCAB_SIZE = 1536
"""Room for most starter words as one token each; the others are spelled in pieces."""

_PIECES = r"[,;] | ?\p{L}+|(?:(?! \p{L})[^\p{L}])+"
"""As GPT-2's pieces (a word takes the space before it), but a comma keeps its space: a listed word then has the same
tokens after a comma as at the start of a line, and a tiny model need not learn each word twice."""


def training_texts(rows: Iterable[Mapping[str, str]], chat_template: str) -> Iterator[str]:
    """The text of starter records: plain text as it is, instructions as the chat template will lay them out."""
    template = Template(chat_template)
    for row in rows:
        if "text" in row:
            yield row["text"]
        else:
            asked = {"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"}
            answered = {"role": "assistant", "content": row["output"]}
            yield template.render(messages=[asked, answered], eos_token="", add_generation_prompt=False)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length_tokens: int = 256) -> PreTrainedTokenizerFast:
    """Train on `texts`, in the given order (the result is a function of the texts).

    All 256 bytes are in the vocabulary, so any UTF-8 text survives a round trip.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=max_length_tokens,
        clean_up_tokenization_spaces=False,
    )
