"""What all tests share: the real data that lies beside the checkout, and a quiet, offline environment."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiers import tier_of

# A run in the background (nohup, a batch job) ignores SIGINT, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before any test imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the mark of its tier (tiers.py), before pytest selects by marks."""
    for item in items:
        if tier := tier_of(item.nodeid.removeprefix("tests/")):
            item.add_marker(tier)


@pytest.hookimpl
def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are not part of a test's name: what a compressor makes differs from second to second, and the test processes must
    collect the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout; tests that need it are skipped where it is absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the data sets are not beside the checkout ({path})")
    return path


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with its tokenizer, in Hugging Face format. Not to be written to."""
    from support.tiny import save_tiny_lm

    return save_tiny_lm(tmp_path_factory.mktemp("tiny") / "lm")


@pytest.fixture(scope="session")
def tiny_rm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model of the vocabulary of `tiny_lm`. Not to be written to."""
    from support.tiny import save_tiny_rm

    return save_tiny_rm(tmp_path_factory.mktemp("tiny") / "rm")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Two MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("not allowed to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)  # processes that wrote there may still be ending
