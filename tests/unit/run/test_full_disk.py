"""A disk that is full: named with its numbers, nothing half written is left, and the run can be resumed."""

from __future__ import annotations

import json
import re
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from rlhf_dist.cli.main import main
from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.core.futures import completed
from rlhf_dist.run.checkpoint import Checkpoints
from rlhf_dist.run.disk import full_disk_named


class Writes:
    """In place of a trained role: writes a checkpoint of so many bytes."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def save_checkpoint(self, path: Path) -> Future[None]:
        path.mkdir(parents=True)
        torch.save(torch.zeros(self.num_bytes, dtype=torch.uint8), path / "shard.pt")
        return completed(None)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk: Path):
    checkpoints = Checkpoints(small_disk / "checkpoints")
    first = checkpoints.save(1, {}, {"model": Writes(1_200_000)})
    with pytest.raises(
        RunFolderError, match=r"disk is full \(about 1,20\d,\d+ bytes are needed, [\d,]+ of 2,097,152 .*step_000001, is"
    ):
        checkpoints.save(2, {}, {"model": Writes(1_200_000)})
    assert list((small_disk / "checkpoints").iterdir()) == [first]
    assert checkpoints.latest() == first
    assert checkpoints.save(2, {}, {"model": Writes(1000)}).name == "step_000002"


def test_other_errors_are_as_they_were(tmp_path: Path):
    with pytest.raises(KeyError), full_disk_named(tmp_path / "a", "Nothing."):
        raise KeyError("other")


def test_a_mixture_that_does_not_fit_leaves_nothing(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"{i}", "output": "x" * 1000}) + "\n" for i in range(3000)))
    config = tmp_path / "mix.yaml"
    out = small_disk / "out"
    config.write_text(json.dumps({"out_dir": str(out), "sources": [{"path": str(rows), "kind": "instruction"}]}))
    assert main(["data", "mix", str(config)]) == RunFolderError.exit_code
    error = capsys.readouterr().err
    assert f"{out} " in error
    assert re.search(r"more than [12],\d+,\d+ bytes are needed, [\d,]+ of 2,097,152", error)
    assert "Traceback" not in error
    assert list(small_disk.iterdir()) == []
