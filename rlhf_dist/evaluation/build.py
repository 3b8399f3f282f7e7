"""From a configuration to a finished evaluation: data and checks (`prepare`), then roles and numbers (`run_eval`)."""

from __future__ import annotations

from functools import partial
from typing import Any

from rlhf_dist.data.loading import load_pairs, load_prompts, load_sequences
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.distributed.group import Session, WorkerSpec
from rlhf_dist.distributed.role_groups import ReferenceRole, RewardRole
from rlhf_dist.distributed.rollout_engines import RolloutRole
from rlhf_dist.distributed.workers.reference import ReferenceWorker
from rlhf_dist.distributed.workers.reward import RewardWorker
from rlhf_dist.distributed.workers.rollout import RolloutWorker
from rlhf_dist.evaluation.config import EvalConfig
from rlhf_dist.evaluation.reward_input import Rendered, as_generated
from rlhf_dist.evaluation.reward_report import evaluation, headline, show, write_report
from rlhf_dist.evaluation.trainer import evaluate_all, score_pairs
from rlhf_dist.models.loading import check_scalar_model, context_length, load_model_config
from rlhf_dist.models.vocabulary import num_token_ids
from rlhf_dist.run.checks import check_micro_batches, check_model, check_same_tokenizer, own_tokenizer
from rlhf_dist.run.launch import check_run_folder, hosted
from rlhf_dist.run.prepared import Prepared, bad_rows, decoder
from rlhf_dist.run.run_summary import describe_data


def prepare(config: EvalConfig) -> Prepared[dict[str, Any]]:
    """Checks, tokenized data and roles of an evaluation; starts nothing.

    Raises:
        RlhfDistError: what an evaluation of this configuration would end with.
    """
    settings = config.data
    models = {name: getattr(config, name) for name in ("policy", "reference", "reward") if getattr(config, name)}
    for name, model in models.items():
        check_micro_batches(model, settings.max_length_tokens, name)
    first = next(iter(models))
    tokenizer = load_tokenizer(models[first].model_path, settings.template_path)
    reward_tokenizer = None
    for name, model in models.items():
        model_config = check_model(model.model_path, settings.max_length_tokens, name, scalar=name == "reward")
        if name == "reward":
            check_scalar_model(model_config, name)
            reward_tokenizer = own_tokenizer(model.model_path, model_config, tokenizer) if name != first else None
        if name != "reward" or reward_tokenizer is None:
            check_same_tokenizer(tokenizer, model.model_path, model_config, name)
    limit = settings.max_length_tokens - config.rollout.max_response_tokens
    data: dict[str, Any] = {"instructions": None, "preferences": None, "prompts": None}
    if settings.instructions:
        data["instructions"] = load_sequences(settings.instructions, settings, tokenizer)
    if settings.preferences:
        read_by = reward_tokenizer or tokenizer
        data["preferences"] = load_pairs(settings.preferences, settings, read_by, config.seed, use_margins=False)
    data["reward_input"], read_as = as_generated, "the policy's tokens"
    if settings.prompts:
        data["prompts"] = load_prompts(settings.prompts, tokenizer, limit, settings, keep_records=True)
    if reward_tokenizer is not None:
        read_as = "text in its own chat template"
        prompts = [data["prompts"]] if settings.prompts else []
        context = context_length(load_model_config(models["reward"].model_path))
        cut = settings.model_copy(update={"max_length_tokens": limit})
        data["reward_input"] = Rendered(prompts, tokenizer, cut, reward_tokenizer, context)
        data["reward_input"].check(config.rollout.max_response_tokens)
    summary = {"the reward model reads": read_as} if config.reward and config.policy else {}
    summary |= describe_data(**{name: data[name] for name in ("instructions", "preferences", "prompts") if data[name]})
    dropped = bad_rows(*(data[name] for name in ("instructions", "preferences", "prompts")))
    data["decode"] = decoder(tokenizer)
    return Prepared(_worker_specs(config, tokenizer), data, summary, bad_rows=dropped)


def _worker_specs(config: EvalConfig, tokenizer: Any) -> list[WorkerSpec]:
    policy, reward, reference, rollout = config.policy, config.reward, config.reference, config.rollout
    specs = []
    if policy and config.data.instructions:
        specs.append(WorkerSpec("policy", policy, partial(ReferenceWorker, policy)))
    if reward:
        specs.append(WorkerSpec("reward", reward, partial(RewardWorker, reward)))
    if policy and config.data.prompts:
        worker = partial(
            RolloutWorker,
            rollout,
            model_path=policy.model_path,
            precision=rollout.precision or policy.precision,
            max_length_tokens=config.data.max_length_tokens,
            template_path=config.data.template_path,
        )
        specs.append(WorkerSpec("rollout", rollout, worker, own_process=rollout.engine == "vllm"))
        if reference:
            num_tokens = num_token_ids(tokenizer)
            scorer = partial(ReferenceWorker, reference, temperature=rollout.temperature, num_tokens=num_tokens)
            specs.append(WorkerSpec("reference", reference, scorer))
    return specs


def run_eval(
    config: EvalConfig, session: Session | None = None, prepared: Prepared[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Evaluate a policy and/or a reward model on held-out records.

    Args:
        config: the evaluation.
        session: host in this one (and leave it open) rather than in one of the run's own.
        prepared: what `prepare` gave for `config`, where that is done already.

    Returns:
        The summary, as in summary.json.

    Raises:
        RlhfDistError: an invalid configuration, data set, model or run folder.
    """
    check_run_folder(config)
    prepared = prepared or prepare(config)
    with hosted(config, prepared, session) as (run, groups):
        roles: dict[str, Any] = {}
        for name, role, model in (
            ("policy", ReferenceRole, config.policy),
            ("reference", ReferenceRole, config.reference),
            ("reward", RewardRole, config.reward),
        ):
            if name in groups and model is not None:
                roles[name] = role.of(groups[name], model)
        if "rollout" in groups:
            roles["rollout"] = RolloutRole.of_config(groups["rollout"], config.rollout)
        summary = evaluate_all(run, roles, prepared.data)
        if prepared.data["preferences"] and "reward" in roles:
            report = evaluation(
                prepared.data["preferences"], lambda data, rows: score_pairs(roles["reward"], data.batch(rows))
            )
            write_report(config.run_dir, "reward_model", report)
            show({"reward_model": report})
            summary["reward"] = headline(report)
        return run.finish(summary)
