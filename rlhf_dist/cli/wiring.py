"""From a configuration to a finished run: data → session → roles → trainer → saved model and summary.

Everything that can be refused without a process (data, models, run folder, placement) is checked before the first actor
starts and before the run folder is touched.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_dist import __version__
from rlhf_dist.cli import stopping
from rlhf_dist.cli.prepare import Prepared, prepare_eval, prepare_ppo, prepare_reward, prepare_sft
from rlhf_dist.cli.reward_report import evaluation, headline, report_trained, score_moments_of, show, write_report
from rlhf_dist.cluster.group import Session, WorkerGroup
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
from rlhf_dist.config import EvalConfig, HostedRun, PPOConfig, Precision, RewardConfig, RunConfig, SFTConfig
from rlhf_dist.config.load import dump_yaml
from rlhf_dist.data.datasets import PreferenceDataset
from rlhf_dist.data.sampler import EpochSampler
from rlhf_dist.errors import RunFolderError
from rlhf_dist.models import score_moments
from rlhf_dist.tracking.console import print_table
from rlhf_dist.tracking.run_folder import BAD_ROWS, RunFolder, write_atomically
from rlhf_dist.trainers import ppo as ppo_trainer
from rlhf_dist.trainers.checkpoint import Checkpoints, step_of
from rlhf_dist.trainers.evaluate import evaluate_all, score_pairs
from rlhf_dist.trainers.run import Run
from rlhf_dist.trainers.supervised import PretrainingMix, RewardTask, SFTTask, SupervisedTrainer

Summary = dict[str, Any]


def open_session(config: HostedRun) -> Session:
    """A session of the run's hosting; connects to nothing yet."""
    if config.cluster == "inline":
        return InlineSession(config.device)
    from rlhf_dist.cluster.session import RaySession  # Ray takes a second to import: not for inline runs

    return RaySession(config.ray, config.device)


def check_run_folder(config: RunConfig | EvalConfig) -> None:
    """Refuse a run folder that may not be used; touches nothing."""
    RunFolder.check(config.run_dir, resume=config.resume == "auto", overwrite=config.overwrite)


@contextlib.contextmanager
def hosted(config: Any, prepared: Prepared, session: Session | None) -> Iterator[tuple[Run, dict[str, WorkerGroup]]]:
    """The run's folder and its hosted roles; on leaving, the roles are gone and what was started here is stopped.

    An earlier run's folder is touched only when the new run's placement is granted.
    """
    own = session or open_session(config)
    resumed_step = resumable_step(config, prepared)
    folder: RunFolder = RunFolder(config.run_dir)

    def open_folder() -> Path:
        nonlocal folder
        folder = RunFolder.open(config.run_dir, resume=config.resume == "auto", overwrite=config.overwrite)
        folder.write_config(dump_yaml(config))
        if prepared.bad_rows:
            write_atomically(folder.path / BAD_ROWS, "".join(prepared.bad_rows))
        return folder.logs_dir

    try:
        own.check(prepared.specs)
        print_table(str(config.run_dir), [(name, str(value)) for name, value in prepared.facts.items()])
        print_shares(prepared)
        with (
            own.place(prepared.specs, seed=config.seed, logs_dir=open_folder) as groups,
            Run.open(config, folder, resumed_step=resumed_step, stop_requested=stopping.requested) as run,
        ):
            yield run, groups
    finally:
        if session is None:
            own.close()


def resumable_step(config: Any, prepared: Prepared) -> int | None:
    """The step a resumed run continues from; None for a new run.

    Raises:
        RunFolderError: the checkpoint is another configuration's, or the run is finished and left no checkpoint.
    """
    if config.resume != "auto":
        return None
    found = checkpoints(config, prepared)
    latest = found.latest()
    if latest is not None:
        found.check(latest)
        return step_of(latest)
    if RunFolder(config.run_dir).summary_path.exists():
        raise RunFolderError(
            f"run_dir {config.run_dir} holds a finished run without checkpoints, so there is nothing to resume; pass "
            "--overwrite true (and --resume no) to run it again, or choose another run_dir"
        )
    return None


