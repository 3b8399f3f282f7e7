from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.core.errors import DataError, RunFolderError
from rlhf_dist.curation.journal import Journal, read_journal
from rlhf_dist.curation.output import check_output, written
from rlhf_dist.data.bad_rows import BadRow, BadRows


def make(out: Path, records: list[dict[str, Any]], overwrite: bool = False) -> None:
    with written(out, overwrite, "seed: 0\n") as folder:
        folder.write_report({"records": folder.write_records(records)})


def test_a_result_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "sub" / "out"
    with written(out, False, "seed: 0\n") as folder:
        folder.write_bad_rows(BadRows([BadRow("a.jsonl:1: bad", {"a": 1})]))
        folder.write_report({"records": folder.write_records([{"text": "ü"}])})
        assert not out.exists()
    assert [json.loads(line) for line in (out / "records.jsonl").read_text("utf-8").splitlines()] == [{"text": "ü"}]
    assert json.loads((out / "bad_rows.jsonl").read_text()) == {"reason": "a.jsonl:1: bad", "row": {"a": 1}}
    assert json.loads((out / "report.json").read_text())["records"] == 1
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_after_an_error_nothing_has_changed(tmp_path: Path) -> None:
    make(tmp_path / "out", [{"a": 1}])

    def failing() -> Iterator[dict[str, Any]]:
        yield {"a": 2}
        raise DataError("bad")

    for out in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(DataError, match="bad"), written(out, True, "") as folder:
            folder.write_records(failing())
    assert (tmp_path / "out" / "records.jsonl").read_text() == '{"a": 1}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_result_is_replaced_only_when_asked_and_a_strangers_folder_never(tmp_path: Path) -> None:
    make(tmp_path / "out", [{"a": 1}])
    with pytest.raises(RunFolderError, match="--overwrite true"):
        make(tmp_path / "out", [])
    make(tmp_path / "out", [{"a": 2}], overwrite=True)
    assert (tmp_path / "out" / "records.jsonl").read_text() == '{"a": 2}\n'
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, problem in (("other", "no report.json"), ("file", "is a file"), ("file/below", "may write to")):
        with pytest.raises(RunFolderError, match=problem):
            check_output(tmp_path / name, overwrite=True)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named_and_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "out", [{"a": 1}])
    monkeypatch.setattr(os, "fsync", full)
    for out in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(RunFolderError, match=rf"{out} .*[\d,]+ of [\d,]+ are free.*out_dir"):
            make(out, [{"a": 2}], overwrite=True)
    assert (tmp_path / "out" / "records.jsonl").read_text() == '{"a": 1}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bad_rows_on_a_nearly_full_disk_are_still_bad_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(DataError, match="bad"), written(tmp_path / "out", False, ""):
        raise DataError("bad")


def test_a_full_disk_leaves_what_a_journal_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "work" / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"a": 1})
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunFolderError, match=rf"{path} .*[\d,]+ of [\d,]+ bytes are free"):
            journal.append({"a": 2})
        monkeypatch.undo()
    assert next(read_journal(path)) == {"a": 1}
