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

`trl_ppo.json`: two runs, "k1" and "k3_whitened", of one `train()` iteration each (16 prompts, 2 mini-batches of 2 micro-batches,
    several epochs). For each:
    `config`: kl_coef, kl_estimator, gamma, lam, cliprange, cliprange_value, whiten_rewards, temperature and so on.
    `rollout`: `responses` [B, R] (pad after the EOS), `sequence_lengths` [B], which in TRL is the *index* of the last response
        token; `padding_mask` and `padding_mask_p1` [B, R], True = padding, the second with one more position kept; `logprobs`,
        `ref_logprobs`, `values`, `kl` [B, R]; `scores_raw` [B] and `scores` [B], before and after the missing-EOS penalty;
        `contains_eos` [B]; `rewards_unwhitened`, `rewards`; `advantages_unwhitened`, `returns`, `advantages` [B, R].
    `micro_batches`: in order, `epoch`, `mini_batch`, `rows` (of the rollout), `logprobs` and `values` [b, R] (new), `pg_loss`,
        `vf_loss`, `pg_clipfrac`, `vf_clipfrac`, `approxkl`, `entropy`, `ratio` (means as TRL reports them),
        `is_optimizer_step`; the first also `logits` [b, R, V], before TRL divides them by the temperature.
    `whitening`: calls of `masked_whiten`: `values`, `mask`, `shift_mean`, `output`.
    `models`: (run "k1") sizes, `queries` [B, T_prompt] (left-padded) and the weights of policy, reference, reward and value model
        as they were when the rollout was scored.
`trl_reward.json`: `cases`, each one `compute_loss` of a training step: `chosen`, `rejected` [P] scores, `margins` [P] or null,
    `centering_coef` or null, `loss`, and the `accuracy` and `margin` that the trainer reports.
`trl_sft.json`: `steps`, each an optimiser step of `micro_batches`: `labels` [b, T] (−100: ignored), `attention_mask`, `logits`
    [b, T, V] of the unmodified model, `logprobs` [b, T − 1] as TRL's fused head gives them (0 where ignored), `num_items` that
    TRL divides by, `loss`, and the reported mean `entropy`.

Floats are the shortest decimals that read back as the same fp32 number.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

HERE = Path(__file__).resolve().parent
PAD, EOS, VOCAB_SIZE = 0, 1, 12
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
TRAINING = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCAB_SIZE)}
    core = Tokenizer(models.WordLevel(words, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="w2", padding_side="left"
    )


def language_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def score_model(seed: int) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))


def prompts(num: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB_SIZE, size=rng.integers(2, 6)).tolist() for _ in range(num)]