def checkpoints(config: RunConfig, prepared: Prepared) -> Checkpoints:
    """The run's checkpoints, which carry what a run must share with them: its configuration and the sizes of its data."""
    shared = identity(config, prepared.contents)
    shared |= {f"number of {name}": value for name, value in prepared.facts.items() if isinstance(value, int)}
    return Checkpoints(RunFolder(config.run_dir).checkpoints_dir, config.checkpoint.keep_last, shared)


def identity(config: RunConfig | EvalConfig, contents: Mapping[str, str]) -> dict[str, Any]:
    """What decides a run's result, flat, with dotted keys.

    `contents`: path in the configuration → what is there, which then stands in its place. Paths that are not in it count as
    they are written.
    """
    free = {"run_dir", "resume", "overwrite", "checkpoint", "tracking", "ray"}
    decides = _flat(json.loads(config.model_dump_json(exclude=free)))
    # What was wrong to stop a run must not stop its resuming.
    for key in ("ppo.self_checks", "reward.bag_of_words_baseline"):
        decides.pop(key, None)
    decides = {
        key: contents.get(value, value) if isinstance(value, str) and key.endswith("path") else value
        for key, value in decides.items()
    }
    return decides | {"rlhf_dist version": __version__}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists → dotted keys."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}


def run_sft(config: SFTConfig, session: Session | None = None, prepared: Prepared | None = None) -> Summary:
    """Supervised fine-tuning; returns the summary. `session`: host in this one (and leave it open) rather than an own.
    `prepared`: what `prepare_sft` gave for `config`, where that is done already."""
    check_run_folder(config)
    prepared = prepared or prepare_sft(config)
    with hosted(config, prepared, session) as (run, groups):
        model = LanguageModelRole.of(groups["model"], config.model)
        data = prepared.data
        task = SFTTask(model, data.train, data.eval, _pretraining_mix(config, data))
        return _supervised(config, config.sft, run, task, prepared)


def _pretraining_mix(config: SFTConfig, data: Any) -> PretrainingMix | None:
    if data.pretraining is None:
        return None
    sampler = EpochSampler(len(data.pretraining), config.seed, "pretraining text")
    settings = config.sft
    return PretrainingMix(
        data.pretraining, data.eval_pretraining, settings.pretraining_per_step, settings.pretraining_weight, sampler
    )


def run_reward(config: RewardConfig, session: Session | None = None, prepared: Prepared | None = None) -> Summary:
    """Reward modelling; returns the summary. The arguments as in `run_sft`."""
    check_run_folder(config)
    prepared = prepared or prepare_reward(config)
    with hosted(config, prepared, session) as (run, groups):
        model = PreferenceModelRole.of(groups["model"], config.model)
        near_ties = config.reward.near_ties
        below = near_ties.below if near_ties is not None else None
        task = RewardTask(model, prepared.data.train, prepared.data.eval, below)
        summary = _trainer(config, config.reward, run, task, prepared).run(resume=config.resume == "auto")

        def score(dataset: PreferenceDataset, indices: Tensor) -> Tensor:
            return model.score_pairs(dataset.batch(indices)).result()

        # The model first: hours of training must not hang on a report.
        moments = score_moments_of(prepared.data, score, config.seed)
        _save(config, run, model, {score_moments.FILE: moments.to_json()})
        if prepared.data.eval is not None:
            summary |= report_trained(config.run_dir, prepared.data.eval, score, prepared.baseline)
        return run.finish(summary)


def _supervised(config: Any, settings: Any, run: Run, task: Any, prepared: Prepared) -> Summary:
    summary = _trainer(config, settings, run, task, prepared).run(resume=config.resume == "auto")
    if prepared.shares:
        summary["shares"] = list(prepared.shares)
    _save(config, run, task.model)
    return run.finish(summary)


def _save(config: Any, run: Run, model: Any, files: Mapping[str, str] | None = None) -> None:
    run.save_model(model, files)
    if config.model.lora is not None:
        run.save_adapter(model)


