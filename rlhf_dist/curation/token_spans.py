"""Token ids as a reader can follow them: what each stands for in the text, whether it is learnt, whether it is special."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

_MOST_OF_A_CHARACTER = 6
"""Tokens that are read together at most: a character has up to four bytes."""
_LOST = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """A token; several where a character is spread over them."""

    text: str
    target: bool = False
    """Its prediction is trained."""
    special: bool = False
    unknown: bool = False
    """The vocabulary lacks it: the model cannot see what stood here."""
    num_tokens: int = 1
    skipped: bool = False
    """Stands for tokens that are not shown."""


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], targets: Sequence[bool]) -> list[Piece]:
    """The pieces of a sequence; joined, their texts are what `tokenizer.decode` makes of `ids`.

    A token alone decodes otherwise than in its place (SentencePiece drops a leading space, and a byte is no character), so
    each is decoded behind the one before.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found: list[Piece] = []
    before: list[int] = []
    group: list[int] = []

    def close(text: str, last: int) -> None:
        nonlocal before, group
        unknown = tokenizer.unk_token_id in group and tokenizer.unk_token_id is not None
        found.append(Piece(text, targets[last], group[0] in special and not unknown, unknown, len(group)))
        before, group = group, []

    for i, token in enumerate(ids):
        group.append(token)
        text = _decoded_behind(tokenizer, before, group)
        whole = not text.endswith(_LOST) or len(group) == _MOST_OF_A_CHARACTER
        # All tokens of a character are targets, or none is: what is not whole where that changes will never be.
        ends = i + 1 == len(ids) or targets[i + 1] != targets[i] or ids[i + 1] in special or token in special
        if whole or ends:
            close(text, i)
    return found


def _decoded_behind(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> str:
    if before:
        prefix, both = _decoded(tokenizer, before), _decoded(tokenizer, [*before, *ids])
        if both.startswith(prefix):
            return both[len(prefix) :]
    return _decoded(tokenizer, ids)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def shortened(those: Sequence[Piece], max_pieces: int) -> list[Piece]:
    """At most `max_pieces` of a sequence's pieces and one for those skipped, from the middle of what is not at a border
    between prompt and response: of a run too long for its share, the beginning and the end are kept."""
    if len(those) <= max_pieces:
        return list(those)
    runs = [list(run) for _, run in groupby(those, key=lambda piece: piece.target)]
    share = max(max_pieces // len(runs), 2)
    short: list[Piece] = []
    for run in runs:
        if len(run) <= share:
            short += run
            continue
        head, tail = run[: share // 2], run[len(run) - (share - share // 2) :]
        hidden = run[share // 2 : len(run) - len(tail)]
        num = sum(piece.num_tokens for piece in hidden)
        short += [*head, Piece(f"… {num:,} tokens …", run[0].target, num_tokens=num, skipped=True), *tail]
    return short


def runs(those: Sequence[Piece]) -> list[list[Piece]]:
    """Neighbors that are shown alike, together."""
    return [list(run) for _, run in groupby(those, key=lambda p: replace(p, text="", num_tokens=1))]


def as_json(those: Sequence[Piece]) -> list[dict[str, Any]]:
    """Runs of pieces for a report: text, tokens, and `target`, `special`, `unknown`, `skipped` where they are so."""
    flags = ("target", "special", "unknown", "skipped")
    return [
        {"text": "".join(piece.text for piece in run), "tokens": sum(piece.num_tokens for piece in run)}
        | {flag: True for flag in flags if getattr(run[0], flag)}
        for run in runs(those)
    ]
