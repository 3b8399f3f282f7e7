"""`rlhf-dist label [export | report] CONFIG`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rlhf_dist.config.load import dump_yaml
from rlhf_dist.core.errors import DataError
from rlhf_dist.core.json_lines import json_line
from rlhf_dist.curation.candidates import Item, read_items
from rlhf_dist.curation.config.label import LabelConfig
from rlhf_dist.curation.judgements import Judgement, check_items, preference_records, read_judgements, tallies
from rlhf_dist.curation.label_report import (
    AGREEMENT_HEADER,
    CRITERIA_HEADER,
    PROGRESS_HEADER,
    agreement_rows,
    bias_text,
    criteria_rows,
    label_report,
    progress_rows,
)
from rlhf_dist.curation.labeling import JUDGEMENTS, LabelTask, judgements_of, open_folder
from rlhf_dist.curation.output import OutputFolder, check_output, print_notes, written
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.pipeline.arguments import PROG, load_schema
from rlhf_dist.run.console import print_table
from rlhf_dist.run.run_folder import BAD_ROWS, write_atomically

EXPORT = "export"
REPORT = "label_report.json"


def run(arguments: list[str]) -> None:
    """Serve the page, or export or report what it gathered."""
    actions = {"export": export, "report": report}
    if arguments and arguments[0] in actions:
        config = load_schema(LabelConfig, f"{PROG} label {arguments[0]}", arguments[1:], "label")
        if config is not None:
            actions[arguments[0]](config)
        return
    config = load_schema(LabelConfig, f"{PROG} label", arguments, "label")
    if config is not None:
        serve(config)


def serve(config: LabelConfig) -> None:
    """Serve the page until Ctrl-C."""
    from rlhf_dist.curation.label.server import check_library, serve_page

    check_library()
    items, bad = _items(config)
    with open_folder(config, {item.id: item for item in items}) as journal:
        _list_bad_rows(config, bad)
        serve_page(LabelTask(config, items, judgements_of(journal), journal.append), journal.path)


def export(config: LabelConfig) -> None:
    """Preference records of what was judged so far, into OUT_DIR/export; also while the page is served."""
    out = config.out_dir / EXPORT
    check_output(out, config.overwrite)
    listed, bad = _items(config)
    items = {item.id: item for item in listed}
    judgements = _judgements(config, items)
    chosen = config.export.annotators
    known = {judgement.annotator for judgement in judgements}
    if missing := [name for name in chosen if name not in known]:
        raise DataError(
            f"export.annotators names {missing[0]!r}, of whom there is no judgement; there are some of "
            f"{', '.join(sorted(known))}"
        )
    kept = [judgement for judgement in judgements if not chosen or judgement.annotator in chosen]
    form = config.export
    records = list(preference_records(items, kept, form.policy, source=form.source, margins=form.margins))
    counts = _counts(kept, records) | {"bad rows": len(bad)}
    if not records:
        told = ", ".join(f"{name}: {number}" for name, number in counts.items())
        raise DataError(
            f"{config.out_dir / JUDGEMENTS}: no pair has a winner by export.policy {config.export.policy} ({told}); judge "
            "more, or choose another policy"
        )
    with written(out, config.overwrite, dump_yaml(config)) as folder:
        folder.write_records(records)
        folder.write_bad_rows(bad)
        folder.write_report({"command": "label export", **counts, "policy": config.export.policy})
    print_table(f"label export: {out}", [(name, str(number)) for name, number in counts.items()])
    with_margin = counts["records with a margin"]
    if 0 < with_margin < len(records):
        print(
            f"warning: {with_margin} of {len(records)} records have a margin; the others were judged by one person, and "
            "reward.margin_coef takes their margin for 0, less than that of a disputed pair. Set export.margins to false, or "
            "have those pairs judged by others too.",
            file=sys.stderr,
        )


def _counts(judgements: Sequence[Judgement], records: Sequence[dict[str, Any]]) -> dict[str, int]:
    pairs = tallies(judgements)
    provenances = [record["provenance"] for record in records]
    with_record = {(p["item"], tuple(sorted(p["candidates"]))) for p in provenances}
    return {
        "pairs judged": len(pairs),
        "records": len(records),
        "records with a margin": sum("margin" in record for record in records),
        "pairs without a record": len(pairs) - len(with_record),
        "pairs that nobody prefers a response of": sum(tally.neither == len(tally.judgements) for tally in pairs),
        "annotators": len({judgement.annotator for judgement in judgements}),
    }


def report(config: LabelConfig) -> None:
    """Progress, choices, seconds, position bias and agreement, on the terminal and in OUT_DIR/label_report.json."""
    items, bad = _items(config)
    by_id = {item.id: item for item in items}
    task = LabelTask(config, items, _judgements(config, by_id))
    found: dict[str, Any] = {**label_report(task), "bad_rows": len(bad)}
    _list_bad_rows(config, bad)
    write_atomically(config.out_dir / REPORT, json_line(found, indent=2))
    print_table(
        f"label report: {found['pairs_judged']} of {found['pairs']} pairs judged", progress_rows(found), PROGRESS_HEADER
    )
    print(bias_text(found))
    print_table("agreement", agreement_rows(found), AGREEMENT_HEADER)
    print(f"{found['agreement']['all']['pairs_judged_by_one']} pairs were judged by one annotator only.")
    if found["criteria"]:
        print_table("criteria", criteria_rows(found), CRITERIA_HEADER)


def _items(config: LabelConfig) -> tuple[list[Item], BadRows]:
    """The items, and the rows that are none."""
    bad_rows = BadRows()
    items = read_items(config.sources, bad_rows)
    if bad_rows:
        print(f"{len(bad_rows)} rows are skipped ({BAD_ROWS} lists them), the first: {bad_rows.rows[0].reason}")
    print_notes(bad_rows)
    return items, bad_rows


def _list_bad_rows(config: LabelConfig, bad_rows: BadRows) -> None:
    """The account of them in OUT_DIR; none where the rows have been fixed."""
    (config.out_dir / BAD_ROWS).unlink(missing_ok=True)
    OutputFolder(config.out_dir).write_bad_rows(bad_rows)


def _judgements(config: LabelConfig, items: dict[str, Item]) -> list[Judgement]:
    path = config.out_dir / JUDGEMENTS
    judgements = read_judgements(path)
    check_items(judgements, items, path)
    return judgements