def _trainer(config: Any, settings: Any, run: Run, task: Any, prepared: Prepared) -> SupervisedTrainer:
    return SupervisedTrainer(
        run,
        task,
        settings,
        total_steps=prepared.specs[0].kwargs["num_steps"],
        every_steps=config.checkpoint.every_steps,
        checkpoints=checkpoints(config, prepared),
        decode=prepared.decode,
        sampler=prepared.sampler,
    )


def run_ppo(config: PPOConfig, session: Session | None = None, prepared: Prepared | None = None) -> Summary:
    """PPO; returns the summary. The arguments as in `run_sft`."""
    check_run_folder(config)
    prepared = prepared or prepare_ppo(config)
    with hosted(config, prepared, session) as (run, groups):
        policy = PolicyRole.of(groups["policy"], config.policy)
        roles = ppo_trainer.PPORoles(
            policy=policy,
            reference=ReferenceRole.of(groups["reference"], config.reference_model),
            reward=RewardRole.of(groups["reward"], config.reward),
            value=ValueRole.of(groups["value"], config.value_model),
            rollout=RolloutRole(groups["rollout"], config.rollout.batch_size),
            weight_sync=GroupWeightSync(groups["policy"], groups["rollout"]),
        )
        trainer = ppo_trainer.PPOTrainer(
            run,
            roles,
            prepared.data,
            config.ppo,
            checkpoints(config, prepared),
            config.checkpoint.every_steps,
            max_response_tokens=config.rollout.max_response_tokens,
            precisions=_precisions(config),
        )
        summary = trainer.run(resume=config.resume == "auto")
        run.save_model(policy)
        if config.policy.lora is not None:
            run.save_adapter(policy)
        if config.ppo.ema_decay is not None:
            run.save_average(policy)
        return run.finish(summary)


def _precisions(config: PPOConfig) -> ppo_trainer.Precisions:
    policy, reference = config.policy, config.reference_model
    rollout = config.rollout.precision or policy.precision
    same = reference.model_path == policy.model_path
    return ppo_trainer.Precisions(
        rollout=_lower(policy.precision, rollout),
        same_start=_lower(policy.precision, reference.precision) if same else None,
    )


def _lower(*precisions: Precision) -> Precision:
    return next(name for name in ("bf16", "fp16", "fp32") if name in precisions)


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
                roles[name] = role.of(groups[name], model)
        if "rollout" in groups:
            roles["rollout"] = RolloutRole(groups["rollout"], config.rollout.batch_size)
        summary = evaluate_all(run, roles, prepared.data)
        if prepared.data["preferences"] and "reward" in roles:
            report = evaluation(
                prepared.data["preferences"], lambda data, rows: score_pairs(roles["reward"], data.batch(rows))
            )
            write_report(config.run_dir, "reward_model", report)
            show({"reward_model": report})
            summary["reward"] = headline(report)
        return run.finish(summary)


def validate(config: RunConfig | EvalConfig) -> dict[str, Any]:
    """Everything that can be checked without starting an actor; prints the shares of what is trained on, and returns the run's
    derived numbers.

    Raises:
        RlhfDistError: what a run of this configuration would be refused for.
    """
    check_run_folder(config)
    prepare: Any = {
        SFTConfig: prepare_sft,
        RewardConfig: prepare_reward,
        PPOConfig: prepare_ppo,
        EvalConfig: prepare_eval,
    }
    prepared = prepare[type(config)](config)
    print_shares(prepared)
    return prepared.facts


def print_shares(prepared: Prepared) -> None:
    """A table of what each set gives to an epoch, where there are several."""
    if prepared.shares:
        percent = {"rate", "share", "share_of_tokens"}
        rows = [[f"{v:.2%}" if k in percent else str(v) for k, v in row.items()] for row in prepared.shares]
        header = [name.replace("_", " ") for name in prepared.shares[0]]
        print_table("training records of an epoch, by source", rows, header=header)
