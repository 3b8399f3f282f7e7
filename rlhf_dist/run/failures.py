"""What an aborted step leaves behind: the samples it was aborted for, one JSON line each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any

from torch import Tensor

Row = dict[str, Any]


def sample_dump(
    source: str, batch: Any, rows: Iterable[int], decode: Callable[[Tensor], str] | None = None
) -> Iterator[Row]:
    """Everything a batch holds of some rows, readable: padding cut away, and text where `decode` is given.

    Args:
        source: what the batch is: a loss term, or `rollouts`.
        batch: any record of `core/batches.py`.
        rows: row numbers in it.
    """
    for row in rows:
        one = batch.rows([row])
        record: Row = {"source": source, "row": row}
        if decode is not None and one.tokens.dim() == 2:
            record["text"] = decode(one.tokens[0, : int(one.lengths[0])])
        elif decode is not None:  # a ranking
            record["texts"] = [decode(row[:n]) for row, n in zip(one.tokens[0], one.lengths[0].tolist(), strict=True)]
        for f in fields(one):
            value = getattr(one, f.name)
            record[f.name] = _readable(value[0].tolist()) if isinstance(value, Tensor) else value
        yield record


def _readable(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words."""
    if isinstance(value, list):
        return [_readable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
