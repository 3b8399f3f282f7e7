"""Everything of a run that can be refused without starting a process: models, data, roles, numbers that must fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from rlhf_dist.algo.rewards import RunningMoments
from rlhf_dist.cli.checks import check_ds_config, check_micro_batches, check_model, check_ranks, check_same_tokenizer
from rlhf_dist.cli.facts import describe_trained
from rlhf_dist.cli.near_ties import tell_apart
from rlhf_dist.cluster.group import WorkerSpec
from rlhf_dist.config import (
    DataSource,
    EvalConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    SFTSettings,
)
from rlhf_dist.data.datasets import PreferenceDataset, PromptDataset, Split
from rlhf_dist.data.loading import load_pairs, load_preferences, load_prompts, load_sequences
from rlhf_dist.data.quarantine import Quarantine
from rlhf_dist.data.sampler import TRAINING_ORDER, EpochSampler, LengthGroupedSampler, Sampler
from rlhf_dist.data.sft import load_sft, mixed_order, shares_of
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.errors import ConfigError
from rlhf_dist.models.loading import check_causal_lm, check_scalar_model
from rlhf_dist.models.score_moments import read_score_moments
from rlhf_dist.trainers.bag_of_words import BagOfWords
from rlhf_dist.trainers.ppo import PPOData
from rlhf_dist.trainers.supervised import num_steps

WORKERS = "rlhf_dist.workers"


@dataclass(frozen=True)
class Prepared:
    """A run that passed every check and has started nothing."""

    specs: list[WorkerSpec]
    data: Any
    facts: dict[str, Any]
    """Derived numbers, for the start of the run and for `validate`."""
    decode: Callable[[Tensor], str] | None = None
    """[n] token ids → text."""
    contents: Mapping[str, str] = field(default_factory=dict)
    """Path in the configuration → what is there. A checkpoint then belongs to the contents, wherever they lie."""
    bad_rows: tuple[str, ...] = ()
    """Lines of the account of rows that were left out under `on_bad_row: skip`."""
    baseline: BagOfWords | None = None
    """What a reward model is held against."""
    sampler: Sampler | None = None
    """Which training records a supervised step takes."""
    shares: tuple[dict[str, Any], ...] = ()
    """Of each set that is trained on; empty where there is one and no mixing."""


def bad_rows(*datasets: Any) -> tuple[str, ...]:
    """Lines of the account of what was left out of data sets as bad."""
    return tuple(line for found in datasets if found is not None for line in Quarantine(list(found.report.bad)).lines())


def describe_data(**datasets: Any) -> dict[str, Any]:
    """Sizes of data sets, and what was left out or cut of them, with the first places."""
    facts: dict[str, Any] = {}
    for name, dataset in datasets.items():
        label = name.replace("held_out", "held-out").replace("_", " ")
        facts[label] = len(dataset) if dataset is not None else 0
        if dataset is None:
            continue
        facts |= {f"{label}: {loss}": found for loss, found in dataset.report.losses().items()}
    return facts


def prepare_sft(config: SFTConfig) -> Prepared:
    """Checks and tokenised data of an SFT run."""
    check_micro_batches(config.model, config.data.max_length_tokens, "model")
    check_causal_lm(check_model(config.model.model_path, config.data.max_length_tokens, "trained"), "trained")
    tokenizer = load_tokenizer(config.model.model_path, config.data.template_path)
    data = load_sft(config.data, tokenizer, config.seed)
    worker = f"{WORKERS}.language_model:LanguageModelWorker"
    order = mixed_order(config.data, data.train, config.seed)
    prepared = _prepare_supervised(config, data, config.sft, "sft", worker, tokenizer, order=order)
    facts = dict(prepared.facts)
    if data.pretraining is not None:
        check_pretraining(config.sft, len(data.pretraining))
        facts |= describe_data(
            pretraining_sequences=data.pretraining, held_out_pretraining_sequences=data.eval_pretraining
        )
        facts["pretraining sequences a step"] = config.sft.pretraining_per_step
        facts["weight of their mean loss"] = f"{config.sft.pretraining_weight:g}"
        epochs = prepared.facts["optimiser steps"] * config.sft.pretraining_per_step / len(data.pretraining)
        facts["epochs of pretraining text"] = round(epochs, 3)
    shares = shares_of(data.train, order) if config.data.mixing or len(data.train.groups) > 1 else ()
    left_out = (*prepared.bad_rows, *bad_rows(data.pretraining, data.eval_pretraining))
    return replace(prepared, facts=facts, shares=shares, bad_rows=left_out)


def check_pretraining(settings: SFTSettings, num_sequences: int) -> None:
    """Refuse a step that would hold a sequence of plain text twice."""
    if settings.pretraining_per_step > num_sequences:
        raise ConfigError(
            f"sft.pretraining_ratio {settings.pretraining_ratio:g} takes {settings.pretraining_per_step} sequences of text a "
            f"step, but data.pretraining has {num_sequences}; lower the ratio to at most "
            f"{num_sequences / settings.batch_size:g}, or add text"
        )


def load_reward(config: RewardConfig, tokenizer: Any, keep_records: bool = False) -> Split[PreferenceDataset]:
    """The preferences of a run, before near-ties are told apart. `keep_records` and errors as in `load_preferences`."""
    told_apart = config.reward.near_ties is not None
    use_margins = config.reward.margin_coef > 0 or told_apart
    return load_preferences(config.data, tokenizer, config.seed, use_margins, told_apart, keep_records)


def prepare_reward(config: RewardConfig) -> Prepared:
    """Checks and tokenised data of a reward-model run."""
    check_micro_batches(config.model, config.data.max_length_tokens, "model", num_sequences=2)  # a pair is the smallest
    check_model(config.model.model_path, config.data.max_length_tokens, "trained")
    tokenizer = load_tokenizer(config.model.model_path, config.data.template_path)
    data = load_reward(config, tokenizer)
    most = max(part.most_responses for part in (data.train, data.eval) if part is not None)
    check_micro_batches(config.model, config.data.max_length_tokens, "model", num_sequences=most)
    margin_coef, num_with_margins = config.reward.margin_coef, data.train.num_with_margins
    if margin_coef > 0 and num_with_margins == 0:
        raise ConfigError(
            f"reward.margin_coef is {margin_coef} but no record of data.train has a margin above 0; set it to 0, or give "
            "records a margin (pairs) or ratings (rankings)"
        )
    worker = f"{WORKERS}.preference_model:PreferenceModelWorker"
    objective: dict[str, Any] = {"margin_coef": margin_coef, "centering_coef": config.reward.centering_coef}
    near_tie_facts: dict[str, Any] = {}
    if config.reward.near_ties is not None:
        data, objective["near_ties"], near_tie_facts = tell_apart(config.reward.near_ties, data)
    prepared = _prepare_supervised(config, data, config.reward, "reward", worker, tokenizer, objective)
    if config.reward.bag_of_words_baseline:
        if data.eval is None:
            raise ConfigError(
                "reward.bag_of_words_baseline is true but there are no held-out records to compare on; set data.eval, or "
                "data.eval_fraction above 0"
            )
        # Before anything is trained: it may be refused.
        baseline = BagOfWords(data.train, decoder(tokenizer), objective.get("near_ties"), config.seed)
        prepared = replace(prepared, baseline=baseline)
    if margin_coef > 0:
        prepared.facts["training records with margins"] = num_with_margins
    prepared.facts.update(near_tie_facts)
    return prepared


def _prepare_supervised(
    config: Any,
    data: Any,
    settings: Any,
    section: str,
    worker: str,
    tokenizer: Any,
    objective: dict[str, Any] | None = None,
    order: Sampler | None = None,
) -> Prepared:
    """`order`: of the training records; None: all of them, shuffled anew each epoch."""
    check_ds_config(config.model)
    check_ranks(settings.batch_size, config.model.num_ranks, f"{section}.batch_size", "model")
    sampler = order or EpochSampler(len(data.train), config.seed, TRAINING_ORDER)
    epoch = sampler.num_items
    steps = num_steps(settings, epoch, section)
    if settings.group_by_length:
        stream = f"{TRAINING_ORDER}/by length"
        sampler = LengthGroupedSampler(sampler, data.train.longest, settings.batch_size, config.seed, stream)
    spec = WorkerSpec(
        "model",
        worker,
        config.model,
        {"config": config.model, "num_steps": steps, "template_path": config.data.template_path, **(objective or {})},
    )
    facts = {
        **describe_data(training_records=data.train, held_out_records=data.eval),
        **({"records of an epoch": epoch} if order else {}),
        **describe_trained(config.model, "model", scalar=section == "reward"),
        "optimiser steps": steps,
        "records a step": settings.batch_size,
        "epochs": round(steps * settings.batch_size / epoch, 3),
    }
    left_out = bad_rows(data.train, data.eval)
    return Prepared([spec], data, facts, decoder(tokenizer), bad_rows=left_out, sampler=sampler)


def decoder(tokenizer: Any) -> Callable[[Tensor], str]:
    """[n] token ids → text, without special tokens."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def load_ppo(config: PPOConfig, tokenizer: Any, keep_records: bool = False) -> dict[str, Any]:
    """`prompts`, `eval_prompts` and `ptx` of a run; the latter two None where it has none.

    `keep_records` and errors as in `load_sequences`.
    """
    data, limit = config.data, config.max_prompt_tokens

    def prompts(sources: Sequence[DataSource]) -> PromptDataset | None:
        return load_prompts(sources, tokenizer, limit, data.on_too_long, keep_records) if sources else None

    return {
        "prompts": prompts(data.prompts),
        "eval_prompts": prompts(data.eval_prompts),
        "ptx": load_sequences(data.ptx, data, tokenizer, keep_records) if data.ptx else None,
    }


