"""Write the tables of the READMEs that are measured or generated; a test run writes none of them.

python tests/support/publish_tables.py               the generated ones: metrics, plans
python tests/support/publish_tables.py deviations    run all invariance tests (most of an hour), publish what they measured
python tests/support/publish_tables.py families      train every family of models (minutes), publish what ran
python tests/support/mutations.py                    the table of mutations
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS), str(TESTS / "invariants")]

from deviations import MEASURED, Table  # noqa: E402
from whole_suite import expected_rows  # noqa: E402

from rlhf_dist.run.metrics import metrics_table  # noqa: E402
from support import families, planning_tables  # noqa: E402

FAMILIES_MARKERS = ("<!-- families -->\n", "<!-- end of families -->")
METRICS_README, METRICS_MARKER = ROOT / "rlhf_dist" / "run" / "README.md", "<!-- metrics -->\n"


def publish_metrics() -> None:
    """The table of metric names."""
    head = METRICS_README.read_text(encoding="utf-8").split(METRICS_MARKER)[0]
    METRICS_README.write_text(f"{head}{METRICS_MARKER}{metrics_table()}", encoding="utf-8")


def publish_families() -> None:
    """Which architectures run: the table of tests/README.md."""
    readme = TESTS / "README.md"
    head, _, rest = readme.read_text(encoding="utf-8").partition(FAMILIES_MARKERS[0])
    tail = rest.partition(FAMILIES_MARKERS[1])[2]
    with tempfile.TemporaryDirectory() as folder:
        rows = families.table(Path(folder))
    readme.write_text(
        "".join([head, FAMILIES_MARKERS[0], "\n", rows, "\n", FAMILIES_MARKERS[1], tail]), encoding="utf-8"
    )


def publish_deviations() -> int:
    """Run all of tests/invariants; publish if it passed and measured every row. Returns pytest's exit code, or 1."""
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "", str(TESTS / "invariants")]
        code = subprocess.run(command, cwd=ROOT, env=os.environ | {MEASURED: str(measured)}, check=False).returncode
        if code:
            return code
        table = Table.load(measured)
    found, expected = {key: row.cases for key, row in table.rows.items()}, expected_rows()
    if found != expected:
        other = sorted(str(key) for key in found.keys() | expected if found.get(key) != expected.get(key))
        print(f"not published: tests/invariants/whole_suite.py expects other cases of {', '.join(other)}")
        return 1
    table.write(TESTS / "README.md")
    return 0


if __name__ == "__main__":
    publish_metrics()
    planning_tables.main()
    if "families" in sys.argv[1:]:
        publish_families()
    sys.exit(publish_deviations() if "deviations" in sys.argv[1:] else 0)
