"""A tokenizer for each test, and writers of data files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_support import CHATML, train_tokenizer
from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.data import DataSource
from rlhf_dist.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer directory without a chat template."""
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer_session(tokenizer_path: Path) -> PreTrainedTokenizerBase:
    """For many examples in one test, which must not change it."""
    return load_tokenizer(str(tokenizer_path))


@pytest.fixture
def tokenizer(tokenizer_path: Path) -> PreTrainedTokenizerBase:
    """With the built-in instruction template."""
    return load_tokenizer(str(tokenizer_path))


@pytest.fixture
def chatml() -> PreTrainedTokenizerBase:
    """With a ChatML template, whose end-of-turn token is not EOS."""
    made = train_tokenizer("<|im_start|>", "<|im_end|>")
    made.chat_template = CHATML
    return made


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a file (text, bytes, or a list of JSON lines) and gives its path."""

    def _write(name: str, content: Any) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return _write


@pytest.fixture
def source(write: Callable[..., str]) -> Callable[..., DataSource]:
    """A source of JSON lines."""

    def _source(kind: str, records: list[Any], **settings: Any) -> DataSource:
        return DataSource(path=write("data.jsonl", records), kind=kind, **settings)  # pyright: ignore[reportArgumentType]

    return _source
