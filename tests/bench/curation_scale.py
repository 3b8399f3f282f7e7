"""How long a million instructions take to be mixed and de-duplicated, in how much memory, and what is found.

    python tests/bench/curation_scale.py FOLDER --data ../shared/data [--records 1000000]

Instructions are made of real text: one of the 175 instructions of `alpaca_seed_tasks.jsonl`, two to four sentences of reviews,
editorials and word problems as input, one to three as output. Copies are planted: as they are, with other case, spacing and
full-width letters, and with one to eight words replaced. Each planted copy knows its original, and the true Jaccard similarity
of the two is computed here from Python sets, so that what the commands find can be compared with it.

The commands run as they are, in processes of their own. Memory is the largest sum of the proportional set sizes of a command
and its processes, looked at ten times a second; files that are mapped or cached by the kernel for them count where mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

SHARES = {"reviews": 0.55, "editorials": 0.35, "problems": 0.15, "mixed": 0.10}
"""Sizes of the sources, as shares of the number of records of the mixture: some of each is skipped."""
PLANTED = {"same": 0.05, "respelt": 0.03, "edited": 0.07}
"""Share of a source's records that are copies of an earlier one of it."""
THRESHOLD = 0.8
FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}


def sentences(data: Path) -> dict[str, list[str]]:
    """Real text: source → its sentences."""
    found = {}
    for name, file in (("reviews", "movieReviewSnippets"), ("editorials", "nytEditorialSnippets")):
        lines = (data / f"{file}_GroundTruth.txt").read_text("utf-8", errors="replace").splitlines()
        found[name] = [line.split("\t")[-1].strip() for line in lines if line.count("\t") >= 2]
    problems = [json.loads(line) for line in (data / "gsm8k_train_1000.jsonl").open(encoding="utf-8")]
    found["problems"] = [f"{part}." for row in problems for part in row["question"].split(". ") if len(part) > 20]
    found["mixed"] = [sentence for part in found.values() for sentence in part[::3]]
    return found


def edited(text: str, rng: np.random.Generator, vocabulary: list[str]) -> str:
    """With one to eight words replaced."""
    words = text.split(" ")
    for place in rng.integers(0, len(words), int(rng.integers(1, 9))):
        words[place] = vocabulary[int(rng.integers(len(vocabulary)))]
    return " ".join(words)


def respelt(text: str, rng: np.random.Generator) -> str:
    """The same under NFKC, case folding and collapsed white space."""
    way = int(rng.integers(3))
    return text.upper() if way == 0 else text.replace(" ", " \n ") if way == 1 else text.translate(FULL_WIDTH)


def records(name: str, number: int, texts: list[str], instructions: list[str], seed: int) -> Iterator[dict[str, Any]]:
    """The records of a source, copies among them."""
    rng = np.random.default_rng([seed, *name.encode()])
    vocabulary = sorted({word for text in texts for word in text.split(" ")})
    kinds = rng.choice([*PLANTED, ""], size=number, p=[*PLANTED.values(), 1 - sum(PLANTED.values())])
    originals: list[dict[str, Any]] = []  # the latest that were not copied yet
    for i, kind in enumerate(kinds):
        if kind and originals:
            of = originals.pop(int(rng.integers(len(originals))))
            record = {field: of[field] for field in ("instruction", "input", "output")}
            if kind == "respelt":
                record = {field: respelt(text, rng) for field, text in record.items()}
            if kind == "edited":
                record["input"] = edited(record["input"], rng, vocabulary)
            yield {**record, "id": f"{name}-{i}", "planted": str(kind), "of": of["id"]}
            continue
        picked = [texts[k] for k in rng.integers(0, len(texts), int(rng.integers(3, 8)))]
        cut = 1 + len(picked) // 2
        record = {
            "instruction": instructions[int(rng.integers(len(instructions)))],
            "input": " ".join(picked[:cut]),
            "output": " ".join(picked[cut:]),
            "id": f"{name}-{i}",
        }
        if len(originals) < 20000:
            originals.append(record)
        else:
            originals[int(rng.integers(len(originals)))] = record
        yield record


def measured(command: list[str]) -> dict[str, float]:
    """Run a command; seconds by the clock and of all its cores, and its peak memory in MB."""
    before = os.times()
    began = time.monotonic()
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        total = 0
        try:
            root = psutil.Process(process.pid)
            for each in [root, *root.children(recursive=True)]:
                total += each.memory_full_info().pss
        except psutil.Error:
            pass
        peak = max(peak, total)
        time.sleep(0.1)
    if process.returncode != 0:
        raise SystemExit(f"{command} ended with {process.returncode}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": time.monotonic() - began, "cpu_seconds": cpu, "peak_mb": peak / 1e6}


