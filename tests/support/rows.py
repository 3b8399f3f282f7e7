"""Rows of data as hypothesis makes them: anything that JSON can hold, near enough to what is valid to reach every check."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from rlhf_dist.data.kinds import KINDS

TEXT = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=12),
    st.sampled_from(
        ["", " ", "</s>", "nice \ud83d", "\x00", "\n\nHuman: a\n\nAssistant: b", "Human:", "1e400", "nan", "{{ x }}"]
    ),
)
NUMBER = st.one_of(
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 1e308, float("nan"), float("inf"), True, False]),
)
ROLE = st.sampled_from(
    ["user", "assistant", "system", "tool", "human", "gpt", "User", "function", "function_call", "", None, 3]
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": ROLE,
        "content": st.one_of(
            TEXT, st.none(), NUMBER, st.lists(st.dictionaries(st.sampled_from(["type", "text"]), TEXT), max_size=2)
        ),
        "from": ROLE,
        "value": TEXT,
        "weight": st.one_of(NUMBER, st.none()),
        "tool_calls": st.one_of(
            TEXT, st.lists(st.dictionaries(st.sampled_from(["function", "name", "arguments"]), TEXT), max_size=2)
        ),
        "function_call": st.one_of(TEXT, st.dictionaries(st.sampled_from(["name", "arguments", "args"]), TEXT)),
        "refusal": st.one_of(TEXT, NUMBER),
        "reasoning_content": st.one_of(TEXT, NUMBER),
        "other": TEXT,
    },
)
CHAT = st.lists(st.one_of(MESSAGE, TEXT, NUMBER, st.none()), max_size=4)
VALUE = st.recursive(
    st.one_of(TEXT, NUMBER, st.none(), CHAT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=2)),
    max_leaves=4,
)
COLUMNS = sorted({field for kind in KINDS.values() for field in kind.fields})
COLUMNS += [
    "conversations",
    "completion",
    "system_prompt",
    "tools",
    "functions",
    "image",
    "score_chosen",
    "score_rejected",
    "provenance",
]
ROW = st.dictionaries(st.one_of(st.sampled_from(COLUMNS), TEXT), VALUE, max_size=6)
GOOD: dict[str, dict[str, Any]] = {
    "instruction": {"instruction": "i", "output": "o"},
    "messages": {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    "text": {"text": "t"},
    "preference": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "ratings": {"response": "r", "rating": 1},
    "prompt": {"prompt": "p"},
    "candidates": {"prompt": "p", "candidates": ["a", "b"]},
}
"""A valid row of each kind."""


def rows_of(kind: str) -> st.SearchStrategy[list[Any]]:
    """Up to three rows: of any columns, of a valid row's columns with others beside them, or no rows at all."""
    return st.lists(st.one_of(ROW, ROW.map(lambda row: GOOD[kind] | row), VALUE), max_size=3)
