"""How far log-probs of the same tokens under the same weights are apart: what the tolerances of ppo/selfchecks.py rest on.

    python tests/bench/logprob_rounding.py MODEL_DIR [bf16|fp32]

Prints, for two temperatures, the mean over tokens of min(|ρ − 1|, 1) and the share of tokens with |ρ − 1| > 0.2, between one
padded pass over all responses and other ways to the same numbers; and, last, what two mistakes give.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.tiny import hosted
from torch import Tensor
from transformers import AutoTokenizer

from rlhf_dist.config.hosting import FrozenModel
from rlhf_dist.core.batches import PromptBatch, RolloutBatch, pad_rows
from rlhf_dist.distributed.role_groups import ReferenceRole
from rlhf_dist.distributed.rollout_engines import RolloutRole
from rlhf_dist.distributed.workers.reference import ReferenceWorker
from rlhf_dist.distributed.workers.rollout import RolloutWorker
from rlhf_dist.rollout.config import RolloutConfig

PROMPTS = ["Tell me a joke about cats.", "What is the capital of France?", "List three fruits, and why.", "Say hi."] * 4


def logprobs(path: str, precision: Any, rollout: RolloutBatch, temperature: float, size: int, packed: bool) -> Tensor:
    config = FrozenModel(model_path=path, precision=precision, packed=packed)
    with hosted(ReferenceWorker, config=config, temperature=temperature) as group:
        return ReferenceRole(group, size).logprobs(rollout).result()


def main(path: str, precision: Any = "bf16") -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
    prompts = PromptBatch(pad_rows(ids), torch.tensor([len(row) for row in ids]), torch.arange(len(ids)))
    for temperature in (1.0, 0.8):
        config = RolloutConfig(max_response_tokens=24, temperature=temperature)
        with hosted(RolloutWorker, config=config, model_path=path, precision=precision) as group:
            rollout = RolloutRole(group, 64).generate(prompts, stream="rollout", iteration=0).result()
        mask = rollout.response_mask
        base = logprobs(path, precision, rollout, temperature, 64, packed=False)
        others = {
            "one response a pass": logprobs(path, precision, rollout, temperature, 1, packed=False),
            "packed": logprobs(path, precision, rollout, temperature, 64, packed=True),
            "decoded with a KV cache": rollout.rollout_logprobs,
            "mistake: shifted by a token": torch.roll(base, 1, dims=1),
        }
        if temperature != 1:
            others["mistake: temperature missing"] = logprobs(path, precision, rollout, 1.0, 64, packed=False)
        for name, other in others.items():
            off = ((other - base).exp() - 1).abs()[mask].clamp(max=1)
            share = float((off > 0.2).float().mean())
            print(
                f"| {precision} | {temperature} | {name} | {float(off.mean()):.2g} | {share:.2g} | {int(mask.sum())} |"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
