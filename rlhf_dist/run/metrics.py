"""The one table of metric names.

A name means one thing, in one unit, in every run. One that is not here warns; tests make the warning an error.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable
from typing import NamedTuple

from rlhf_dist.core.errors import ConfigError


class Metric(NamedTuple):
    """What a number is."""

    unit: str
    """"" for a number without a unit; a fraction is between 0 and 1."""
    meaning: str


METRICS: dict[str, Metric] = {
    "train/learning_rate": Metric("", "learning rate of the step's update"),
    "train/grad_norm": Metric("", "global gradient norm before clipping"),
    # Supervised fine-tuning
    "sft/loss": Metric("nats/token", "mean negative log-likelihood of the step's target tokens, before its update"),
    "sft/eval_loss": Metric("nats/token", "mean negative log-likelihood of all held-out target tokens, the text apart"),
    "sft/pretraining_loss": Metric(
        "nats/token",
        "mean negative log-likelihood of the step's plain text, before it is weighted with sft.pretraining_coef",
    ),
    "sft/eval_pretraining_loss": Metric("nats/token", "mean negative log-likelihood of the held-out plain text"),
    # Reward model
    "reward_model/loss": Metric(
        "nats", "mean loss of the step's prompts, margins and centering included; a prompt's is the mean over its pairs"
    ),
    "reward_model/accuracy": Metric(
        "fraction", "pairs of the step whose better response scores higher; a prompt counts 1"
    ),
    "reward_model/margin": Metric("score", "mean of score better - score worse of the step's pairs; a prompt counts 1"),
    "reward_model/eval_low_margin_accuracy": Metric(
        "fraction", "eval_accuracy of the held-out low-margin pairs (reward.low_margin) alone"
    ),
    "reward_model/eval_other_accuracy": Metric(
        "fraction", "eval_accuracy of the other held-out pairs alone, where reward.low_margin is set"
    ),
    "reward_model/eval_loss": Metric(
        "nats", "mean of -log sigmoid(score better - score worse) of the held-out pairs; a prompt counts 1"
    ),
    "reward_model/eval_accuracy": Metric(
        "fraction", "held-out pairs whose better response scores higher, equal scores by half; a prompt counts 1"
    ),
    "reward_model/eval_margin": Metric(
        "score", "mean of score better - score worse of the held-out pairs; a prompt counts 1"
    ),
    # PPO: policy
    "policy/loss": Metric("", "clipped policy objective, negated; mean over response tokens and optimizer steps"),
    "policy/approx_kl": Metric("nats/token", "KL(old policy, new policy) during the update, estimated on its tokens"),
    "policy/clip_fraction": Metric(
        "fraction", "response tokens outside the clip range for which the clipped branch is the larger loss"
    ),
    "policy/ratio_mean": Metric("", "mean probability ratio new / old policy over response tokens"),
    "policy/entropy": Metric("nats/token", "entropy of the policy at the response tokens"),
    "policy/grad_norm": Metric("", "global gradient norm before clipping, mean over optimizer steps"),
    "policy/num_updates": Metric(
        "steps", "optimizer steps of the policy in the iteration; fewer than planned after a ppo.early_stop_kl"
    ),
    "policy/early_stop_kl": Metric(
        "nats/token", "policy/approx_kl of the mini-batch at which ppo.early_stop_kl ended the update"
    ),
    "policy/dual_clip_fraction": Metric("fraction", "response tokens whose loss ppo.dual_clip bounds"),
    "policy/kl_loss": Metric(
        "nats/token", "KL to the reference as a term of the loss, before it is weighted with kl/coef"
    ),
    "policy/ptx_grad_ratio": Metric(
        "",
        "gradient norm of the weighted PTX term / that of the PPO loss, in the first optimizer step of some iterations",
    ),
    "policy/ptx_loss": Metric("nats/token", "pretraining-mix loss before it is weighted with ppo.ptx_coef"),
    "policy/learning_rate": Metric("", "learning rate of the policy's last optimizer step"),
    # PPO: value function
    "value/loss": Metric("score^2", "clipped squared error of the values; mean over response tokens and steps"),
    "value/clip_fraction": Metric(
        "fraction", "response tokens outside the value clip range for which the clipped branch is the larger loss"
    ),
    "value/explained_variance": Metric("", "1 - Var(return - value) / Var(return) over response tokens; 1 is perfect"),
    "value/grad_norm": Metric("", "global gradient norm before clipping, mean over optimizer steps"),
    "value/learning_rate": Metric("", "learning rate of the value function's last optimizer step"),
    # PPO: reward, KL
    "reward/score_mean": Metric("score", "mean reward-model score of the iteration's responses"),
    "reward/score_std": Metric("score", "standard deviation of the scores over the iteration's responses"),
    "reward/shaped_mean": Metric(
        "score", "mean score as it enters the rewards: normalized, clipped, less the penalties"
    ),
    "reward/total_mean": Metric("score", "mean sum of token rewards of a response: score and KL penalty"),
    "kl/ref_mean": Metric("nats/response", "mean over responses of log policy - log reference, summed over tokens"),
    "kl/ref_per_token": Metric("nats/token", "mean over response tokens of log policy - log reference"),
    "kl/coef": Metric("score/nat", "weight of the KL penalty in this iteration"),
    # PPO: rollouts
    "rollout/response_length_mean": Metric("tokens", "mean response length, EOS included"),
    "rollout/eos_fraction": Metric("fraction", "responses that end in EOS"),
    "rollout/truncated_fraction": Metric("fraction", "responses cut off at the length limit"),
    "rollout/logprob_mismatch": Metric(
        "nats",
        "largest |log-prob at sampling - old log-prob| over response tokens; with the same weights, kernels and distribution 0 "
        "but for rounding",
    ),
    "rollout/staleness": Metric(
        "iterations", "updates of the policy between the weights that generated and those that learn"
    ),
    "rollout/importance_ess": Metric(
        "fraction", "effective sample size of the importance weights of response tokens / number of these tokens"
    ),
    "rollout/importance_truncated_fraction": Metric(
        "fraction", "response tokens whose importance weight is ppo.importance_cap, being larger"
    ),
    "rollout/importance_masked_fraction": Metric(
        "fraction", "responses that ppo.importance_range keeps out of the policy's loss"
    ),
    "kl/rollout_per_token": Metric(
        "nats/token", "KL(distribution sampled from, old policy), estimated on response tokens (k3)"
    ),
    # Evaluation
    "eval/score_mean": Metric("score", "mean reward-model score of responses to held-out prompts"),
    "eval/score_sem": Metric("score", "standard error of eval/score_mean over the held-out prompts"),
    "eval/kl_ref_mean": Metric("nats/response", "kl/ref_mean over responses to held-out prompts"),
    "eval/kl_ref_sem": Metric("nats/response", "standard error of eval/kl_ref_mean over the held-out prompts"),
    "eval/num_prompts": Metric("prompts", "held-out prompts that were generated from"),
    "eval/response_length_sem": Metric("tokens", "standard error of eval/response_length_mean"),
    "eval/response_length_mean": Metric("tokens", "mean length of responses to held-out prompts, EOS included"),
    "eval/eos_fraction": Metric("fraction", "responses to held-out prompts that end in EOS"),
    # Speed
    "throughput/response_tokens_per_s": Metric("tokens/s", "response tokens of an iteration / its wall time"),
}

PATTERNS: dict[str, Metric] = {
    r"sft/eval_loss/source/.+": Metric(
        "nats/token",
        "sft/eval_loss of one held-out set, or of what was held out of one set; held-out tasks not counted",
    ),
    r"sft/eval_loss/task/.+": Metric(
        "nats/token", "sft/eval_loss of a task of data.hold_out_tasks, which is not trained on"
    ),
    r"time/[a-z0-9_]+_s": Metric("s", "wall time of a phase of the step or iteration"),
}
_SHOWN = {r"[a-z0-9_]+_s": "<phase>_s", r".+": "<name>"}
"""Part of a pattern → what the table has in its place."""

_CLOCK = ("time/", "throughput/")


def describe(name: str) -> Metric:
    """Unit and meaning of a metric. Raises ConfigError for a name that is not in the table."""
    if name in METRICS:
        return METRICS[name]
    for pattern, metric in PATTERNS.items():
        if re.fullmatch(pattern, name, re.DOTALL):
            return metric
    close = difflib.get_close_matches(name, METRICS, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(
        f"The metric '{name}' is not in the table of rlhf_dist/run/metrics.py; {guess}Use a name of the table, or "
        "add this one with its unit and meaning."
    )


class UnknownMetricWarning(UserWarning):
    """A metric that is not in the table, or that is no number."""


_warned: set[str] = set()


def check_names(names: Iterable[str]) -> None:
    """Warn of each name that is not in the table, once a process."""
    for name in names:
        try:
            describe(name)
        except ConfigError as error:
            warn_once(name, str(error))


def warn_once(name: str, message: str) -> None:
    """An `UnknownMetricWarning` about the metric, the first time."""
    if name not in _warned:
        warnings.warn(message, UnknownMetricWarning, stacklevel=3)
        _warned.add(name)


def is_clock(name: str) -> bool:
    """Whether a metric measures the machine (time, speed) and so may differ between two equal runs."""
    return name.startswith(_CLOCK)


def metrics_table() -> str:
    """The table as Markdown, for the documentation."""
    rows = [(name, *metric) for name, metric in METRICS.items()]
    for pattern, metric in PATTERNS.items():
        stem, _, last = pattern.rpartition("/")
        rows.append((f"{stem}/{_SHOWN[last]}", *metric))
    lines = ["| metric | unit | meaning |", "|---|---|---|"]
    return "\n".join(lines + [f"| `{n}` | {u} | {m.replace('|', chr(92) + '|')} |" for n, u, m in rows]) + "\n"
