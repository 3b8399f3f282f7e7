"""How much padding `group_by_length` saves: padding of real records' forward passes, steps drawn at random and by length.

    python tests/bench/length_groups.py MODEL_DIR DATA_DIR

MODEL_DIR gives the tokenizer; DATA_DIR holds gsm8k_train_1000.jsonl and alpaca_seed_tasks.jsonl. Nothing is computed but the
split of steps into forward passes, which is the trainer's own, over three epochs.
"""

from __future__ import annotations

import sys

import numpy as np

from rlhf_dist.config.data import SFTData
from rlhf_dist.data.loading import load_sft
from rlhf_dist.data.sampler import EpochSampler, LengthGroupedSampler, Sampler
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.distributed.partition import MicroBatching, partition

EPOCHS, SEED, BUDGET = 3, 0, 2048
LAYOUTS = [
    # Records a step, ranks, and what a forward pass may hold.
    (8, 8, MicroBatching(1)),
    (8, 1, MicroBatching(8)),
    (32, 1, MicroBatching(8)),
    (32, 1, MicroBatching(32)),
    (32, 4, MicroBatching(8)),
    (64, 8, MicroBatching(8)),
    (32, 1, MicroBatching(1, BUDGET)),
    (32, 4, MicroBatching(1, BUDGET)),
]


def costs(sampler: Sampler, lengths: np.ndarray, batch_size: int, ranks: int, limit: MicroBatching) -> tuple[int, ...]:
    """Tokens; cells of all forward passes, padding included; cells of the rank that has most of them, over all steps."""
    tokens = cells = slowest = 0
    for step in range(EPOCHS * len(lengths) // batch_size):
        chosen = lengths[sampler.indices(step * batch_size, batch_size).numpy()]
        shares = partition(chosen.tolist(), ranks, limit)
        of_rank = [sum(len(rows) * int(chosen[rows].max()) for rows in share if rows) for share in shares]
        tokens, cells, slowest = tokens + int(chosen.sum()), cells + sum(of_rank), slowest + max(of_rank)
    return tokens, cells, slowest


def main(model_dir: str, data_dir: str) -> None:
    tokenizer = load_tokenizer(model_dir)
    gsm8k = {"path": f"{data_dir}/gsm8k_train_1000.jsonl", "fields": {"instruction": "question", "output": "answer"}}
    alpaca = {
        "path": f"{data_dir}/alpaca_seed_tasks.jsonl",
        "fields": {"input": "instances.0.input", "output": "instances.0.output"},
    }
    train = [source | {"kind": "instruction"} for source in (gsm8k, alpaca)]
    lengths = load_sft(
        SFTData.model_validate({"train": train, "max_length_tokens": BUDGET}), tokenizer, SEED
    ).train.lengths
    print(
        f"{len(lengths)} records of {lengths.min()} to {lengths.max()} tokens: mean {lengths.mean():.0f}, "
        f"median {np.median(lengths):.0f}, 90% up to {np.quantile(lengths, 0.9):.0f}\n"
    )
    print(
        "| records a step | ranks | forward pass | padding, at random | by length | cells saved | slowest rank saved |"
    )
    print("|---|---|---|---|---|---|---|")
    for batch_size, ranks, limit in LAYOUTS:
        drawn = EpochSampler(len(lengths), SEED, "order")
        grouped = LengthGroupedSampler(drawn, lengths, batch_size, SEED, "order/by length")
        before, after = [costs(sampler, lengths, batch_size, ranks, limit) for sampler in (drawn, grouped)]
        holds = f"{limit.size} record{'s' * (limit.size > 1)}" if limit.tokens is None else f"{limit.tokens} tokens"
        shares = [f"{1 - tokens / cells:.1%}" for tokens, cells, _ in (before, after)]
        saved = [f"{1 - after[k] / before[k]:.1%}" for k in (1, 2)]
        print(f"| {batch_size} | {ranks} | {holds} | {' | '.join(shares)} | {' | '.join(saved)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
