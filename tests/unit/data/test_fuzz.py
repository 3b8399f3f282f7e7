"""No row, and no file, whatever is in it, gives anything but a data set or an error in plain words; under `skip`, too.

The number of inputs is printed (`pytest -rP` shows it): 0 tracebacks is what the test asserts.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from support.rows import COLUMNS, GOOD, rows_of

from rlhf_dist.config.data import DataSettings, DataSource
from rlhf_dist.core.errors import RlhfDistError
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.kinds import KINDS
from rlhf_dist.data.loading import load_pairs, load_prompts, load_sequences
from rlhf_dist.data.reader import read_fields, read_preferences, read_sequences

EXAMPLES = 40
LOADS: dict[str, Callable[..., Any]] = {
    "supervised training": lambda source, tokenizer: load_sequences(
        [source], DataSettings(max_length_tokens=64), tokenizer
    ),
    "reward modeling": lambda source, tokenizer: load_pairs([source], DataSettings(max_length_tokens=64), tokenizer, 0),
    "prompts": lambda source, tokenizer: load_prompts([source], tokenizer, 64, DataSettings()),
}


def check(work: Callable[[], Any]) -> None:
    """Run it: a result, or an error that a user can read and a terminal can show."""
    said = "-"
    try:
        work()
    except RlhfDistError as error:
        said = str(error)
    assert said.strip()
    said.encode("utf-8")


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rows(kind: str, policy: str, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    number = 0

    @settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
    )
    @given(rows_of(kind))
    def run(rows: list[Any]) -> None:
        nonlocal number
        number += 1
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, GOOD[kind]]), encoding="utf-8")
        source = DataSource(path=str(path), kind=kind, on_bad_row=policy)  # pyright: ignore[reportArgumentType]
        bad = BadRows()
        check(lambda: [KINDS[source.kind].subject(row) for row in read_fields(source, bad)])
        for line in bad.lines():
            json.loads(line.encode("utf-8"), parse_constant=lambda name: pytest.fail(name))
        for use in KINDS[source.kind].uses:
            check(lambda use=use: LOADS[use](source, tokenizer))

    run()
    with capsys.disabled():
        print(f" [{kind}, {policy}: {number} files of rows, 0 tracebacks]", end="")


@pytest.mark.parametrize(
    "suffix", [".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz", ".csv.bz2", ".txt.xz"]
)
def test_bytes(suffix: str, tmp_path: Path):
    lines = st.sampled_from(
        [b'{"text": "a"}', b"[", b'"', b"\xe9", b"\xff\xfe", b"a,b\n1", b"{" * 3000, b'{"text": 1' + b"0" * 5000 + b"}"]
    )
    content = st.one_of(st.binary(max_size=40), st.lists(lines, max_size=4).map(b"\n".join))

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(content, st.booleans(), st.sampled_from(["error", "skip"]))
    def run(data: bytes, compressed: bool, policy: Any) -> None:
        path = tmp_path / f"file{suffix}"
        path.write_bytes(gzip.compress(data) if compressed and suffix.endswith(".gz") else data)
        bad = BadRows()
        check(lambda: list(read_fields(DataSource(path=str(path), kind="text", on_bad_row=policy), bad)))
        for line in bad.lines():
            json.loads(line.encode("utf-8"))

    run()


FIXED = [pa.duration("s"), pa.duration("ns"), pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("us", tz="Nowhere/X")]
FIXED += [pa.date64(), pa.time64("ns"), pa.int64(), pa.uint64(), pa.float64()]
"""Types whose values are any 8 bytes."""
LIMITS = st.sampled_from([0, 1, -1, 2**31, 2**53, 2**62, 2**63 - 1, -(2**63)])


@st.composite
def arrow_columns(draw: st.DrawFn, num_rows: int) -> pa.Array:
    """A column of any bytes, as its type may have them, maybe inside lists or records."""
    if draw(st.booleans()):
        contents = draw(st.lists(st.binary(max_size=6), min_size=num_rows, max_size=num_rows))
        _, offsets, data = pa.array(contents, pa.binary()).buffers()
        column: Any = pa.StringArray.from_buffers(num_rows, offsets, data or pa.py_buffer(b""))
    else:
        numbers = draw(st.lists(LIMITS, min_size=num_rows, max_size=num_rows))
        buffer = pa.py_buffer(struct.pack(f"<{num_rows}q", *numbers))
        column = pa.Array.from_buffers(draw(st.sampled_from(FIXED)), num_rows, [None, buffer])
    if draw(st.booleans()):
        column = pa.StructArray.from_arrays([column], ["role"])
    if draw(st.booleans()):
        column = pa.ListArray.from_arrays(list(range(num_rows + 1)), column)
    return column


@pytest.mark.parametrize("kind", ["messages", "preference"])
def test_typed_parquet(kind: Any, tmp_path: Path):
    columns = st.dictionaries(st.sampled_from([*COLUMNS, "other"]), arrow_columns(3), min_size=1, max_size=4)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(columns, st.sampled_from(["error", "skip"]))
    def run(table: dict[str, pa.Array], policy: Any) -> None:
        path = tmp_path / "file.parquet"
        try:
            pq.write_table(pa.table(table), path)
        except pa.ArrowException:  # what no file can hold
            reject()
        bad = BadRows()
        source = DataSource(path=str(path), kind=kind, on_bad_row=policy)
        reader = read_sequences if kind == "messages" else partial(read_preferences, seed=0)
        check(lambda: list(reader(source, bad_rows=bad)))
        for line in bad.lines():
            json.loads(line.encode("utf-8"))

    run()
