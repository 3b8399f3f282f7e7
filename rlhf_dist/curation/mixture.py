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
from rlhf_dist.data.fields import Fields
from rlhf_dist.data.kinds import KINDS
from rlhf_dist.data.mixing import Composition, MixtureSampler
from rlhf_dist.data.records import Conversation
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

    def change(number: int, row: Fields, record: dict[str, Any]) -> dict[str, Any]:
        source = sources[number]
        if as_messages and source.kind == "instruction":
            record = instruction_messages(row, record)
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


def instruction_messages(row: Fields, record: dict[str, Any]) -> dict[str, Any]:
    """An `instruction` row as a `messages` record: the conversation that a trainer makes of it, with weight 0 on the assistant
    turns that it is not trained on, and the other columns of `record`."""
    kind = KINDS["instruction"]
    dropped = {"demonstration", "instruction", "input", "output", "tools"}
    if all(row.get(field) is None for field in ("output", "completion")):  # as prompts, instructions need none
        return {"messages": list(kind.prompt(row)), **_without(record, dropped)}
    found = kind.sequence(row, "")
    assert isinstance(found, Conversation), "an instruction is a conversation"
    targets = range(len(found.messages)) if found.targets is None else found.targets
    messages = [
        {**message, "weight": 0} if message["role"] == "assistant" and i not in targets else message
        for i, message in enumerate(found.messages)
    ]
    if row.get("instruction") is None:
        dropped |= {"prompt", "completion"}
    tools = {"tools": list(found.tools)} if found.tools else {}
    return {"messages": messages, **tools, **_without(record, dropped)}


def _without(record: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


def mixed_lines(spooled: SpooledSources, composition: Composition, seed: int) -> Iterator[bytes]:
    """The records of one mixture as JSON lines, in its order; position p is a function of the seed and p."""
    sampler = MixtureSampler(composition, seed, STREAM)
    numbers: np.ndarray = sampler.indices(0, sampler.num_items).numpy()
    return spooled.lines.in_order_of(numbers)
