"""From a configuration to a finished run: data → session → roles → trainer → saved model and summary.

Everything that can be refused without a process (data, models, run folder, placement) is checked before the first actor
starts and before the run folder is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_dist.cluster.group import Session, WorkerGroup, WorkerSpec
from rlhf_dist.cluster.inline import InlineSession
from rlhf_dist.cluster.proxies import (
    GroupWeightSync,
    LanguageModelRole,
    PolicyRole,
    PreferenceModelRole,
    ReferenceRole,
    RewardRole,
    RolloutRole,
    ValueRole,
)
from rlhf_dist.config import EvalConfig, PPOConfig, RewardConfig, RunConfig, SFTConfig, TrainedModel
from rlhf_dist.config.deepspeed import read_ds_config
from rlhf_dist.config.load import dump_yaml
from rlhf_dist.data.datasets import load_pairs, load_preferences, load_prompts, load_sequences, load_sft
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.errors import ConfigError, ModelError
from rlhf_dist.models.loading import context_length, load_model_config
from rlhf_dist.tracking.console import print_table
from rlhf_dist.tracking.run_folder import RunFolder
from rlhf_dist.trainers import ppo as ppo_trainer
from rlhf_dist.trainers.checkpoint import Checkpoints, step_of
from rlhf_dist.trainers.evaluate import evaluate_all
from rlhf_dist.trainers.run import Run
from rlhf_dist.trainers.supervised import RewardTask, SFTTask, SupervisedTrainer, num_steps

Summary = dict[str, Any]
WORKERS = "rlhf_dist.workers"


@dataclass(frozen=True)
class Prepared:
    """A run that passed every check and has started nothing."""

    specs: list[WorkerSpec]
    data: Any
    facts: dict[str, Any]
    """Derived numbers, for the start of the run and for `validate`."""


def open_session(config: RunConfig) -> Session:
    """A session of the run's hosting; connects to nothing yet."""
    if config.cluster == "inline":
        return InlineSession(config.device)
    from rlhf_dist.cluster.session import RaySession  # Ray takes a second to import: not for inline runs

    return RaySession(config.ray, config.device)


def check_run_folder(config: RunConfig) -> None:
    """Refuse a run folder that may not be used; touches nothing."""
    RunFolder.check(config.run_dir, resume=config.resume == "auto", overwrite=config.overwrite)


def check_model(path: str, max_length_tokens: int, role: str) -> Any:
    """The model's config, if it can hold the run's sequences.

    Raises:
        ModelError: no model at `path`, or its context is shorter than `max_length_tokens`.
    """
    config = load_model_config(path)
    limit = context_length(config)
    if limit is not None and max_length_tokens > limit:
        raise ModelError(
            f"data.max_length_tokens is {max_length_tokens} but the {role} model at {path!r} has a context of {limit} tokens; "
            f"lower data.max_length_tokens to at most {limit}"
        )
    return config


def check_same_vocabulary(policy: Any, other: Any, role: str) -> None:
    """Roles exchange token ids: their vocabularies must be one."""
    if policy.get_text_config().vocab_size != other.get_text_config().vocab_size:
        raise ModelError(
            f"the {role} model has a vocabulary of {other.get_text_config().vocab_size} tokens but the policy has "
            f"{policy.get_text_config().vocab_size}; in PPO all models must share the policy's tokenizer"
        )


def prepare_sft(config: SFTConfig) -> Prepared:
    """Checks and tokenised data of an SFT run."""
    check_model(config.model.model_path, config.data.max_length_tokens, "trained")
    tokenizer = load_tokenizer(config.model.model_path, config.data.template_path)
    data = load_sft(config.data, tokenizer, config.seed)
    return _prepare_supervised(config, data, config.sft, "sft", f"{WORKERS}.language_model:LanguageModelWorker")


def prepare_reward(config: RewardConfig) -> Prepared:
    """Checks and tokenised data of a reward-model run."""
    check_model(config.model.model_path, config.data.max_length_tokens, "trained")
    tokenizer = load_tokenizer(config.model.model_path, config.data.template_path)
    data = load_preferences(config.data, tokenizer, config.seed)
    return _prepare_supervised(
        config, data, config.reward, "reward", f"{WORKERS}.preference_model:PreferenceModelWorker"
    )


def _prepare_supervised(config: Any, data: Any, settings: Any, section: str, worker: str) -> Prepared:
    check_ds_config(config.model)
    check_ranks(settings.batch_size, config.model.num_ranks, f"{section}.batch_size", "model")
    steps = num_steps(settings, len(data.train), section)
    spec = WorkerSpec(
        "model",
        worker,
        config.model,
        {"config": config.model, "num_steps": steps, "template_path": config.data.template_path},
    )
    facts = {
        "training records": len(data.train),
        "held-out records": len(data.eval) if data.eval else 0,
        "optimiser steps": steps,
        "records a step": settings.batch_size,
        "epochs": round(steps * settings.batch_size / len(data.train), 3),
    }
    return Prepared([spec], data, facts)


