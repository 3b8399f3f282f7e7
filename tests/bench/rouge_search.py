"""Time to keep N instructions, each compared by ROUGE-L with all before it: by the index, and by brute force.

python tests/bench/rouge_search.py DATA_DIR [N ...]

Prints lines of the table in README.md.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist

from rlhf_dist.curation.rouge import SimilarityIndex, rouge_tokens

THRESHOLD = 0.7


def main() -> None:
    """Measure and print."""
    data, sizes = Path(sys.argv[1]), [int(n) for n in sys.argv[2:]] or [5000, 50000]
    print("| texts | offered | kept | rejected | index, s | compared, of all pairs | brute force, s |")
    print("|---|---|---|---|---|---|---|")
    for name, pool in (("varied", varied(data)), ("formulaic", formulaic(data))):
        for size in sizes:
            print(f"| {name} | " + line(pool, size), flush=True)


def line(pool: list[list[str]], size: int) -> str:
    """One size of one kind of texts."""
    texts = perturbed(pool, size)
    index, kept = SimilarityIndex(THRESHOLD), []
    start = time.perf_counter()
    for text in texts:
        if index.nearest(text) is None:
            index.add(text)
            kept.append(text)
    took = time.perf_counter() - start
    share = index.num_compared / max(1, len(texts) * len(kept) / 2)
    return f"{size} | {len(kept)} | {size - len(kept)} | {took:.1f} | {share:.2%} | {brute_force(texts, kept):.0f} |"


def brute_force(texts: list[list[str]], kept: list[list[str]]) -> float:
    """Seconds for every text against all that were kept before it (on average half of them), as strings of one character a
    token, the fastest form."""
    ids: dict[str, int] = {}
    coded = ["".join(chr(ids.setdefault(t, len(ids) + 256)) for t in text) for text in kept]
    probe = texts[:: max(1, len(texts) // 200)]
    asked = ["".join(chr(ids.setdefault(t, len(ids) + 256)) for t in text) for text in probe]
    start = time.perf_counter()
    for text in asked:
        cdist([text], coded, scorer=Indel.normalized_similarity, score_cutoff=THRESHOLD)
    return (time.perf_counter() - start) / len(probe) * len(texts) / 2


def varied(data: Path) -> list[list[str]]:
    """Windows of real sentences."""
    draw, pool = random.Random(0), []
    for name in ("movieReviewSnippets_GroundTruth.txt", "nytEditorialSnippets_GroundTruth.txt"):
        for row in (data / name).read_text(encoding="utf-8").splitlines():
            tokens = rouge_tokens(row.split("\t")[-1])[:40]
            if len(tokens) >= 6:
                pool.append(tokens)
    draw.shuffle(pool)
    return pool


def formulaic(data: Path) -> list[list[str]]:
    """The seed instructions."""
    rows = (data / "alpaca_seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()
    return [rouge_tokens(json.loads(row)["instruction"])[:40] for row in rows]


def perturbed(pool: list[list[str]], size: int) -> list[list[str]]:
    """`size` texts: the pool's, then copies with words replaced by words as frequent as they are in the pool."""
    draw = random.Random(1)
    words = [token for text in pool for token in text]
    out = []
    for number in range(size):
        text = pool[number % len(pool)]
        rate = 0.0 if number < len(pool) else draw.random() * 0.5
        out.append([draw.choice(words) if draw.random() < rate else token for token in text])
    draw.shuffle(out)
    return out


if __name__ == "__main__":
    main()
