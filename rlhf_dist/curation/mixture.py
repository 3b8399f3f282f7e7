"""A mixture of sources as a stream of records.

    spooled = spool_sources(sources, folder, bad_rows)        # reads and checks everything, once
    composition = compose(settings, spooled.names, spooled.sizes)
    for line in mixed_lines(spooled, composition, seed): ...

Records are on disk while their order is drawn; in memory are 24 bytes a record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_dist.curation.config.mix import MixSource
from rlhf_dist.curation.fingerprints import encoded
from rlhf_dist.curation.rows import read_records
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.mixing import Composition, MixtureSampler
from rlhf_dist.data.spool import Spool

STREAM = "data/mix"
"""Of the draws."""


@dataclass(frozen=True)
class SpooledSources:
    """The records of several sources on disk, source after source, as lines of the mixture."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Records of each."""
    lines: Spool


def spool_sources(sources: Sequence[MixSource], path: Path, bad_rows: BadRows) -> SpooledSources:
    """Read and check all sources, and write their records to a file, each with its `source`.

    Where kinds `instruction` and `messages` meet, instructions become messages.

    Args:
        sources: the sets.
        path: of the file, which must not be there.
        bad_rows: takes the rows that cannot be used, under `on_bad_row: skip`.

    Raises:
        DataError: what cannot be read or used, with its place.
    """
    as_messages = len({source.kind for source in sources}) > 1

    def change(number: int, record: dict[str, Any]) -> dict[str, Any]:
        source = sources[number]
        if as_messages and source.kind == "instruction":
            record = instruction_messages(record)
        return {**record, "source": str(source.name or record.get("source") or source.label)}

    lines = Spool(path)
    sizes = [0] * len(sources)
    try:
        for row in read_records(sources, bad_rows, change):
            lines.append(encoded(row.line))
            sizes[row.source] += 1
    except BaseException:
        lines.close()
        raise
    return SpooledSources(tuple(source.label for source in sources), tuple(sizes), lines)


def instruction_messages(record: dict[str, Any]) -> dict[str, Any]:
    """An `instruction` record as a `messages` record: the same conversation that a trainer would make of it."""
    parts = [record.get(field) or "" for field in ("demonstration", "instruction", "input")]
    messages = [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}]
    if record.get("output"):
        messages.append({"role": "assistant", "content": record["output"]})
    rest = {name: v for name, v in record.items() if name not in ("demonstration", "instruction", "input", "output")}
    return {"messages": messages, **rest}


def mixed_lines(spooled: SpooledSources, composition: Composition, seed: int) -> Iterator[bytes]:
    """The records of one mixture as JSON lines, in its order; position p is a function of the seed and p."""
    sampler = MixtureSampler(composition, seed, STREAM)
    numbers: np.ndarray = sampler.indices(0, sampler.num_items).numpy()
    return spooled.lines.in_order_of(numbers)
