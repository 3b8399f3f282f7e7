"""How long 200,000 preference pairs take to be read, validated and tokenized, and in how much memory.

    python tests/bench/data_scale.py FOLDER --data ../shared/data [--records 200000]

Pairs are made of real text (sentences of reviews, editorials and word problems), in the format of HH-RLHF: a dialogue of three
user turns and two answers of the assistant, and then one answer that was chosen and one that was rejected; 5,000 characters a
pair, so that 200,000 are a gigabyte. `rlhf-dist validate reward` prepares them as a run does, with `data.eval_fraction`: a
quarter of the file, all of it, and all of it again, which finds the tokens in the cache. Memory that grows with the data shows
as a difference between the first two.

Memory is looked at ten times a second, over all processes of a command: their proportional set size, and of it what is not
backed by a file (anonymous), because pages of memory-mapped token files count as used while there is room, and are given back
when there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import yaml
from curation_scale import sentences

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.tiny import save_tiny_lm

from rlhf_dist.quickstart.tokenizer import train_tokenizer

TEXT_PER_PAIR = 5_000
"""Characters of a pair, about: 200,000 make a gigabyte."""


def text(rng: np.random.Generator, pool: list[str], size: int) -> str:
    """Sentences of the pool, of `size` characters or a little more."""
    found: list[str] = []
    while sum(map(len, found)) < size:
        found.append(pool[int(rng.integers(len(pool)))])
    return " ".join(found)


def pairs(number: int, pool: list[str]) -> Iterator[dict[str, str]]:
    """HH-RLHF records."""
    rng = np.random.default_rng(0)
    turn = TEXT_PER_PAIR // 12
    for i in range(number):
        turns = [text(rng, pool, int(rng.integers(turn // 2, turn + turn // 2))) for _ in range(5)]
        turns[0] = f"{i}. {turns[0]}"
        names = ("\n\nHuman: ", "\n\nAssistant: ")
        dialogue = "".join(names[k % 2] + content for k, content in enumerate(turns))
        answers = [text(rng, pool, int(rng.integers(turn // 2, turn + turn // 2))) for _ in range(2)]
        yield {
            name: f"{dialogue}\n\nAssistant: {answer}"
            for name, answer in zip(("chosen", "rejected"), answers, strict=True)
        }


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, float, float, float]:
    """Run a command: (seconds by the clock, seconds of all cores, peak PSS in MB, peak of its anonymous part in MB)."""
    before, began = os.times(), time.monotonic()
    process = subprocess.Popen(command, env=environment)
    peak = anonymous = 0
    while process.poll() is None:
        total = without_files = 0
        try:
            root = psutil.Process(process.pid)
            for each in [root, *root.children(recursive=True)]:
                rollup = Path(f"/proc/{each.pid}/smaps_rollup").read_text()
                sizes = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
                total += sizes["Pss"] * 1024
                without_files += sizes["Pss_Anon"] * 1024
        except (psutil.Error, OSError):
            pass
        peak, anonymous = max(peak, total), max(anonymous, without_files)
        time.sleep(0.1)
    if process.returncode != 0:
        raise SystemExit(f"{command} ended with {process.returncode}")
    after = os.times()
    cores = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - began, cores, peak / 1e6, anonymous / 1e6


def main() -> None:
    """Make, validate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for some 10 GB of files; must not be there")
    parser.add_argument("--data", type=Path, required=True, help="folder of the real text")
    parser.add_argument("--records", type=int, default=200_000)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True)
    pool = [sentence for part in sentences(options.data).values() for sentence in part]
    # A token takes some four characters, as with people's tokenizers.
    tokenizer = train_tokenizer(pool[:20_000], vocab_size=8_000)
    model = save_tiny_lm(folder / "model", max_position_embeddings=8192, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(model)
    path = folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs(options.records, pool):
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
    size = path.stat().st_size
    print(f"{options.records:,} pairs, {size / 1e6:.0f} MB", flush=True)
    rows = []
    for what, limit in (("a quarter", options.records // 4), ("all", None), ("all, again", None)):
        config = {
            "run_dir": str(folder / "run"),
            "model": {"model_path": str(model)},
            "data": {
                "train": [{"path": str(path), "kind": "preference", "limit": limit}],
                "eval_fraction": 0.01,
                "max_length_tokens": 4096,
                "on_too_long": "truncate",
            },
        }
        (folder / "reward.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "rlhf_dist.cli.main", "validate", "reward", str(folder / "reward.yaml")]
        # The quarter's tokens are not those of the whole: each has a cache of its own.
        cache = str(folder / ("cache" if limit is None else "cache_of_a_quarter"))
        rows.append((what, *measured(command, os.environ | {"HF_DATASETS_CACHE": cache})))
    print("\n| | seconds | core seconds | peak memory, MB | of it anonymous, MB |\n|---|---|---|---|---|")
    for what, *figures in rows:
        print(f"| {what} | {' | '.join(f'{figure:.0f}' for figure in figures)} |")


if __name__ == "__main__":
    main()
