"""`rlhf-dist data mix`."""

from __future__ import annotations

from rlhf_dist.config.load import dump_yaml
from rlhf_dist.curation.config.mix import MixConfig
from rlhf_dist.curation.mixture import mixed_lines, spool_sources
from rlhf_dist.curation.output import print_notes, written
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.mixing import SHARE_COLUMNS, compose, share_table
from rlhf_dist.run.console import print_table


def run(config: MixConfig) -> None:
    """Read, show the shares, write the mixture."""
    bad_rows = BadRows()
    with (
        written(config.out_dir, config.overwrite, dump_yaml(config)) as folder,
        folder.scratch() as work,
    ):
        spooled = spool_sources(config.sources, work / "records", bad_rows)
        with spooled.lines:
            composition = compose(config.mixing, spooled.names, spooled.sizes)
            print_table("mix: shares of the mixture", share_table(composition), header=SHARE_COLUMNS)
            num_records = folder.write_lines(mixed_lines(spooled, composition, config.seed))
        folder.write_bad_rows(bad_rows)
        kinds = {source.kind for source in config.sources}
        sources = [
            {
                "name": share.name,
                "path": source.path,
                "available": share.num_available,
                "rate": float(share.rate),
                "taken": share.num_records,
                "share": float(share.share),
                "epochs": share.epochs,
            }
            for source, share in zip(config.sources, composition.shares, strict=True)
        ]
        folder.write_report(
            {
                "records": num_records,
                "kind": kinds.pop() if len(kinds) == 1 else "messages",
                "sources": sources,
                "bad rows": len(bad_rows),
            }
        )
    print_notes(bad_rows)
    bad = f"; {len(bad_rows)} bad rows skipped (bad_rows.jsonl)" if bad_rows else ""
    print(f"{num_records:,} records are in {config.out_dir}{bad}")
