"""Importing and building a worker in the process that hosts it."""

from __future__ import annotations

import importlib
from typing import Any

from rlhf_dist.engine.distributed import RankContext, join_process_group, set_process_environment


def build_worker(worker: str, context: RankContext, kwargs: dict[str, Any]) -> Any:
    """Set the process up for `context` and construct the worker (`module:Class`)."""
    set_process_environment(context)
    join_process_group(context)
    module, _, name = worker.partition(":")
    return getattr(importlib.import_module(module), name)(context=context, **kwargs)
