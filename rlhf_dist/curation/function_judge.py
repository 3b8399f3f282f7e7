"""Pairs of candidates, judged by a user's own Python function."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.curation.candidates import Item, Messages
from rlhf_dist.curation.judgements import CHOICES
from rlhf_dist.curation.judging import FAILED, Answer


class FunctionJudge:
    """A Python function of (prompt, a, b)."""

    def __init__(self, place: str) -> None:
        """Load `module:function` or `file.py:function`. Modules of the current directory are found too.

        Raises:
            ConfigError: there is none.
        """
        self.place = place
        where, _, name = place.rpartition(":")
        try:
            module = _module(where)
        except Exception as error:  # whatever the user's module raises
            raise ConfigError(
                f"function {place!r}: {where} cannot be imported ({type(error).__name__}: {error}); fix it, or write "
                "module:function or file.py:function"
            ) from error
        self.function = getattr(module, name, None)
        if not callable(self.function):
            raise ConfigError(f"function {place!r}: {where} has no function {name!r}; name one that it has")
        source = Path(getattr(module, "__file__", None) or "")
        self.sha256 = hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else ""
        """Of the module's file: with another content it is another judge."""

    def judge(self, shown: Sequence[tuple[Item, int, int]]) -> list[Answer]:
        """Call it for each.

        Raises:
            DataError: it raises or returns what is no choice; names the item. Under `on_bad_row: skip` of the item's source
                the answer is `FAILED` instead.
        """
        return [self._answer(item, a, b) for item, a, b in shown]

    def _answer(self, item: Item, a: int, b: int) -> Answer:
        try:
            return self._checked(item, a, b)
        except DataError as error:
            if item.on_bad_row == "error":
                raise
            return Answer(FAILED, str(error))

    def _checked(self, item: Item, a: int, b: int) -> Answer:
        arguments = [plain(messages) for messages in (item.prompt, item.candidates[a], item.candidates[b])]
        try:
            value = self.function(*arguments)  # pyright: ignore[reportOptionalCall]
        except Exception as error:
            raise DataError(
                f"{item.location}: {self.place} raised {type(error).__name__}: {error}; fix the function, or set on_bad_row "
                "to skip"
            ) from error
        if isinstance(value, str) and value in CHOICES:
            return Answer(value, value)
        number = None if isinstance(value, (bool, str)) else _number(value)
        if number is None:
            raise DataError(
                f"{item.location}: {self.place} returned {value!r}; return one of {', '.join(CHOICES)}, or a finite number"
            )
        return Answer("a" if number > 0 else "b" if number < 0 else "tie", repr(number))


def plain(messages: Messages) -> str | list[dict[str, Any]]:
    """A text or, where it is more than one message or a message is more than its text, a list of messages."""
    if len(messages) == 1 and messages[0].keys() == {"role", "content"}:
        return messages[0]["content"]
    return [dict(message) for message in messages]


def _module(where: str) -> ModuleType:
    if not where.endswith(".py"):
        with _on_path(Path.cwd()):  # a console script has its own folder there instead
            return importlib.import_module(where)
    spec = importlib.util.spec_from_file_location(f"judge_{Path(where).stem}", where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < float("inf") else None  # nor is NaN less
