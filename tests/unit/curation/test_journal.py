from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_dist.core.errors import DataError, RunFolderError
from rlhf_dist.curation.journal import Journal, read_journal


def test_entries_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "j.jsonl"
    with Journal(path) as journal:
        journal.append({"n": 0, "text": "é\n"})
        assert list(read_journal(path)) == [{"n": 0, "text": "é\n"}]
    with Journal(path) as journal:
        journal.append({"n": 1})
        assert [entry["n"] for entry in journal.entries] == [0, 1]


def test_a_torn_last_line_is_cut_off_and_what_is_appended_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"n": 0}\n{"n": 1, "te')
    assert list(read_journal(path)) == [{"n": 0}]
    with Journal(path) as journal:
        assert journal.entries == [{"n": 0}]
        journal.append({"n": 2})
    assert path.read_bytes() == b'{"n": 0}\n{"n": 2}\n'


def test_a_broken_line_that_was_whole_is_rejected_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"n": 0}\nnonsense\n{"n": 1}\n')
    with pytest.raises(DataError, match=r"j\.jsonl:2"):
        Journal(path)
    assert path.read_bytes() == b'{"n": 0}\nnonsense\n{"n": 1}\n'


def test_a_second_writer_is_rejected(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl"), pytest.raises(RunFolderError, match="another process writes"):
        Journal(tmp_path / "j.jsonl")
    Journal(tmp_path / "j.jsonl").close()


def test_what_was_acknowledged_survives_sigkill(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rlhf_dist.curation.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for n in range(10**6): journal.append({'n': n}); print(n, flush=True)"
    )
    path = tmp_path / "j.jsonl"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [int(next(process.stdout)) for _ in range(50)]
        os.kill(process.pid, signal.SIGKILL)
        said += [int(line) for line in process.stdout if line.endswith("\n")]
    with Journal(path) as journal:
        assert [entry["n"] for entry in journal.entries[: len(said)]] == said
        assert len(journal.entries) in (len(said), len(said) + 1)
