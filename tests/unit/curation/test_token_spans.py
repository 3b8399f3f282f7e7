"""Tokens as a reader sees them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_dist.curation.token_spans import Piece, as_json, pieces, shortened
from rlhf_dist.data.encoding import encode_conversation

BYTES = tiny_tokenizer()


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece has it: spaces belong to the word behind them, and what is not in the vocabulary is unknown."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False)
    core.train_from_iterator(["a calm crime is a calm crime"] * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


@given(st.text(max_size=60).filter(bool), st.integers(0, 60))
def test_joined_they_are_the_text(text: str, border: int):
    encoded = text.encode("utf-8", "ignore").decode()
    ids = BYTES(encoded, add_special_tokens=False)["input_ids"]
    found = pieces(BYTES, ids, [i >= border for i in range(len(ids))])
    assert sum(piece.num_tokens for piece in found) == len(ids)
    if border >= len(ids):
        assert "".join(piece.text for piece in found) == BYTES.decode(ids, clean_up_tokenization_spaces=False)


@given(st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=4))
def test_targets_are_the_assistant_turns_and_what_ends_them(said: list[str]):
    said = [text.encode("utf-8", "ignore").decode().strip() or "x" for text in said]
    said = [text for text in said if "</s>" not in text and "<" not in text] or ["x"]
    said = [*said, "y"] if len(said) % 2 else said
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    ids, mask = encode_conversation(tokenizer, messages)
    found = pieces(tokenizer, ids, mask)
    learnt = "".join(piece.text for piece in found if piece.target)
    assert learnt.replace(" ", "") == "".join(f"{text}{tokenizer.eos_token}" for text in said[1::2]).replace(" ", "")
    assert [piece.text for piece in found if piece.special] == [tokenizer.eos_token] * (len(said) // 2)


def test_a_character_over_several_tokens_is_one_piece():
    ids = BYTES("né 👋!", add_special_tokens=False)["input_ids"]
    found = pieces(BYTES, ids, [False] * len(ids))
    assert [(piece.text, piece.num_tokens) for piece in found] == [("n", 1), ("é", 2), (" ", 1), ("👋", 4), ("!", 1)]


def test_a_character_that_is_cut_in_two_stays_on_its_side_of_the_border():
    ids = BYTES("a👋b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    found = pieces(BYTES, ids, [False] * 3 + [True] * 3)
    assert [(piece.text, piece.num_tokens, piece.target) for piece in found][:2] == [
        ("a", 1, False),
        ("\ufffd", 2, False),
    ]
    assert all(piece.target for piece in found[2:])
    assert sum(piece.num_tokens for piece in found) == 6


def test_spaces_that_a_token_alone_would_lose_are_kept_and_unknown_ones_are_marked():
    tokenizer: Any = metaspace_tokenizer()
    ids = [*tokenizer("a calm 東 crime", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    found = pieces(tokenizer, ids, [True] * len(ids))
    assert "".join(piece.text for piece in found) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "a calm" in "".join(piece.text for piece in found)
    assert [piece.text.strip() for piece in found if piece.unknown] == ["<unk>"]
    assert [piece.text for piece in found if piece.special] == ["</s>"]


def test_the_middle_of_long_runs_is_skipped_and_counted():
    those = [Piece(str(i), target=i >= 10) for i in range(1010)]
    short = shortened(those, 40)
    assert len(short) <= 41
    assert sum(piece.num_tokens for piece in short) == 1010
    assert [piece.text for piece in short if not piece.target] == [str(i) for i in range(10)]
    (gap,) = [piece for piece in short if piece.skipped]
    assert gap.text == "… 980 tokens …"
    assert short[-1].text == "1009"
    assert shortened(those[:40], 40) == those[:40]


def test_runs_for_a_report_say_what_is_learnt():
    those = [Piece("a"), Piece("b", num_tokens=2), Piece("c", target=True), Piece("</s>", target=True, special=True)]
    assert as_json(those) == [
        {"text": "ab", "tokens": 3},
        {"text": "c", "tokens": 1, "target": True},
        {"text": "</s>", "tokens": 1, "target": True, "special": True},
    ]


@pytest.mark.parametrize("ids", [[], [0]])
def test_short_sequences(ids: list[int]):
    assert sum(piece.num_tokens for piece in pieces(BYTES, ids, [False] * len(ids))) == len(ids)