def prepare_ppo(config: PPOConfig) -> Prepared:
    """Checks, tokenised data and roles of a PPO run."""
    policy, value, reference, reward = config.policy, config.value_model, config.reference_model, config.reward
    for role, model in (("policy", policy), ("value", value), ("reference", reference), ("reward", reward)):
        check_micro_batches(model, config.data.max_length_tokens, role)
    tokenizer = load_tokenizer(policy.model_path, config.data.template_path)
    check_causal_lm(check_model(policy.model_path, config.data.max_length_tokens, "policy"), "policy")
    for role, model in (("reference", reference), ("reward", reward), ("value", value)):
        model_config = check_model(model.model_path, config.data.max_length_tokens, role)
        if role == "reference":
            check_causal_lm(model_config, role)
        if role == "reward":
            check_scalar_model(model_config, role)
        check_same_tokenizer(tokenizer, model.model_path, model_config, role)
    for role, model in (("policy", policy), ("value", value)):
        check_ds_config(model)
        check_ranks(config.ppo.mini_batch_size, model.num_ranks, "ppo.mini_batch_size", role)
    loaded = load_ppo(config, tokenizer)
    data = PPOData(**loaded, decode=decoder(tokenizer), score_moments=_saved_moments(config))
    settings = config.ppo
    facts = {
        **describe_data(prompts=data.prompts, held_out_prompts=data.eval_prompts, ptx_sequences=data.ptx),
        "iterations": settings.num_iterations,
        "responses an iteration": settings.responses_per_iteration,
        "optimiser steps an iteration": settings.updates_per_iteration,
        "longest prompt (tokens)": config.max_prompt_tokens,
        **describe_trained(policy, "policy", scalar=False),
        **describe_trained(value, "value", scalar=True),
    }
    return Prepared(ppo_specs(config), data, facts, bad_rows=bad_rows(data.prompts, data.eval_prompts, data.ptx))


