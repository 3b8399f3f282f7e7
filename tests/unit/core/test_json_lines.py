"""Whatever people's text has in it, what is written is one line of valid JSON in UTF-8."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.core.json_lines import json_line

ANY_TEXT = st.text(st.characters(exclude_categories=()))
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def as_read(value: Any) -> Any:
    """What is to come back: numbers that JSON lacks are null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: as_read(item) for key, item in value.items()}
    return [as_read(item) for item in value] if isinstance(value, list) else value


@given(ANYTHING)
def test_it_is_read_back(value: Any):
    line = json_line(value)
    assert line.endswith("\n")
    assert "\n" not in line[:-1]
    assert json.loads(line.encode("utf-8"), parse_constant=no_constant) == as_read(value)


def test_ordinary_text_is_legible():
    assert json_line({"a": "Größe 👍"}) == '{"a": "Größe 👍"}\n'


def test_half_a_character_stays_escaped():
    assert json_line(["nice \ud83d"]) == '["nice \\ud83d"]\n'


def test_what_is_no_json_is_written_by_its_default():
    assert json_line({"a": b"x"}) == '{"a": "b\'x\'"}\n'

    def none(value: object) -> None:
        raise TypeError(value)

    with pytest.raises(TypeError):
        json_line(b"x", default=none)
