"""A run that passed every check and has started nothing: its roles, its data, its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from torch import Tensor

from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.distributed.group import WorkerSpec

D = TypeVar("D")


@dataclass(frozen=True)
class Prepared(Generic[D]):
    """What a room's `prepare` gives to its `run`."""

    specs: list[WorkerSpec]
    data: D
    run_summary: dict[str, Any]
    """Derived numbers, for the start of the run and for `validate`."""
    num_steps: int = 0
    """Optimizer steps of the run (PPO: iterations); 0 where nothing is trained."""
    contents: Mapping[str, str] = field(default_factory=dict)
    """Path in the configuration → hash of what is there, which then counts in place of the path. A pipeline fills it; a run by
    itself counts a model by its path."""
    bad_rows: tuple[str, ...] = ()
    """Lines of bad_rows.jsonl: rows skipped under `on_bad_row: skip`."""
    shares: tuple[dict[str, Any], ...] = ()
    """Of each set that is trained on; empty where there is one and no mixing."""

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Name of each data set → fingerprint of what it holds, of those that a run which trains has."""
        data = self.data
        sets = {f.name: getattr(data, f.name) for f in fields(data)} if is_dataclass(data) else {}
        return {name: found.fingerprint for name, found in sets.items() if hasattr(found, "fingerprint")}


def bad_rows(*datasets: Any) -> tuple[str, ...]:
    """Lines of bad_rows.jsonl, of all data sets."""
    return tuple(line for found in datasets if found is not None for line in BadRows(list(found.report.bad)).lines())


def decoder(tokenizer: Any) -> Callable[[Tensor], str]:
    """[n] token ids → text, without special tokens."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