def _saved_moments(config: PPOConfig) -> RunningMoments | None:
    if config.ppo.normalise_scores != "saved":
        return None
    found = read_score_moments(config.reward.model_path)
    return RunningMoments(count=1, mean=found.mean, sum_squares=found.std**2)


def ppo_specs(config: PPOConfig) -> list[WorkerSpec]:
    settings, template = config.ppo, {"template_path": config.data.template_path}
    temperature = config.rollout.temperature
    rollout = {
        "config": config.rollout,
        "model_path": config.policy.model_path,
        "precision": config.rollout.precision or config.policy.precision,
    }
    policy = {
        "config": config.policy,
        "num_steps": settings.num_policy_updates,
        "temperature": temperature,
        "settings": settings,
    }
    value = {
        "config": config.value_model,
        "num_steps": settings.num_updates,
        "clip_range": settings.value_clip_range,
        "tokenizer_path": config.policy.model_path,
    }
    reference = {"config": config.reference_model, "temperature": temperature}
    return [
        WorkerSpec("policy", f"{WORKERS}.policy:PolicyWorker", config.policy, policy | template),
        WorkerSpec("value", f"{WORKERS}.value:ValueWorker", config.value_model, value | template),
        WorkerSpec("reference", f"{WORKERS}.reference:ReferenceWorker", config.reference_model, reference),
        WorkerSpec("reward", f"{WORKERS}.reward:RewardWorker", config.reward, {"config": config.reward}),
        WorkerSpec("rollout", f"{WORKERS}.rollout:RolloutWorker", config.rollout, rollout | template),
    ]


