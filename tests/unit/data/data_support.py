"""A small real tokenizer (byte-level BPE), trained here."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SHARED_DATA = Path(__file__).parents[3].parent / "shared" / "data"

# No pre-tokenization but bytes and many repeats of what surrounds a response, so that merges cross its border.
CORPUS = [
    "\n\nhello there",
    "### Response:",
    "Tiếng Việt rất đẹp. Xin chào các bạn!",
] * 20

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(*special: str, **names: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges cross spaces and line ends, as those of SentencePiece-like tokenizers do."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>", *special], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", additional_special_tokens=list(special), **names
    )
