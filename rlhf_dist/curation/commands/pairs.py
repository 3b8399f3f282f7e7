"""`rlhf-dist data pairs`: ratings and rankings → preference pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_dist.config.load import dump_yaml
from rlhf_dist.core.errors import DataError
from rlhf_dist.curation.config.pairs import PairsConfig
from rlhf_dist.curation.output import check_output, note_rows, written
from rlhf_dist.curation.pairs import ranked_pairs
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.reader import read_preferences
from rlhf_dist.run.console import print_table


def run(config: PairsConfig) -> None:
    """Write the pairs of all sources into `out_dir`, and print how many each gave."""
    check_output(config.out_dir, config.overwrite)
    bad_rows = BadRows()
    counts: dict[str, int] = {}

    def records() -> Iterator[dict[str, Any]]:
        for source in config.sources:
            counts[source.path] = counts.get(source.path, 0)
            preferences = read_preferences(source, config.seed, bad_rows=bad_rows)
            for record in ranked_pairs(preferences, config.min_margin, source=source.name or ""):
                counts[source.path] += 1
                yield record

    with written(config.out_dir, config.overwrite, dump_yaml(config)) as folder:
        number = folder.write_records(records())
        if not number:
            raise DataError(
                f"no two responses differ by min_margin {config.min_margin:g}, so there is no pair; lower min_margin"
            )
        folder.write_bad_rows(bad_rows)
        folder.write_report({"command": "data pairs", "pairs": number, "by source": counts, "bad": len(bad_rows)})
    rows = [(path, str(count)) for path, count in counts.items()]
    rows += [*note_rows(bad_rows), ("bad, skipped", str(len(bad_rows))), ("pairs", str(number))]
    print_table(str(config.out_dir), rows)
