"""What a result was made from: content hashes, the version of the code, and the record beside the model.

A file is known by the SHA-256 of its bytes; a directory by that of the sorted list "HASH  PATH" of its files, one a line
(what `sha256sum` prints), without hidden files.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rlhf_dist
from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.run.run_folder import write_atomically

LINEAGE = "lineage.json"
"""Beside a stage's `model/`; written last, so that a folder that has it is whole."""

_CHUNK = 1 << 20
_SETTLED_S = 2.0
"""A file changed less than this before it was read may change again within the clock's resolution: it is read anew."""
_LIBRARIES = ("torch", "transformers", "deepspeed", "ray", "datasets", "tokenizers", "safetensors")


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: keys sorted, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


class ContentHashes:
    """Hashes of files and directories, remembered by size and times, so that large files are not read at every start."""

    def __init__(self, store: Path | None = None) -> None:
        """`store`: a file that keeps what was read for the next process; None remembers nothing beyond this object."""
        self._store = store
        self._known: dict[str, list[Any]] = {}
        if store is not None:
            try:
                self._known = dict(json.loads(store.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                self._known = {}  # it only saves time: what cannot be read is made anew

    def file(self, path: Path) -> str:
        """SHA-256 of a file's bytes."""
        path = path.absolute()
        before = path.stat()
        state = [before.st_size, before.st_mtime_ns, before.st_ctime_ns]
        known = self._known.get(str(path))
        if known is not None and known[:3] == state:
            return str(known[3])
        digest = sha256_of_file(path)
        if time.time() - max(before.st_mtime, before.st_ctime) > _SETTLED_S:
            self._known[str(path)] = [*state, digest]
        return digest

    def directory(self, path: Path) -> str:
        """SHA-256 over the files of a directory."""
        return sha256_of_listing(self.files(path))

    def files(self, path: Path) -> dict[str, str]:
        """Relative path → SHA-256 of every file below `path`, except hidden ones and those in hidden folders."""
        found = {}
        for folder, folders, names in os.walk(path, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                file = Path(folder) / name
                if not name.startswith(".") and file.is_file():
                    found[file.relative_to(path).as_posix()] = self.file(file)
        return dict(sorted(found.items()))

    def save(self) -> None:
        """Keep what was read for the next process."""
        if self._store is not None:
            write_atomically(self._store, json.dumps(self._known))


def sha256_of_listing(files: Mapping[str, str]) -> str:
    """SHA-256 of the lines "HASH  PATH" of a directory's files, sorted by path."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def cached_commit(name: str, repo_type: str = "model", revision: str = "main") -> str | None:
    """The commit that a hub name stands for in this machine's cache; None where the cache does not have it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = f"{repo_type}s--{name.replace('/', '--')}"
    try:
        return (Path(HF_HUB_CACHE) / folder / "refs" / revision).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def code_version() -> dict[str, Any]:
    """Version of the package and, where it runs from a git checkout, its commit and whether the package was changed since."""
    package = Path(rlhf_dist.__file__).parent
    found: dict[str, Any] = {"rlhf_dist": rlhf_dist.__version__, "git_commit": None, "git_dirty": None}
    # A package in an environment that merely lies inside somebody's checkout is not part of it.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return found
    found["git_commit"] = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", ".")
    found["git_dirty"] = None if changes is None else bool(changes)
    return found


def minor_release(version: str) -> str:
    """1.2.3 → 1.2: within it, no patch changes a result."""
    return ".".join(version.split(".")[:2])


def library_versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that a result can depend on; None for one that is absent."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _LIBRARIES}


def surroundings() -> dict[str, Any]:
    """Code, libraries, host and time."""
    return {
        "code": code_version(),
        "libraries": library_versions(),
        "host": socket.gethostname(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_lineage(folder: Path, lineage: Mapping[str, Any]) -> None:
    """Write lineage.json into a folder that is otherwise whole."""
    write_atomically(folder / LINEAGE, json.dumps(lineage, indent=2, ensure_ascii=False) + "\n")


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """The lineage of a finished folder; None where there is none.

    Raises:
        RunFolderError: the file is broken.
    """
    path = folder / LINEAGE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{path} cannot be read ({error}); restore it, or remove {folder} to run it again"
        ) from error
    if not isinstance(found, dict) or "key" not in found:
        raise RunFolderError(f"{path} is no lineage (it has no key); restore it, or remove {folder} to run it again")
    return found


def check_outputs(folder: Path, lineage: Mapping[str, Any], hashes: ContentHashes) -> None:
    """Reject a finished folder whose results are not those that its lineage names.

    Raises:
        RunFolderError: a file is missing or has another content.
    """
    for name, digest in lineage.get("outputs", {}).items():
        path = folder / name
        wrong = "is missing" if not path.is_file() else None
        if wrong is None and (now := hashes.file(path)) != digest:
            wrong = f"is not the file that was written (its SHA-256 was {digest[:12]}... and is {now[:12]}...)"
        if wrong:
            raise RunFolderError(
                f"{path} {wrong}, though the stage is done. Restore the file, or remove {folder} to run the stage again."
            )


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
