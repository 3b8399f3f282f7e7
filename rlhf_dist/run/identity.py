"""A run's identity: what decides its result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rlhf_dist import __version__


def identity(config: Any, contents: Mapping[str, str]) -> dict[str, Any]:
    """What decides a run's result, flat, with dotted keys.

    `contents`: path in the configuration → what is there, which then stands in its place. Paths that are not in it count as
    they are written.
    """
    free = {"run_dir", "resume", "overwrite", "checkpoint", "tracking", "ray"}
    decides = _flat(json.loads(config.model_dump_json(exclude=free)))
    # What was wrong to stop a run must not stop its resuming.
    for key in ("ppo.self_checks", "reward.bag_of_words_baseline"):
        decides.pop(key, None)
    decides = {
        key: contents.get(value, value) if isinstance(value, str) and key.endswith("path") else value
        for key, value in decides.items()
    }
    return decides | {"rlhf_dist version": __version__}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists → dotted keys."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}
