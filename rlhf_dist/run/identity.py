"""A run's identity: what decides its result, by the marks on the fields of its configuration (`config/base.py: Decides`).

`identity` is the whole of it, known before any data are read: a pipeline's keys are made of it. `resumed_identity` is what a
checkpoint keeps: the length of the run is not part of it, since a run may be extended, and data count by what was read, not
by where it was read from.

Two runs of one identity agree up to the order of floating-point additions, which layout and micro-batches change; on the
same layout bit for bit. Dropout (`lora.dropout`, or a model's own in SFT and reward modeling) is the exception: what is
dropped depends on ranks and micro-batches, so there a change of layout gives another draw of the same run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from rlhf_dist.config.base import Decides


def identity(config: BaseModel, contents: Mapping[str, str]) -> dict[str, Any]:
    """What decides a run's result, flat, with dotted keys.

    Args:
        config: of the run.
        contents: path in the configuration → hash of what is there, which counts in place of the path. Paths that are not
            in it count as they are written.
    """
    return _flat({key: value for key, value, _ in _marked(config)}, contents)


def resumed_identity(config: BaseModel, contents: Mapping[str, str], fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What a run shares with the checkpoints that it may resume.

    Args:
        config: of the run.
        contents: as in `identity`.
        fingerprints: name of a data set → that of what it holds, in place of the settings that the records come from.
    """
    decides = {key: value for key, value, what in _marked(config) if what == "result"}
    return _flat(decides, contents) | {f"content of data: {name}": found for name, found in fingerprints.items()}


def run_length(config: BaseModel) -> dict[str, Any]:
    """The settings that decide how long a run is, with dotted keys."""
    return {key: value for key, value, what in _marked(config) if what == "length"}


def _marked(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, JSON value, what it decides) of every marked field."""
    for name, info in type(model).model_fields.items():
        value, key = getattr(model, name), f"{prefix}{name}"
        mark = next((found for found in info.metadata if isinstance(found, Decides)), None)
        if mark is None:
            if isinstance(value, BaseModel):
                yield from _marked(value, f"{key}.")
        elif mark.by is not None:
            yield key, mark.by(value), mark.what
        else:
            yield key, model.model_dump(mode="json", include={name})[name], mark.what


def _flat(tree: Any, contents: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists → dotted keys, with contents in place of paths."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        is_path = prefix.endswith("path") and isinstance(tree, str)
        return {prefix: contents.get(tree, tree) if is_path else tree}
    return {
        found: leaf
        for key, value in items
        for found, leaf in _flat(value, contents, f"{prefix}.{key}" if prefix else str(key)).items()
    }