def plain(value: Any) -> Any:
    """Tensors as lists; fp32 numbers as the shortest decimals that read back the same."""
    if isinstance(value, torch.Tensor):
        value = value.detach().float().numpy() if value.is_floating_point() else value.numpy()
    if isinstance(value, np.ndarray):
        return [plain(v) for v in value] if value.ndim else plain(value[()])
    if isinstance(value, np.floating):
        return float(str(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def save(name: str, content: dict[str, Any]) -> None:
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    path = HERE / name
    path.write_text(json.dumps({"versions": versions} | plain(content), separators=(",", ":")) + "\n")
    print(f"{path.name}: {path.stat().st_size} bytes")


# ---------------------------------------------------------------------------------------------------------------- PPO

SNAPSHOTS: dict[str, dict[str, str]] = {
    # The first line of `PPOTrainer.train` with this text → {local variable: name in the fixture}, copied before it runs.
    "contain_eos_token = ": {"scores": "scores_raw", "queries": "queries"},
    "if args.whiten_rewards:": {
        "rewards": "rewards_unwhitened",
        "scores": "scores",
        "contain_eos_token": "contains_eos",
        "responses": "responses",
        "sequence_lengths": "sequence_lengths",
        "padding_mask": "padding_mask",
        "padding_mask_p1": "padding_mask_p1",
        "logprobs": "logprobs",
        "ref_logprobs": "ref_logprobs",
        "values": "values",
        "kl": "kl",
    },
    "lastgaelam = 0": {"rewards": "rewards"},
    "returns = advantages + values": {"advantages": "advantages_unwhitened"},
    "advantages = masked_whiten(": {"returns": "returns"},
    "for ppo_epoch_idx in": {"advantages": "advantages"},
}
BEFORE_TEMPERATURE = "logits /= args.temperature"
AFTER_MICRO_BATCH = "gradient_accumulation_idx += 1"
MICRO_BATCH = {
    "ppo_epoch_idx": "epoch",
    "minibatch_idx": "mini_batch",
    "micro_batch_inds": "rows",
    "new_logprobs": "logprobs",
    "vpred": "values",
    "pg_loss": "pg_loss",
    "vf_loss": "vf_loss",
    "pg_clipfrac": "pg_clipfrac",
    "vf_clipfrac": "vf_clipfrac",
    "approxkl": "approxkl",
}


def copied(frame_locals: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    values = {new: frame_locals[old] for old, new in names.items()}
    return {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()}


class Watch:
    """A trace function for `PPOTrainer.train`: copies local variables, changes nothing."""

    def __init__(self, train: Callable[..., Any]) -> None:
        self.rollout: dict[str, Any] = {}
        self.micro_batches: list[dict[str, Any]] = []
        self._logits: torch.Tensor | None = None
        self._code = train.__code__
        lines, first = inspect.getsourcelines(train)

        def line_of(text: str) -> int:
            return next(first + i for i, line in enumerate(lines) if line.strip().startswith(text))

        self._snapshots = {line_of(text): names for text, names in SNAPSHOTS.items()}
        self._before_temperature, self._after = line_of(BEFORE_TEMPERATURE), line_of(AFTER_MICRO_BATCH)

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if frame.f_code is self._code else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event != "line":
            return self._line
        if frame.f_lineno in self._snapshots:
            for name, value in copied(frame.f_locals, self._snapshots[frame.f_lineno]).items():
                self.rollout.setdefault(name, value)
        elif frame.f_lineno == self._before_temperature and not self.micro_batches:
            self._logits = frame.f_locals["logits"].detach().clone()  # divided in place by the next line
        elif frame.f_lineno == self._after:
            self._micro_batch(frame.f_locals)
        return self._line

    def _micro_batch(self, found: dict[str, Any]) -> None:
        record = copied(found, MICRO_BATCH)
        record |= {"entropy": found["entropy"].mean(), "ratio": found["ratio"].mean()}
        record["is_optimizer_step"] = bool(found["accelerator"].sync_gradients)
        if not self.micro_batches:
            record["logits"] = self._logits
        self.micro_batches.append(record)


def ppo_run(**settings: Any) -> dict[str, Any]:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    num = 16
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            total_episodes=num,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            num_mini_batches=2,
            local_rollout_forward_batch_size=num,
            response_length=8,
            stop_token="eos",
            num_sample_generations=0,
            seed=3,
            **TRAINING,
            **settings,
        )
        policy, reference, reward, value = language_model(0), language_model(0), score_model(2), score_model(3)
        torch.manual_seed(4)
        with torch.no_grad():
            # Near the policy, but not it: a KL that is neither 0 nor enormous.
            for parameter in reference.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            # EOS is drawn early in some rows, late or never in others.
            for module in (policy, reference):
                module.generation_config.pad_token_id = PAD
        data = Dataset.from_dict({"input_ids": prompts(num, seed=5)})
        models_ = {"policy": policy, "reference": reference, "reward": reward, "value": value}
        weights = {k: {n: p.clone() for n, p in m.state_dict().items()} for k, m in models_.items()}
        trainer = PPOTrainer(
            config, tokenizer(), policy, reference, reward, data, value, eval_dataset=data.select(range(8))
        )
        calls, whiten = [], ppo_trainer.masked_whiten

        def recording_whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
            output = whiten(values, mask, shift_mean)
            calls.append({"values": values.clone(), "mask": mask, "shift_mean": shift_mean, "output": output.clone()})
            return output

        ppo_trainer.masked_whiten = recording_whiten
        set_seed(6)
        watch = Watch(PPOTrainer.train)
        sys.settrace(watch)
        try:
            trainer.train()
        finally:
            sys.settrace(None)
            ppo_trainer.masked_whiten = whiten
    names = [
        *("kl_coef", "kl_estimator", "gamma", "lam", "cliprange", "cliprange_value", "whiten_rewards", "temperature"),
        *("missing_eos_penalty", "num_ppo_epochs", "num_mini_batches", "gradient_accumulation_steps", "learning_rate"),
        *("per_device_train_batch_size", "vf_coef"),
    ]
    queries = watch.rollout.pop("queries")
    return {
        "config": {name: getattr(config, name) for name in names},
        "rollout": watch.rollout,
        "micro_batches": watch.micro_batches,
        "whitening": calls,
        "models": {"config": SIZES, "queries": queries, "weights": weights},
    }


def record_ppo() -> None:
    k1 = ppo_run(
        kl_estimator="k1",
        kl_coef=0.05,
        gamma=1.0,
        lam=0.95,
        temperature=0.7,
        missing_eos_penalty=1.0,
        num_ppo_epochs=3,
        learning_rate=0.02,
    )
    k3 = ppo_run(
        kl_estimator="k3",
        kl_coef=0.2,
        gamma=0.97,
        lam=0.9,
        temperature=1.3,
        whiten_rewards=True,
        num_ppo_epochs=2,
        cliprange=0.1,
        cliprange_value=0.1,
        learning_rate=0.05,
    )
    del k3["models"]
    save("trl_ppo.json", {"runs": {"k1": k1, "k3_whitened": k3}})


# ------------------------------------------------------------------------------------------------- reward model and SFT


def reward_cases(centering_coef: float | None, with_margins: bool) -> list[dict[str, Any]]:
    from trl import RewardConfig, RewardTrainer

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
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": p + c + [EOS], "completion_mask": [0] * len(p) + [1] * (len(c) + 1)}
        for p, c in zip(prompts(12, seed=10), prompts(12, seed=11), strict=True)
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
