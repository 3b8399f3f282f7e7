"""Records the golden fixtures: numbers out of real training steps of TRL, as JSON beside this file.

The environment, apart from the project's own (TRL is no dependency of the project or of its tests):

    python -m venv golden-env
    golden-env/bin/pip install torch transformers==5.19.0 accelerate datasets pandas
    golden-env/bin/pip install --no-deps trl==1.12.0        # for `ppo`: the last release with PPO
    golden-env/bin/python tests/golden/record.py ppo
    golden-env/bin/pip install --no-deps trl==1.16.0        # for `reward` and `sft`: the newest when these were recorded
    golden-env/bin/python tests/golden/record.py reward sft

Every fixture names the versions that made it. It needs no network, no accelerator and a few seconds. Recording again with other
versions of torch changes last digits and perhaps sampled tokens; the tests read all they need from the files.

How the numbers are captured: no line of TRL is re-implemented or edited here. `ppo` watches the local variables of
`PPOTrainer.train` with a trace function and copies them just before chosen lines run (`SNAPSHOTS`); `reward` and `sft` wrap
`compute_loss` and hook the model's forward pass. Models are random Llamas of one layer and width 8, fp32, on the CPU.

What the fixtures mean (B sequences, R response positions, V vocabulary entries; lists of lists, row first):

`trl_ppo.json`: two runs, "k1" and "k3_whitened", of one `train()` iteration each (16 prompts, 2 mini-batches of 2
    micro-batches, several epochs). For each:
    `config`: kl_coef, kl_estimator, gamma, lam, cliprange, cliprange_value, whiten_rewards, temperature and so on.
    `rollout`: `responses` [B, R] (pad after the EOS), `sequence_lengths` [B], which in TRL is the *index* of the last response
        token; `padding_mask` and `padding_mask_p1` [B, R], True = padding, the second with one more position kept; `logprobs`,
        `ref_logprobs`, `values`, `kl` [B, R]; `scores_raw` [B] and `scores` [B], before and after the missing-EOS penalty;
        `contains_eos` [B]; `rewards_unwhitened`, `rewards`; `advantages_unwhitened`, `returns`, `advantages` [B, R].
    `micro_batches`: in order, `epoch`, `mini_batch`, `rows` (of the rollout), `logprobs` and `values` [b, R] (new), `pg_loss`,
        `vf_loss`, `pg_clipfrac`, `vf_clipfrac`, `approxkl`, `entropy`, `ratio` (means as TRL reports them),
        `is_optimizer_step`; the first also `logits` [b, R, V], before TRL divides them by the temperature.
    `whitening`: calls of `masked_whiten`: `values`, `mask`, `shift_mean`, `output`.
    `models`: (run "k1") sizes, `queries` [B, T_prompt] (left-padded) and the weights of policy, reference, reward and value
        model as they were when the rollout was scored.
`trl_reward.json`: `cases`, each one `compute_loss` of a training step: `chosen`, `rejected` [P] scores, `margins` [P] or null,
    `centering_coef` or null, `loss`, and the `accuracy` and `margin` that the trainer reports.
`trl_sft.json`: `steps`, each an optimizer step of `micro_batches`: `labels` [b, T] (−100: ignored), `attention_mask`, `logits`
    [b, T, V] of the unmodified model, `logprobs` [b, T − 1] as TRL's fused head gives them (0 where ignored), `num_items` that
    TRL divides by, `loss`, and the reported mean `entropy`.

Floats are the shortest decimals that read back as the same fp32 number.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from record_common import EOS, TRAINING, language_model, prompts, save, score_model, tokenizer
from record_ppo import record_ppo


def reward_cases(centering_coef: float | None, with_margins: bool) -> list[dict[str, Any]]:
    from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportMissingImports]

    data = {"chosen_ids": prompts(10, seed=7), "rejected_ids": prompts(10, seed=8)}
    if with_margins:
        data["margin"] = np.linspace(-0.5, 2.0, 10).round(2).tolist()
    model, cases = score_model(9), []
    model.register_forward_hook(lambda module, args, output: scores.append(output.logits.detach().clone().squeeze(-1)))
    scores: list[torch.Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        config = RewardConfig(
            output_dir=folder,
            center_rewards_coefficient=centering_coef,
            per_device_train_batch_size=5,
            max_steps=2,
            learning_rate=0.02,
            logging_steps=100,
            **TRAINING,
        )
        trainer = RewardTrainer(model, config, train_dataset=Dataset.from_dict(data), processing_class=tokenizer())
        compute_loss = trainer.compute_loss

        def recording_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            margins = inputs.get("margin")
            result = compute_loss(model, inputs, *args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            chosen, rejected = scores[-1].chunk(2)
            metrics = {k: trainer._metrics["train"][k][-1] for k in ("accuracy", "margin")}
            case = {"chosen": chosen, "rejected": rejected, "margins": margins, "centering_coef": centering_coef}
            cases.append(case | {"loss": loss.detach().clone()} | metrics)
            return result

        trainer.compute_loss = recording_loss
        trainer.train()
    return cases


def record_reward() -> None:
    cases = [case for coef in (None, 0.01, 0.5) for margins in (False, True) for case in reward_cases(coef, margins)]
    save("trl_reward.json", {"cases": cases})


def record_sft() -> None:
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    rows = [
        {"input_ids": p + c + [EOS], "completion_mask": [0] * len(p) + [1] * (len(c) + 1)}
        for p, c in zip(prompts(12, seed=10), prompts(12, seed=14), strict=True)
    ]
    model, outputs, micro_batches = language_model(12), [], []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            max_steps=2,
            learning_rate=0.02,
            logging_steps=100,
            completion_only_loss=True,
            **TRAINING,
        )
        trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())
        compute_loss = trainer.compute_loss

        def recording_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            kept = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
            with torch.no_grad():
                logits = model(input_ids=kept["input_ids"], attention_mask=kept["attention_mask"]).logits.clone()
            outputs.clear()
            loss = compute_loss(model, inputs, *args, **kwargs)
            record = {
                "labels": kept["labels"],
                "attention_mask": kept["attention_mask"],
                "logits": logits,
                "logprobs": outputs[-1].log_probs.detach().clone(),
                "num_items": kwargs["num_items_in_batch"],
                "loss": loss.detach().clone(),
                "entropy": trainer._metrics["train"]["entropy"][-1],
            }
            micro_batches.append(record)
            return loss

        trainer.compute_loss = recording_loss
        trainer.train()
    steps = [{"micro_batches": micro_batches[i : i + 2]} for i in range(0, len(micro_batches), 2)]
    save("trl_sft.json", {"steps": steps})


RECORDERS = {"ppo": record_ppo, "reward": record_reward, "sft": record_sft}

if __name__ == "__main__":
    if not sys.argv[1:] or not set(sys.argv[1:]) <= set(RECORDERS):
        sys.exit(f"usage: record.py {{{','.join(RECORDERS)}}} ...")
    torch.set_num_threads(1)
    for command in sys.argv[1:]:
        RECORDERS[command]()