def prepare_eval(config: EvalConfig) -> Prepared:
    """Checks, tokenised data and roles of an evaluation."""
    models = {name: getattr(config, name) for name in ("policy", "reference", "reward") if getattr(config, name)}
    for name, model in models.items():
        check_micro_batches(model, config.data.max_length_tokens, name)
    first = next(iter(models))
    tokenizer = load_tokenizer(models[first].model_path, config.data.template_path)
    for name, model in models.items():
        model_config = check_model(model.model_path, config.data.max_length_tokens, name)
        (check_scalar_model if name == "reward" else check_causal_lm)(model_config, name)
        check_same_tokenizer(tokenizer, model.model_path, model_config, name)
    limit = config.data.max_length_tokens - config.rollout.max_response_tokens
    data = {
        "instructions": load_sequences(config.data.instructions, config.data, tokenizer)
        if config.data.instructions
        else None,
        "preferences": load_pairs(config.data.preferences, config.data, tokenizer, config.seed, use_margins=False)
        if config.data.preferences
        else None,
        "prompts": load_prompts(config.data.prompts, tokenizer, limit, config.data.on_too_long)
        if config.data.prompts
        else None,
    }
    facts = describe_data(**{name: dataset for name, dataset in data.items() if dataset})
    left_out = bad_rows(*data.values())
    data["decode"] = decoder(tokenizer)
    return Prepared(_eval_specs(config, data), data, facts, bad_rows=left_out)


def _eval_specs(config: EvalConfig, data: dict[str, Any]) -> list[WorkerSpec]:
    specs = []
    if config.policy and data["instructions"]:
        specs.append(
            WorkerSpec("policy", f"{WORKERS}.reference:ReferenceWorker", config.policy, {"config": config.policy})
        )
    if config.reward:
        specs.append(WorkerSpec("reward", f"{WORKERS}.reward:RewardWorker", config.reward, {"config": config.reward}))
    if config.policy and data["prompts"]:
        rollout = {
            "config": config.rollout,
            "model_path": config.policy.model_path,
            "precision": config.rollout.precision or config.policy.precision,
            "template_path": config.data.template_path,
        }
        specs.append(WorkerSpec("rollout", f"{WORKERS}.rollout:RolloutWorker", config.rollout, rollout))
        if config.reference:
            reference = {"config": config.reference, "temperature": config.rollout.temperature}
            specs.append(WorkerSpec("reference", f"{WORKERS}.reference:ReferenceWorker", config.reference, reference))
    return specs
