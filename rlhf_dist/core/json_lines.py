"""Text of other people as lines of JSON: always valid JSON in UTF-8, whatever is in it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def json_line(value: Any, default: Callable[[Any], Any] = repr, indent: int | None = None) -> str:
    """`value` as one line of JSON (with `indent`: as several) with its line end.

    What JSON or UTF-8 cannot hold: NaN and infinities become null; half a character (a lone surrogate) stays escaped, as
    `\\ud83d`.

    Args:
        value: to be written.
        default: makes something JSON of what is none, or raises TypeError.

    Raises:
        RecursionError: nested too deeply.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=default, indent=indent)
    except ValueError:
        value = _finite(value)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=default, indent=indent)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, allow_nan=False, default=default, indent=indent)
    return text + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