def decoder(tokenizer: Any) -> Callable[[Tensor], str]:
    """[n] token ids → text, without special tokens."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def check_ds_config(model: TrainedModel) -> None:
    """Refuse a DeepSpeed file that contradicts its role."""
    if model.ds_config_path is not None:
        read_ds_config(model.ds_config_path, model.zero_stage, model.precision)


def check_ranks(batch_size: int, num_ranks: int, name: str, role: str) -> None:
    """Refuse a batch that leaves ranks without work at every step."""
    if batch_size < num_ranks:
        raise ConfigError(
            f"{name} is {batch_size} but {role}.num_ranks is {num_ranks}: some ranks would never have work; raise the first "
            "or lower the second"
        )


def prepare_ppo(config: PPOConfig) -> Prepared:
    """Checks, tokenised data and roles of a PPO run."""
    policy, value, reference, reward = config.policy, config.value_model, config.reference_model, config.reward
    policy_model = check_model(policy.model_path, config.data.max_length_tokens, "policy")
    for role, model in (("reference", reference), ("reward", reward), ("value", value)):
        check_same_vocabulary(policy_model, check_model(model.model_path, config.data.max_length_tokens, role), role)
    for role, model in (("policy", policy), ("value", value)):
        check_ds_config(model)
        check_ranks(config.ppo.mini_batch_size, model.num_ranks, "ppo.mini_batch_size", role)
    tokenizer = load_tokenizer(policy.model_path, config.data.template_path)
    limit = config.max_prompt_tokens
    data = ppo_trainer.PPOData(
        prompts=load_prompts(config.data.prompts, tokenizer, limit, config.data.on_too_long),
        eval_prompts=load_prompts(config.data.eval_prompts, tokenizer, limit, config.data.on_too_long)
        if config.data.eval_prompts
        else None,
        ptx=load_sequences(config.data.ptx, config.data, tokenizer) if config.data.ptx else None,
        decode=decoder(tokenizer),
    )
    settings = config.ppo
    facts = {
        "prompts": len(data.prompts),
        "held-out prompts": len(data.eval_prompts) if data.eval_prompts else 0,
        "iterations": settings.num_iterations,
        "responses an iteration": settings.responses_per_iteration,
        "optimiser steps an iteration": settings.updates_per_iteration,
        "longest prompt (tokens)": limit,
    }
    return Prepared(_ppo_specs(config), data, facts)


def _ppo_specs(config: PPOConfig) -> list[WorkerSpec]:
    settings, template = config.ppo, {"template_path": config.data.template_path}
    temperature = config.rollout.temperature
    rollout = {
        "config": config.rollout,
        "model_path": config.policy.model_path,
        "precision": config.rollout.precision or config.policy.precision,
    }
    policy = {
        "config": config.policy,
        "num_steps": settings.num_updates,
        "temperature": temperature,
        "clip_range": settings.clip_range,
        "ptx_coef": settings.ptx_coef,
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


@contextlib.contextmanager
def hosted(
    config: RunConfig, prepared: Prepared, session: Session | None
) -> Iterator[tuple[Run, dict[str, WorkerGroup]]]:
    """The run's folder and its hosted roles; on leaving, the roles are gone and what was started here is stopped."""
    resume = config.resume == "auto"
    own = session or open_session(config)
    try:
        own.check(prepared.specs)
        folder = RunFolder.open(config.run_dir, resume=resume, overwrite=config.overwrite)
        folder.write_config(dump_yaml(config))
        print_table(str(config.run_dir), [(name, str(value)) for name, value in prepared.facts.items()])
        latest = checkpoints(config, folder).latest() if resume else None
        with (
            Run.open(config, folder, resumed_step=step_of(latest) if latest else None) as run,
            own.place(prepared.specs, seed=config.seed, logs_dir=folder.logs_dir) as groups,
        ):
            yield run, groups
    finally:
        if session is None:
            own.close()


def checkpoints(config: RunConfig, folder: RunFolder) -> Checkpoints:
    """The run's checkpoints."""
    return Checkpoints(folder.checkpoints_dir, config.checkpoint.keep_last)


def run_sft(config: SFTConfig, session: Session | None = None) -> Summary:
    """Supervised fine-tuning; returns the summary. `session`: host in this one (and leave it open) rather than an own."""
    check_run_folder(config)
    prepared = prepare_sft(config)
    with hosted(config, prepared, session) as (run, groups):
        model = LanguageModelRole(groups["model"], config.model.micro_batch_size)
        task = SFTTask(model, prepared.data.train, prepared.data.eval)
        return _supervised(config, config.sft, run, task, prepared)


