"""Tokenization with `Dataset.map`: cached by content, the same in any number of processes, identified by its tokens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.data import DataSettings, DataSource, RewardData
from rlhf_dist.core.errors import DataError
from rlhf_dist.data import tokenization
from rlhf_dist.data.bad_rows import BadRows, Tally
from rlhf_dist.data.datasets import Ragged
from rlhf_dist.data.loading import load_pairs, load_preferences, load_prompts, load_sequences
from rlhf_dist.data.reader import read_sequences
from rlhf_dist.data.records import Text
from rlhf_dist.data.tokenization import tokenize

Source = Callable[..., DataSource]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are tokenized in this process."""
    sizes: list[int] = []
    original = tokenization._tokenize_batch

    def counted(batch: dict[str, list[str]], **settings: Any) -> Any:
        sizes.append(len(batch["content"]))
        return original(batch, **settings)

    monkeypatch.setattr(tokenization, "_tokenize_batch", counted)
    return sizes


def instructions(num: int, last: str = "a") -> list[dict[str, str]]:
    return [{"instruction": f"câu {i}", "output": f"đáp {i} " * (i % 5 + 1)} for i in range(num - 1)] + [
        {"instruction": "q", "output": last}
    ]


def test_a_second_load_tokenizes_nothing(source: Source, tokenizer, batches):
    wanted = source("instruction", instructions(300))
    first = load_sequences([wanted], DataSettings(), tokenizer)
    assert sum(batches) == 300
    second = load_sequences([wanted], DataSettings(), tokenizer)
    assert sum(batches) == 300
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report
    everything = range(len(first))
    assert torch.equal(first.batch(everything).tokens, second.batch(everything).tokens)
    assert torch.equal(first.batch(everything).loss_mask, second.batch(everything).loss_mask)


@pytest.mark.parametrize("what", ["content", "limit", "policy", "template"])
def test_what_decides_the_tokens_is_tokenized_again(source: Source, tokenizer, batches, what):
    load_sequences([source("instruction", instructions(5))], DataSettings(), tokenizer)
    rows, settings = instructions(5, "b" if what == "content" else "a"), DataSettings()
    if what == "limit":
        settings = DataSettings(max_length_tokens=500)
    if what == "policy":
        settings = DataSettings(on_too_long="skip")
    if what == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("Response", "Answer")
    load_sequences([source("instruction", rows)], settings, tokenizer)
    assert batches == [5, 5]


def test_bad_rows_are_reported_also_from_the_cache(source: Source, tokenizer, batches):
    rows = [*instructions(3), {"instruction": "dài " * 50, "output": "a"}, {"instruction": "q"}]
    wanted = source("instruction", rows, on_bad_row="skip")
    reports = [load_sequences([wanted], DataSettings(max_length_tokens=60), tokenizer).report for _ in range(2)]
    assert sum(batches) == 4, "the row without output is never tokenized"
    assert reports[0] == reports[1]
    assert [bad.reason.split(": ")[0].rpartition(":")[2] for bad in reports[0].bad] == ["5", "4"]
    for _ in range(2):
        with pytest.raises(DataError, match=r"data\.jsonl:4: the prompt alone has \d+ tokens"):
            load_sequences(
                [source("instruction", rows[:4], on_bad_row="error")], DataSettings(max_length_tokens=60), tokenizer
            )


def test_processes_give_what_one_process_gives(source: Source, tokenizer, tmp_path, monkeypatch):
    text = [{"text": "một hai ba bốn năm sáu bảy " * (i % 9 + 1)} for i in range(40)]
    records = [
        *read_sequences(source("instruction", instructions(40))),
        *read_sequences(source("text", text)),
    ]
    found = []
    for num_proc in (1, 2):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache{num_proc}")
        found.append(tokenize(records, tokenizer, DataSettings(max_length_tokens=24), num_proc=num_proc))
    one, two = found
    assert len(one.rows.cache_files) == 1
    assert len(two.rows.cache_files) == 2
    assert len(one.ids) == len(two.ids) > len(records)
    for name in ("ids", "masks"):
        rows = zip(*(getattr(tokens, name).pick(range(len(one.ids))) for tokens in found), strict=True)
        assert all(torch.equal(a, b) for a, b in rows)
    usable = [list(tokens.usable(records, Tally(BadRows()))) for tokens in found]
    assert usable[0] == usable[1]


