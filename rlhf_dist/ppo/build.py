"""From a configuration to a finished PPO run: data and checks (`prepare`), then roles, trainer and saved models (`run_ppo`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from rlhf_dist.config.data import DataSource
from rlhf_dist.config.hosting import Precision
from rlhf_dist.data.datasets import PromptDataset
from rlhf_dist.data.loading import load_prompts, load_sequences
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.distributed.group import Session, WorkerSpec
from rlhf_dist.distributed.phases import asleep, taking_turns
from rlhf_dist.distributed.role_groups import ReferenceRole, RewardRole
from rlhf_dist.distributed.rollout_engines import GroupWeightSync, RolloutRole
from rlhf_dist.distributed.workers.reference import ReferenceWorker
from rlhf_dist.distributed.workers.reward import RewardWorker
from rlhf_dist.distributed.workers.rollout import RolloutWorker
from rlhf_dist.evaluation.reward_input import Rendered, as_generated
from rlhf_dist.models.loading import check_scalar_model, context_length, load_model_config
from rlhf_dist.models.score_moments import read_score_moments
from rlhf_dist.models.vocabulary import check_embeddings, num_token_ids
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.ppo.importance import Correction
from rlhf_dist.ppo.policy_worker import PolicyWorker
from rlhf_dist.ppo.rewards import RunningMoments
from rlhf_dist.ppo.roles import PolicyRole, ValueRole
from rlhf_dist.ppo.scoring import Precisions
from rlhf_dist.ppo.trainer import PPOData, PPORoles, PPOTrainer
from rlhf_dist.ppo.value_worker import ValueWorker
from rlhf_dist.run.checks import (
    check_ds_config,
    check_micro_batches,
    check_model,
    check_ranks,
    check_same_tokenizer,
    own_tokenizer,
)
from rlhf_dist.run.launch import check_run_folder, checkpoints, hosted
from rlhf_dist.run.prepared import Prepared, bad_rows, decoder
from rlhf_dist.run.run_summary import describe_data, describe_trained


def load_data(config: PPOConfig, tokenizer: Any, keep_records: bool = False) -> dict[str, Any]:
    """`prompts`, `eval_prompts` and `ptx` of a run; the latter two None where it has none.

    `keep_records` and errors as in `load_sequences`.
    """
    data, limit = config.data, config.max_prompt_tokens

    def prompts(sources: Sequence[DataSource]) -> PromptDataset | None:
        return load_prompts(sources, tokenizer, limit, data, keep_records) if sources else None

    return {
        "prompts": prompts(data.prompts),
        "eval_prompts": prompts(data.eval_prompts),
        "ptx": load_sequences(data.ptx, data, tokenizer, keep_records) if data.ptx else None,
    }


def prepare(config: PPOConfig) -> Prepared[PPOData]:
    """Checks, tokenized data and roles of a PPO run; starts nothing.

    Raises:
        RlhfDistError: what a run of this configuration would end with.
    """
    tokenizer, reward_tokenizer = _check_models(config)
    loaded = load_data(config, tokenizer, keep_records=reward_tokenizer is not None)
    reward_input, read_as = as_generated, "the policy's tokens"
    if reward_tokenizer is not None:
        prompts = [found for found in (loaded["prompts"], loaded["eval_prompts"]) if found is not None]
        settings = config.data.model_copy(update={"max_length_tokens": config.max_prompt_tokens})
        limit = context_length(load_model_config(config.reward.model_path))
        reward_input = Rendered(prompts, tokenizer, settings, reward_tokenizer, limit)
        reward_input.check(config.rollout.max_response_tokens)
        read_as = "text in its own chat template"
    data = PPOData(**loaded, decode=decoder(tokenizer), reward_input=reward_input, score_moments=_saved_moments(config))
    settings = config.ppo
    summary = {
        "the reward model reads": read_as,
        **describe_data(prompts=data.prompts, held_out_prompts=data.eval_prompts, ptx_sequences=data.ptx),
        "iterations": settings.num_iterations,
        "responses an iteration": settings.responses_per_iteration,
        "optimizer steps an iteration": settings.updates_per_iteration,
        "longest prompt (tokens)": config.max_prompt_tokens,
        **describe_trained(config.policy, "policy", scalar=False),
        **describe_trained(config.value, "value", scalar=True),
    }
    return Prepared(
        worker_specs(config, num_token_ids(tokenizer)),
        data,
        summary,
        num_steps=settings.num_iterations,
        bad_rows=bad_rows(data.prompts, data.eval_prompts, data.ptx),
    )


def _check_models(config: PPOConfig) -> tuple[Any, Any | None]:
    """Check the four models against the data's limits and each other; returns the tokenizer they share, and the reward model's
    where it reads text in a template or tokens of its own."""
    limit = config.data.max_length_tokens
    policy, value, reference, reward = config.policy, config.value, config.reference, config.reward
    for role, model in (("policy", policy), ("value", value), ("reference", reference), ("reward", reward)):
        check_micro_batches(model, limit, role)
    tokenizer = load_tokenizer(policy.model_path, config.data.template_path)
    policy_config = check_model(policy.model_path, limit, "policy", scalar=False)
    check_embeddings(
        policy_config, tokenizer, "policy", "fine-tune it first with `rlhf-dist sft --model.resize_embeddings true`"
    )
    reward_tokenizer = None
    for role, model in (("reference", reference), ("reward", reward), ("value", value)):
        model_config = check_model(model.model_path, limit, role, scalar=role != "reference")
        if role == "reward":
            check_scalar_model(model_config, role)
            if config.ppo.reward_template == "own":
                reward_tokenizer = own_tokenizer(model.model_path, model_config, tokenizer)
            if reward_tokenizer is not None:
                continue
        check_same_tokenizer(tokenizer, model.model_path, model_config, role)
    for role, model in (("policy", policy), ("value", value)):
        check_ds_config(model)
        check_ranks(config.ppo.mini_batch_size, model.num_ranks, "ppo.mini_batch_size", role)
    return tokenizer, reward_tokenizer


def _saved_moments(config: PPOConfig) -> RunningMoments | None:
    if config.ppo.normalize_scores != "saved":
        return None
    found = read_score_moments(config.reward.model_path)
    return RunningMoments(count=1, mean=found.mean, sum_squares=found.std**2)


def worker_specs(config: PPOConfig, num_tokens: int | None = None) -> list[WorkerSpec]:
    """The five roles of a run, each with its worker; `num_tokens`: ids that the tokenizer has."""
    settings, template_path, temperature = config.ppo, config.data.template_path, config.rollout.temperature
    policy, value, reference, reward = config.policy, config.value, config.reference, config.reward
    specs = [
        WorkerSpec(
            "policy",
            policy,
            partial(
                PolicyWorker,
                policy,
                num_steps=settings.num_policy_updates,
                temperature=temperature,
                settings=settings,
                template_path=template_path,
            ),
        ),
        WorkerSpec(
            "value",
            value,
            partial(
                ValueWorker,
                value,
                num_steps=settings.num_updates,
                clip_range=settings.value_clip_range,
                tokenizer_path=policy.model_path,
                template_path=template_path,
            ),
        ),
        WorkerSpec(
            "reference",
            reference,
            partial(ReferenceWorker, reference, temperature=temperature, num_tokens=num_tokens),
        ),
        WorkerSpec("reward", reward, partial(RewardWorker, reward)),
        WorkerSpec(
            "rollout",
            config.rollout,
            partial(
                RolloutWorker,
                config.rollout,
                model_path=policy.model_path,
                precision=config.rollout.precision or policy.precision,
                max_length_tokens=config.data.max_length_tokens,
                template_path=template_path,
                takes_turns="rollout" in config.colocated_roles,
            ),
            own_process=config.rollout.engine == "vllm",
        ),
    ]
    return [asleep(spec) if spec.role in config.colocated_roles else spec for spec in specs]


def run_ppo(
    config: PPOConfig, session: Session | None = None, prepared: Prepared[PPOData] | None = None
) -> dict[str, Any]:
    """PPO against a reward model.

    Args:
        config: the run.
        session: host in this one (and leave it open) rather than in one of the run's own.
        prepared: what `prepare` gave for `config`, where that is done already.

    Returns:
        The summary, as in summary.json.

    Raises:
        RlhfDistError: an invalid configuration, data set, model or run folder; a failed or preempted run.
    """
    check_run_folder(config)
    prepared = prepared or prepare(config)
    with hosted(config, prepared, session) as (run, groups):
        if config.colocate:
            groups = taking_turns(groups, config.colocated_roles)
        policy = PolicyRole.of(groups["policy"], config.policy)
        rollout = RolloutRole.of_config(groups["rollout"], config.rollout)
        transport = config.rollout.sends_weights_by(config.policy, groups["rollout"].device, config.cluster)
        roles = PPORoles(
            policy=policy,
            reference=ReferenceRole.of(groups["reference"], config.reference),
            reward=RewardRole.of(groups["reward"], config.reward),
            value=ValueRole.of(groups["value"], config.value),
            rollout=rollout,
            weight_sync=GroupWeightSync(groups["policy"], rollout.engines, transport),
        )
        trainer = PPOTrainer(
            run,
            roles,
            prepared.data,
            config.ppo,
            checkpoints(config, prepared),
            max_response_tokens=config.rollout.max_response_tokens,
            precisions=_precisions(config),
            correction=Correction(config.importance_cap, config.ppo.importance_range),
            num_chunks=config.rollout.num_chunks,
        )
        summary = trainer.run(resume=config.resume == "auto")
        run.save(policy)
        return run.finish(summary)


def _precisions(config: PPOConfig) -> Precisions:
    """The lower precision of each pair of models whose log-probs the sanity checks compare."""
    policy, reference = config.policy, config.reference
    rollout = config.rollout.precision or policy.precision
    same = reference.model_path == policy.model_path
    return Precisions(
        rollout=_lower(policy.precision, rollout),
        same_distribution=not config.rollout.cuts_tokens_off,
        same_start=_lower(policy.precision, reference.precision) if same else None,
    )


def _lower(*precisions: Precision) -> Precision:
    return next(name for name in ("bf16", "fp16", "fp32") if name in precisions)
