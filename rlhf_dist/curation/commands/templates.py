"""`rlhf-dist data templates`: labeled sets → instruction records."""

from __future__ import annotations

from rlhf_dist.config.load import dump_yaml
from rlhf_dist.core.errors import DataError
from rlhf_dist.curation.config.templates import TemplatesConfig
from rlhf_dist.curation.output import check_output, note_rows, written
from rlhf_dist.curation.templates import TemplateReport, render_sources
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.run.console import print_table


def run(config: TemplatesConfig) -> None:
    """Render all sources into `out_dir`, and print how many records each template made."""
    check_output(config.out_dir, config.overwrite)
    bad_rows, report = BadRows(), TemplateReport()
    with written(config.out_dir, config.overwrite, dump_yaml(config)) as folder:
        number = folder.write_records(render_sources(config.sources, bad_rows, report))
        if not number:
            why = f"; the first bad one: {bad_rows.rows[0].reason}" if bad_rows else ""
            raise DataError(f"none of {report.num_rows} rows became a record{why}. Fix the templates or the rows.")
        folder.write_bad_rows(bad_rows)
        folder.write_report(
            {
                "rows": report.num_rows,
                "records": number,
                "bad": len(bad_rows),
                "filtered": len(bad_rows.filtered),
                "templates": [
                    {"task": task, "template": name, "records": count}
                    for (task, name), count in sorted(report.num_records.items())
                ],
            }
        )
    rows = [(f"{task}: {name}", str(count)) for (task, name), count in sorted(report.num_records.items())]
    rows += [("rows read", str(report.num_rows)), ("bad, skipped", str(len(bad_rows)))]
    rows += [("filtered by every template", str(len(bad_rows.filtered))), ("records", str(number))]
    rows += note_rows(bad_rows)
    print_table(str(config.out_dir), rows)
