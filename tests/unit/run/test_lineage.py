"""Content hashes against the system's own tools, and the record of what a result was made from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import rlhf_dist
from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.run import lineage
from rlhf_dist.run.lineage import (
    ContentHashes,
    check_outputs,
    code_version,
    read_lineage,
    sha256_of_json,
    write_lineage,
)

LONG_AGO = 1_600_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory like a model's, last changed long ago."""
    path = tmp_path / "model"
    (path / "part").mkdir(parents=True)
    for name, content in {"config.json": b"{}", "b.bin": bytes(3_000_000), "part/a.bin": b"a", ".hidden": b"h"}.items():
        (path / name).write_bytes(content)
        os.utime(path / name, (LONG_AGO, LONG_AGO))
    return path


def test_a_directory_is_the_list_that_sha256sum_prints(folder: Path):
    listed = subprocess.run(
        "find . -type f ! -name '.*' | sed 's,^\\./,,' | LC_ALL=C sort | xargs sha256sum | sha256sum",
        shell=True, cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ContentHashes().directory(folder) == listed.stdout.split()[0]


def test_what_a_directory_holds_decides_its_hash(folder: Path):
    before = ContentHashes().directory(folder)
    (folder / ".hidden").write_bytes(b"other")
    assert ContentHashes().directory(folder) == before
    (folder / "config.json").rename(folder / "config2.json")
    renamed = ContentHashes().directory(folder)
    assert renamed != before
    (folder / "part" / "a.bin").write_bytes(b"b")
    assert ContentHashes().directory(folder) not in (before, renamed)


def test_large_files_are_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lineage, "_SETTLED_S", -1.0)
    first = ContentHashes(tmp_path / "hashes.json")
    expected = first.files(folder)
    first.save()
    read: list[str] = []
    whole = lineage.sha256_of_file

    def reading(path: Path) -> str:
        read.append(path.name)
        return whole(path)

    monkeypatch.setattr(lineage, "sha256_of_file", reading)
    second = ContentHashes(tmp_path / "hashes.json")
    assert second.files(folder) == expected
    assert read == []
    # The same size and the same times of change: only the inode's own time tells.
    (folder / "b.bin").write_bytes(bytes(2_999_999) + b"x")
    os.utime(folder / "b.bin", (LONG_AGO, LONG_AGO))
    assert second.files(folder)["b.bin"] == hashlib.sha256(bytes(2_999_999) + b"x").hexdigest()
    assert read == ["b.bin"]


def test_a_file_that_changed_just_now_is_not_remembered(folder: Path, tmp_path: Path):
    hashes = ContentHashes(tmp_path / "hashes.json")
    hashes.file(folder / "config.json")
    hashes.save()
    assert json.loads((tmp_path / "hashes.json").read_text()) == {}


def test_a_broken_store_costs_time_only(folder: Path, tmp_path: Path):
    (tmp_path / "hashes.json").write_text("[1")
    assert ContentHashes(tmp_path / "hashes.json").file(folder / "part/a.bin") == hashlib.sha256(b"a").hexdigest()


def test_json_is_canonical():
    assert (
        sha256_of_json({"b": [1, 2.5, None], "a": "ä"})
        == hashlib.sha256('{"a":"ä","b":[1,2.5,null]}'.encode()).hexdigest()
    )


def test_outputs_that_are_gone_or_changed_are_named(folder: Path):
    found = {"key": "k", "outputs": {"config.json": hashlib.sha256(b"{}").hexdigest()}}
    write_lineage(folder, found)
    assert read_lineage(folder) == found
    check_outputs(folder, found, ContentHashes())
    (folder / "config.json").write_text("{ }")
    with pytest.raises(
        RunFolderError, match=rf"config\.json is not the file that was written .* or remove {folder} to run"
    ):
        check_outputs(folder, found, ContentHashes())
    (folder / "config.json").unlink()
    with pytest.raises(RunFolderError, match=r"config\.json is missing, though the stage is done"):
        check_outputs(folder, found, ContentHashes())


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_lineage_is_rejected(text: str, tmp_path: Path):
    assert read_lineage(tmp_path) is None
    (tmp_path / "lineage.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"lineage\.json .*restore it, or remove"):
        read_lineage(tmp_path)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_code_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "rlhf_dist"
    package.mkdir()
    shutil.copy(rlhf_dist.__file__, package)
    monkeypatch.setattr(rlhf_dist, "__file__", str(package / "__init__.py"))
    version = {"rlhf_dist": rlhf_dist.__version__}
    assert code_version() == version | {"git_commit": None, "git_dirty": None}
    git(tmp_path, "init", "-q")
    assert code_version()["git_commit"] is None, "it lies in a checkout, and is no part of it"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes").write_text("beside the package")
    assert code_version() == version | {"git_commit": commit, "git_dirty": False}
    (package / "new.py").write_text("")
    assert code_version()["git_dirty"] is True


def test_a_hub_name_has_the_commit_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc123\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert lineage.cached_commit("org/name") == "abc123"
    assert lineage.cached_commit("org/name", "dataset") is None
