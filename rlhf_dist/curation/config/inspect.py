"""Options of `rlhf-dist data inspect`, beside the configuration of the run that is looked into."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf_dist.config.base import AbsolutePath, Count, Schema
from rlhf_dist.curation.config.dedup import NearDuplicates


class InspectSettings(Schema):
    """What of a run's data is shown, and where it is written. None of it is part of the run."""

    out_dir: AbsolutePath | None = None
    """Folder for `index.html` (one file that needs nothing else, nor a network), `report.json` (the numbers), `config.yaml`
    and, where there are some, `bad_rows.jsonl`. null shows everything on the terminal only."""
    overwrite: bool = False
    """Replace what an earlier call of a data command left in `out_dir`."""
    num_examples: Count = 6
    """Records of each set that are shown token by token, drawn by the run's seed."""
    num_extremes: Count = 2
    """Records of each set that are shown for each reason to be looked at: the longest, the shortest responses, those that were
    cut, the oddest characters, the most tokens a character."""
    max_tokens_shown: Annotated[int, Field(ge=20)] = 600
    """Of a longer sequence the middle of prompt and response is not shown."""
    near: NearDuplicates | None = NearDuplicates()
    """What counts as a near-duplicate, as in `data dedup`; null looks for exact ones only."""
    max_near: Count = 50_000
    """In a set of more records near-duplicates are not looked for, for `data dedup` does that with less memory."""
    list_bad_rows: bool = False
    """Set every bad row aside and list them all, also where the run stops at the first (`on_bad_row: error`)."""