def shingles(record: dict[str, Any]) -> set[str]:
    """Runs of five characters of what is compared."""
    plain = {field: unicodedata.normalize("NFKC", record[field]) for field in ("instruction", "input", "output")}
    fields = (re.sub("[\u00ad\u200b\ufeff]", "", text).casefold() for text in plain.values())
    text = "\0".join(("", *(" ".join(field.split()) for field in fields)))
    return {text[i : i + 5] for i in range(len(text) - 4)}


def similarity(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Jaccard."""
    one, other = shingles(a), shingles(b)
    return len(one & other) / len(one | other)


def check(folder: Path) -> None:
    """What was found of what was planted, and whether anything else was removed."""
    pairs, by_id = [], {}
    for line in (folder / "mix" / "records.jsonl").open(encoding="utf-8"):
        record = json.loads(line)
        if "of" in record:
            pairs.append(record)
    originals = {record["of"] for record in pairs}
    for line in (folder / "mix" / "records.jsonl").open(encoding="utf-8"):
        record = json.loads(line)
        if record["id"] in originals:
            by_id[record["id"]] = record
    removed, other = set(), []
    partners = {record["id"]: record["of"] for record in pairs}
    for line in (folder / "dedup" / "removed.jsonl").open(encoding="utf-8"):
        entry = json.loads(line)
        removed.add(entry["record"]["id"])
        first = entry.get("same_as_record")
        if first is not None:
            here, there = entry["record"]["id"], first["id"]
            true = similarity(entry["record"], first)
            if true < THRESHOLD or abs(true - entry["similarity"]) > 1e-3:
                raise SystemExit(
                    f"{here} was removed for {there}, at a true similarity of {true}: {entry['similarity']}"
                )
            if partners.get(here) != there and partners.get(there) != here:
                other.append((true, here, there))
    found: dict[str, Counter[bool]] = defaultdict(Counter)
    for record in pairs:
        original = by_id.get(record["of"])
        if original is None:
            continue
        band = record["planted"]
        if band == "edited":
            true = similarity(record, original)
            low = next((low for low in (0.95, 0.9, 0.85, 0.8, 0.7) if true >= low), 0.0)
            band = f"edited, similarity {low} and more" if low >= THRESHOLD else "edited, similarity below 0.8"
        found[band][record["id"] in removed or record["of"] in removed] += 1
    print("\n| planted | pairs in the mixture | of which one was removed | share |\n|---|---|---|---|")
    for band, counts in sorted(found.items()):
        total = counts[True] + counts[False]
        print(f"| {band} | {total:,} | {counts[True]:,} | {counts[True] / total:.4%} |")
    print(f"\nnear-duplicates that were not planted as such: {len(other)}; e.g. {other[:5]}")


def main() -> None:
    """Make, mix, de-duplicate, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for some 4 GB of files; must not be there")
    parser.add_argument("--data", type=Path, required=True, help="folder of the real text")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True)
    texts = sentences(options.data)
    seeds = [json.loads(line) for line in (options.data / "alpaca_seed_tasks.jsonl").open(encoding="utf-8")]
    sources = []
    for name, share in SHARES.items():
        path = folder / f"{name}.jsonl"
        number = round(share * options.records)
        with path.open("w", encoding="utf-8") as file:
            for record in records(name, number, texts[name], [seed["instruction"] for seed in seeds], seed=0):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        sources.append({"path": str(path), "kind": "instruction"})
        print(f"{name}: {number:,} records, {path.stat().st_size / 1e6:.0f} MB", flush=True)
    mixing = {"method": "proportional", "cap": options.records // 2, "num_records": options.records}
    mix = {"out_dir": str(folder / "mix"), "sources": sources, "mixing": mixing}
    dedup = {
        "out_dir": str(folder / "dedup"),
        "sources": [{"path": str(folder / "mix" / "records.jsonl"), "kind": "instruction"}],
        "num_processes": options.processes,
    }
    times = {}
    for action, config in (("mix", mix), ("dedup", dedup)):
        (folder / f"{action}.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "rlhf_dist.cli.main", "data", action, str(folder / f"{action}.yaml")]
        times[action] = measured(command)
    print("\n| step | seconds | core seconds | peak memory, MB |\n|---|---|---|---|")
    for action, result in times.items():
        print(f"| {action} | {result['seconds']:.0f} | {result['cpu_seconds']:.0f} | {result['peak_mb']:.0f} |")
    print((folder / "dedup" / "report.json").read_text())
    check(folder)


if __name__ == "__main__":
    main()
