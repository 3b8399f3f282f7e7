"""What the configurations that make data share."""

from __future__ import annotations

from rlhf_dist.config.base import AbsolutePath, Count, Schema


class CurationConfig(Schema):
    """A command that makes records and writes them into a folder of its own."""

    out_dir: AbsolutePath
    """Folder of the result: `records.jsonl`, `bad_rows.jsonl`, `report.json`, `config.yaml`. It appears when the work is
    done, whole or not at all."""
    overwrite: bool = False
    """Replace what an earlier call of a data command left in `out_dir`. The old result stays until the new one is whole."""
    seed: Count = 0
    """Seed of every random draw."""
