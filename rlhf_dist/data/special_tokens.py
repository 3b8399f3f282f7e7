"""Special tokens and turn marks that text only spells out (`</s>` in a question): they must stay text.

They are marked before rendering and found again behind it, so that those of the template can be told from those of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_dist.core.errors import DataError
from rlhf_dist.data.chat_template import CALL_ID, SENTINEL, Message, opening, render, stop_token_ids

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches what spells a special token or a turn mark of the template, the longest first."""
    # White space is text whatever it is to the tokenizer.
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = {name for name in names if name.strip()} | turn_marks(tokenizer)
    return _alternatives(tuple(sorted(names, key=lambda name: (-len(name), name))))


@lru_cache(maxsize=8)
def _alternatives(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")


def turn_marks(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Added tokens with which a turn could be forged, whether they are "special" or not: those around a user's turn, that which
    ends an assistant's, and the first of every other role's header. Others of the template (`<think>`, `<tool_call>`) may be
    written out in data."""
    return _turn_marks(tokenizer, tokenizer.get_chat_template() if tokenizer.chat_template else None)


@lru_cache(maxsize=8)
def _turn_marks(tokenizer: PreTrainedTokenizerBase, template: str | None) -> frozenset[str]:
    if template is None:
        return frozenset()
    ends = [tokenizer.added_tokens_decoder.get(i) for i in stop_token_ids(tokenizer)]
    # Tokens for white space, words or signs (Gemma has line ends) are rendered around a turn too, and are ordinary text.
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if _is_mark(token.content)]
    around = _around_user(tokenizer)
    marks = {token.content for token in ends if token is not None} | {name for name in added if name in around}
    return frozenset(marks | set(_first_of_headers(tokenizer, added)))


def _is_mark(name: str) -> bool:
    return any(c.isalnum() for c in name) and any(not c.isalnum() and not c.isspace() for c in name)


def _around_user(tokenizer: PreTrainedTokenizerBase) -> str:
    """What is rendered around a user's turn; of a second one, since a system message of the template may come before the first
    (SmolLM 3's describes `<think>`)."""
    first = {"role": "user", "content": SENTINEL}
    try:
        text = render(tokenizer, [first, {"role": "assistant", "content": "zqanswer"}, first])
    except DataError:
        text = ""
    if "zqanswer" not in text:
        try:
            return render(tokenizer, [first])
        except DataError:
            return ""
    return text.partition("zqanswer")[2]


def _first_of_headers(tokenizer: PreTrainedTokenizerBase, added: Sequence[str]) -> Iterable[str]:
    """The first mark of the header of assistant, system and tool turns; later ones may be the beginning of what is said."""
    found = opening(tokenizer)
    headers = [found.cue, found.header] if found else []
    user = {"role": "user", "content": "x"}
    call = {"type": "function", "id": CALL_ID, "function": {"name": "x", "arguments": {}}}
    asked = [user, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with suppress(DataError):
        headers.append(render(tokenizer, [{"role": "system", "content": SENTINEL}, user]).partition(SENTINEL)[0])
    with suppress(DataError):
        before = render(tokenizer, asked)
        answer = {"role": "tool", "content": SENTINEL, "tool_call_id": CALL_ID, "name": "x"}
        text = render(tokenizer, [*asked, answer])
        headers.append(text[len(before) :].partition(SENTINEL)[0] if text.startswith(before) else "")
    for header in headers:
        header = header.removeprefix(str(tokenizer.bos_token or ""))
        places = [(header.index(name), -len(name), name) for name in added if name in header]
        if places:
            yield min(places)[2]


def marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any]
) -> tuple[str, list[Message], list[Any]]:
    """(mark, messages and tools in which the mark comes after the first character of all that spells a special token), so that
    it can be found after rendering; ("", messages, tools) where nothing does.

    What an assistant says keeps control tokens that forge no turn (`<think>`): templates look for them, and a model is to
    learn them.
    """
    pattern = special_pattern(tokenizer)
    texts = "".join(_texts([messages, tools]))
    if not pattern.search(texts):
        return "", list(messages), list(tools)
    mark = next(chr(point) for point in range(0xE000, 0xF8FF) if chr(point) not in texts)  # private use
    forging = turn_marks(tokenizer) | {getattr(tokenizer, name) for name in _NAMED}

    def change(text: str) -> str:
        return pattern.sub(lambda m: m[0][0] + mark + m[0][1:], text)

    def change_said(text: str) -> str:
        return pattern.sub(lambda m: m[0][0] + mark + m[0][1:] if m[0] in forging else m[0], text)

    found = []
    for message in messages:
        # Roles are checked, and templates compare them.
        changed = {**_changed(message, change), "role": message["role"]}
        if message["role"] == "assistant":
            said = {key: message[key] for key in ("content", "reasoning_content") if key in message}
            changed |= _changed(said, change_said)
        found.append(changed)
    return mark, found, _changed(list(tools), change)


def literals_of(tokenizer: PreTrainedTokenizerBase, text: str, mark: str) -> tuple[str, list[tuple[int, int]]]:
    """(the text without the mark, characters of it that were marked and still spell a special token)."""
    parts = text.split(mark)
    clean = "".join(parts)
    pattern, literals, at = special_pattern(tokenizer), [], 0
    for part in parts[:-1]:
        at += len(part)
        found = pattern.match(clean, at - 1)
        # A template may have changed the text, and then it spells no special token any more.
        if found is not None and (not literals or literals[-1][1] <= found.start()):
            literals.append(found.span())
    return clean, literals


def _texts(value: Any) -> list[str]:
    """All texts in messages or tools, keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for key, item in value.items() for text in (key, *_texts(item))]
    return [text for item in value for text in _texts(item)] if isinstance(value, (list, tuple)) else []


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _changed(item, change) for key, item in value.items()}
    return [_changed(item, change) for item in value] if isinstance(value, (list, tuple)) else value
