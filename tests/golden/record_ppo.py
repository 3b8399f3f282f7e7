"""The recorder of `trl_ppo.json`; `record.py` describes it."""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from record_common import PAD, SIZES, TRAINING, language_model, prompts, save, score_model, tokenizer
from transformers import set_seed

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
        # The means that TRL reports, out of the tables that it keeps them in.
        place = (found["ppo_epoch_idx"], found["minibatch_idx"], found["gradient_accumulation_idx"])
        record |= {name: found[f"{name}_stats"][place].clone() for name in ("entropy", "ratio")}
        record["is_optimizer_step"] = bool(found["accelerator"].sync_gradients)
        if not self.micro_batches:
            record["logits"] = self._logits
        self.micro_batches.append(record)


def ppo_run(**settings: Any) -> dict[str, Any]:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # pyright: ignore[reportMissingImports]

    batch_size = 16
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            total_episodes=batch_size,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            num_mini_batches=2,
            local_rollout_forward_batch_size=batch_size,
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
        policy.generation_config.pad_token_id = PAD
        # Twice what is drawn: on the last batch of its data loader, accelerate steps the optimizer after every micro-batch.
        data = Dataset.from_dict({"input_ids": prompts(2 * batch_size, seed=5)})
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
        learning_rate=0.03,
    )
    del k3["models"]
    save("trl_ppo.json", {"runs": {"k1": k1, "k3_whitened": k3}})