def run_reward(config: RewardConfig, session: Session | None = None) -> Summary:
    """Reward modelling; returns the summary. `session` as in `run_sft`."""
    check_run_folder(config)
    prepared = prepare_reward(config)
    with hosted(config, prepared, session) as (run, groups):
        model = PreferenceModelRole(groups["model"], config.model.micro_batch_size)
        task = RewardTask(model, prepared.data.train, prepared.data.eval)
        return _supervised(config, config.reward, run, task, prepared)


def _supervised(config: Any, settings: Any, run: Run, task: Any, prepared: Prepared) -> Summary:
    trainer = SupervisedTrainer(
        run,
        task,
        settings,
        total_steps=prepared.specs[0].kwargs["num_steps"],
        every_steps=config.checkpoint.every_steps,
        checkpoints=checkpoints(config, run.folder),
    )
    summary = trainer.run(resume=config.resume == "auto")
    run.save_model(task.model)
    return run.finish(summary)


def run_ppo(config: PPOConfig, session: Session | None = None) -> Summary:
    """PPO; returns the summary. `session` as in `run_sft`."""
    check_run_folder(config)
    prepared = prepare_ppo(config)
    with hosted(config, prepared, session) as (run, groups):
        policy = PolicyRole(groups["policy"], config.policy.micro_batch_size)
        roles = ppo_trainer.PPORoles(
            policy=policy,
            reference=ReferenceRole(groups["reference"], config.reference_model.micro_batch_size),
            reward=RewardRole(groups["reward"], config.reward.micro_batch_size),
            value=ValueRole(groups["value"], config.value_model.micro_batch_size),
            rollout=RolloutRole(groups["rollout"], config.rollout.batch_size),
            weight_sync=GroupWeightSync(groups["policy"], groups["rollout"]),
        )
        trainer = ppo_trainer.PPOTrainer(
            run,
            roles,
            prepared.data,
            config.ppo,
            checkpoints(config, run.folder),
            config.checkpoint.every_steps,
        )
        summary = trainer.run(resume=config.resume == "auto")
        run.save_model(policy)
        return run.finish(summary)


def prepare_eval(config: EvalConfig) -> Prepared:
    """Checks, tokenised data and roles of an evaluation."""
    models = {name: getattr(config, name) for name in ("policy", "reference", "reward") if getattr(config, name)}
    model_configs = {
        name: check_model(model.model_path, config.data.max_length_tokens, name) for name, model in models.items()
    }
    first = next(iter(models))
    for name, model_config in model_configs.items():
        check_same_vocabulary(model_configs[first], model_config, name)
    tokenizer = load_tokenizer(models[first].model_path, config.data.template_path)
    limit = config.data.max_length_tokens - config.rollout.max_response_tokens
    data = {
        "instructions": load_sequences(config.data.instructions, config.data, tokenizer)
        if config.data.instructions
        else None,
        "preferences": load_pairs(config.data.preferences, config.data, tokenizer, config.seed)
        if config.data.preferences
        else None,
        "prompts": load_prompts(config.data.prompts, tokenizer, limit, config.data.on_too_long)
        if config.data.prompts
        else None,
    }
    facts = {name: len(dataset) for name, dataset in data.items() if dataset}
    data["decode"] = decoder(tokenizer)
    return Prepared(_eval_specs(config, data), data, facts)


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


def run_eval(config: EvalConfig, session: Session | None = None) -> Summary:
    """Evaluate a policy and/or a reward model; returns the summary."""
    check_run_folder(config)
    prepared = prepare_eval(config)
    with hosted(config, prepared, session) as (run, groups):
        roles: dict[str, Any] = {}
        for name, role, model in (
            ("policy", ReferenceRole, config.policy),
            ("reference", ReferenceRole, config.reference),
            ("reward", RewardRole, config.reward),
        ):
            if name in groups and model is not None:
                roles[name] = role(groups[name], model.micro_batch_size)
        if "rollout" in groups:
            roles["rollout"] = RolloutRole(groups["rollout"], config.rollout.batch_size)
        return run.finish(evaluate_all(run, roles, prepared.data))


def validate(config: RunConfig) -> dict[str, Any]:
    """Everything that can be checked without starting an actor; returns the run's derived numbers.

    Raises:
        RlhfDistError: what a run of this configuration would be refused for.
    """
    check_run_folder(config)
    prepare = {SFTConfig: prepare_sft, RewardConfig: prepare_reward, PPOConfig: prepare_ppo, EvalConfig: prepare_eval}
    prepared = prepare[type(config)](config)  # pyright: ignore[reportArgumentType]
    return prepared.facts
