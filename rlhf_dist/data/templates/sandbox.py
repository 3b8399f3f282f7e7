"""A Jinja sandbox for templates that users write: they format and decide, and can do nothing else.

They reach no file, no module, no method that changes their arguments, and nothing random. An undefined name is an error, not
a blank. The output of one operation, and of a template, is bounded; a template that runs for hours in nested loops is not
stopped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, Template
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_LENGTH = 1_000_000
"""Characters that a template may write, and characters or items that one operation may make."""

_PADDING_METHODS = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs", "format", "format_map"})
"""Of strings: each makes as many characters as its argument says."""
_REMOVED_FILTERS = ("center", "format", "indent", "random", "wordwrap")
"""The same, and a draw from Python's own generator, which differs from run to run."""
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{4,}|\*)")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment; see the module."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(undefined=StrictUndefined, autoescape=False, **options)
        for name in _REMOVED_FILTERS:
            del self.filters[name]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Not what pads a text to any length."""
        if isinstance(obj, (str, bytes)) and attr in _PADDING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`"a" * 10 ** 9` and `"%999999999d" % 1` would take all memory."""
        if operator == "**":
            raise SecurityError("powers are not allowed")
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise SecurityError("a field of a thousand characters and more is not allowed")
        if operator == "*" and any(
            _size(a) * b > MAX_LENGTH for a, b in ((left, right), (right, left)) if isinstance(b, int)
        ):
            raise SecurityError(f"* makes more than {MAX_LENGTH} characters or items")
        return super().call_binop(context, operator, left, right)


def render(template: Template, values: Mapping[str, Any]) -> str:
    """The text, piece by piece, so that one without end is noticed.

    Raises:
        SecurityError: it is longer than `MAX_LENGTH`.
    """
    pieces: list[str] = []
    length = 0
    for piece in template.generate(values):
        length += len(piece)
        if length > MAX_LENGTH:
            raise SecurityError(f"it writes more than {MAX_LENGTH} characters")
        pieces.append(piece)
    return "".join(pieces)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 0