def test_small_sets_are_tokenized_in_this_process(source: Source, tokenizer, batches, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    load_sequences([source("instruction", instructions(50))], DataSettings(), tokenizer)
    assert sum(batches) == 50


def test_tokens_are_memory_mapped_and_typed(source: Source, tokenizer, cache):
    tokens = tokenize(list(read_sequences(source("instruction", instructions(5)))), tokenizer, DataSettings())
    assert all(Path(file["filename"]).is_relative_to(cache) for file in tokens.rows.cache_files)
    assert (tokens.ids[0].dtype, tokens.masks[0].dtype) == (torch.int32, torch.bool)


def test_a_cache_that_cannot_be_written(source: Source, tokenizer, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    assert len(load_sequences([source("instruction", instructions(5))], DataSettings(), tokenizer)) == 5
    assert "HF_DATASETS_CACHE" in caplog.text


def test_a_template_that_renders_the_date_is_tokenized_anew_each_day(tokenizer: PreTrainedTokenizerBase):
    before = tokenization._tokenizer_identity(tokenizer)
    assert before[-1] == ""
    tokenizer.chat_template = "{{ strftime_now('%Y') }}"
    assert tokenization._tokenizer_identity(tokenizer)[-1] != ""


PAIRS = [{"prompt": f"p{i}", "chosen": "tốt", "rejected": "xấu", "margin": 1.5} for i in range(6)]


def test_fingerprints_follow_what_is_trained_on(source: Source, write, tokenizer):
    def of(rows: list[Any], name: str = "data.jsonl", kind: Any = "instruction", **settings: Any) -> str:
        wanted = [DataSource(path=write(name, rows), kind=kind)]
        if kind == "preference":
            return load_pairs(wanted, DataSettings(**settings), tokenizer, 0).fingerprint
        load: Any = load_prompts if kind == "prompt" else load_sequences
        given = (
            (tokenizer, 100, DataSettings(**settings)) if kind == "prompt" else (DataSettings(**settings), tokenizer)
        )
        return load(wanted, *given).fingerprint

    rows = instructions(6)
    assert of(rows) == of(rows, "renamed.jsonl")
    assert of(rows) == of([row | {"id": 7} for row in rows]), "an unused column"
    others = [instructions(6, "b"), rows[1:], rows[::-1]]
    assert len({of(rows), *map(of, others), of(rows, max_length_tokens=50)}) == 5
    pairs = of(PAIRS, kind="preference")
    assert pairs == of(PAIRS, "renamed.jsonl", kind="preference")
    swapped = [*PAIRS[:5], PAIRS[5] | {"chosen": "xấu", "rejected": "tốt"}]
    rerated = [*PAIRS[:5], PAIRS[5] | {"margin": 2}]
    assert len({pairs, of(swapped, kind="preference"), of(rerated, kind="preference")}) == 3
    assert of([{"prompt": "p"}], kind="prompt") != of([{"prompt": "q"}], kind="prompt")
    assert all(character in "0123456789abcdef" for character in pairs)


def test_fingerprints_do_not_depend_on_how_tokens_are_stored(source: Source, tokenizer):
    ids = Ragged([[1, 2], [3], [4, 5, 6]])
    tokens = tokenize([Text("a b", "x:1"), Text("c", "x:2")], tokenizer, DataSettings())
    copied = Ragged([row.tolist() for row in tokens.ids.pick(range(2))])

    def digest(rows: Ragged) -> str:
        found = hashlib.sha256()
        rows.update(found)
        return found.hexdigest()

    assert digest(copied) == digest(tokens.ids)
    assert digest(ids.select([1, 0])) != digest(ids.select([0, 1])) != digest(ids)


def test_a_part_of_a_preference_set_has_a_fingerprint_of_its_own(source: Source, tokenizer):
    split = load_preferences(RewardData(train=(source("preference", PAIRS),), eval_fraction=0.5), tokenizer, 0)
    assert split.eval is not None
    whole = load_pairs([source("preference", PAIRS)], DataSettings(), tokenizer, 0)
    assert len({whole.fingerprint, split.train.fingerprint, split.eval.fingerprint}) == 3
    part = whole.keeping([0, 2])
    assert part.fingerprint != whole.fingerprint == whole.keeping(range(6)).fingerprint
