"""The dotted keys a schema accepts, and the one nearest to a key it does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

_LIKELY = 0.6
"""Similarity below which a guess would mislead more than help."""


def dotted(location: Iterable[str | int]) -> str:
    """("data", "train", 0, "path") → "data.train[0].path"."""
    out = ""
    for step in location:
        out += f"[{step}]" if isinstance(step, int) else f".{step}" if out else str(step)
    return out


def schema_keys(schema: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every key of `schema`, sections included → its help text. Keys of list items are written `data.train[].path`."""
    keys: dict[str, str] = {}
    for name, field in schema.model_fields.items():
        key = f"{prefix}{name}"
        keys[key] = " ".join((field.description or "").split())
        for model, in_list in _models(field.annotation):
            keys.update(schema_keys(model, f"{key}[]." if in_list else f"{key}."))
    return keys


def choices_of(schema: type[BaseModel], key: str) -> tuple[Any, ...]:
    """The values a key is restricted to by `Literal`; () for other keys. `key` must be one of the schema's."""
    name, _, rest = key.partition(".")
    annotation = schema.model_fields[name].annotation
    if rest:
        return next(
            (choices_of(m, rest) for m, _ in _models(annotation) if rest.partition(".")[0] in m.model_fields), ()
        )
    options = (annotation, *get_args(annotation))  # `Literal[...] | None` holds the Literal as an argument.
    return next((get_args(option) for option in options if get_origin(option) is Literal), ())


def nearest_key(location: Iterable[str | int], keys: Iterable[str]) -> str | None:
    """The key most like `location`: alike as a whole, or of the same last name in another section. None if none is."""
    steps = tuple(location)
    wanted = dotted("[]" if isinstance(step, int) else step for step in steps).replace(".[]", "[]")
    parent, _, leaf = wanted.rpartition(".")
    section = wanted.partition(".")[0]

    def likeness(key: str) -> float:
        key_parent, _, key_leaf = key.rpartition(".")
        leaves = SequenceMatcher(None, leaf, key_leaf).ratio()
        whole = SequenceMatcher(None, wanted, key).ratio()
        if key_parent == parent:
            return leaves + 0.1
        nearby = 0.05 if parent and key.startswith(f"{section}.") else 0.0
        return max(whole, leaves) + nearby if leaves >= _LIKELY else 0.0

    best = max(keys, key=likeness, default=None)
    if best is None or likeness(best) < _LIKELY:
        return None
    for index in (step for step in steps if isinstance(step, int)):
        best = best.replace("[]", f"[{index}]", 1)
    return best.replace("[]", "[0]")


def _models(annotation: Any, in_list: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """Models inside an annotation such as `tuple[DataSource, ...]` or `FrozenModel | None`, and whether in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, in_list
        return
    is_list = getattr(annotation, "__origin__", None) in (tuple, list)
    for argument in get_args(annotation):
        yield from _models(argument, in_list or is_list)
