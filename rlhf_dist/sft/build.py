"""From a configuration to a finished SFT run: data and checks (`prepare`), then roles, trainer and saved model (`run_sft`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.data.loading import SFTSets, load_sft, mixed_order, shares_of
from rlhf_dist.data.sampler import EpochSampler
from rlhf_dist.data.tokenizer import load_tokenizer
from rlhf_dist.distributed.group import Session, WorkerSpec
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.run.checks import check_micro_batches, check_model, check_vocabulary
from rlhf_dist.run.launch import check_run_folder, checkpoints, hosted
from rlhf_dist.run.prepared import Prepared, bad_rows, decoder
from rlhf_dist.run.run_summary import describe_data, describe_trained
from rlhf_dist.run.supervised import Schedule, SupervisedTrainer
from rlhf_dist.sft.config import SFTConfig, SFTSettings
from rlhf_dist.sft.roles import LanguageModelRole
from rlhf_dist.sft.trainer import PretrainingMix, SFTTask


@dataclass(frozen=True, kw_only=True)
class PreparedSFT(Prepared[SFTSets]):
    """An SFT run that passed every check."""

    schedule: Schedule
    tokenizer: Any


def prepare(config: SFTConfig) -> PreparedSFT:
    """Checks and tokenized data of an SFT run; starts nothing.

    Raises:
        RlhfDistError: what a run of this configuration would end with.
    """
    limit = config.data.max_length_tokens
    check_micro_batches(config.model, limit, "model")
    model_config = check_model(config.model.model_path, limit, "trained", scalar=False)
    tokenizer = load_tokenizer(config.model.model_path, config.data.template_path)
    check_vocabulary(config.model, model_config, tokenizer)
    data = load_sft(config.data, tokenizer, config.seed)
    order = mixed_order(config.data, data.train, config.seed)
    schedule = Schedule.of(config.sft, "sft", data.train, config.model, config.seed, order)
    summary = {
        **describe_data(training_records=data.train, held_out_records=data.eval),
        **describe_trained(config.model, "model", scalar=False),
        **schedule.describe(config.sft, mixed=order is not None),
    }
    if data.pretraining is not None:
        _check_pretraining(config.sft, len(data.pretraining))
        summary |= describe_data(
            pretraining_sequences=data.pretraining, held_out_pretraining_sequences=data.eval_pretraining
        )
        summary["pretraining sequences a step"] = config.sft.pretraining_per_step
        summary["weight of their mean loss"] = f"{config.sft.pretraining_weight:g}"
        epochs = schedule.num_steps * config.sft.pretraining_per_step / len(data.pretraining)
        summary["epochs of pretraining text"] = round(epochs, 3)
    worker = partial(
        LanguageModelWorker, config.model, num_steps=schedule.num_steps, template_path=config.data.template_path
    )
    return PreparedSFT(
        [WorkerSpec("model", config.model, worker)],
        data,
        summary,
        num_steps=schedule.num_steps,
        bad_rows=bad_rows(data.train, data.eval, data.pretraining, data.eval_pretraining),
        shares=shares_of(data.train, order) if config.data.mixing or len(data.train.groups) > 1 else (),
        schedule=schedule,
        tokenizer=tokenizer,
    )


def run_sft(config: SFTConfig, session: Session | None = None, prepared: PreparedSFT | None = None) -> dict[str, Any]:
    """Supervised fine-tuning.

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
        model = LanguageModelRole.of(groups["model"], config.model)
        data = prepared.data
        trainer = SupervisedTrainer(
            run,
            SFTTask(model, data.train, data.eval, _pretraining_mix(config, data)),
            config.sft,
            prepared.schedule,
            checkpoints(config, prepared),
            decoder(prepared.tokenizer),
        )
        summary = trainer.run(resume=config.resume == "auto")
        if prepared.shares:
            summary["shares"] = list(prepared.shares)
        run.save(model)
        return run.finish(summary)


def _pretraining_mix(config: SFTConfig, data: SFTSets) -> PretrainingMix | None:
    if data.pretraining is None:
        return None
    sampler = EpochSampler(len(data.pretraining), config.seed, "pretraining text")
    settings = config.sft
    return PretrainingMix(
        data.pretraining, data.eval_pretraining, settings.pretraining_per_step, settings.pretraining_weight, sampler
    )


def _check_pretraining(settings: SFTSettings, num_sequences: int) -> None:
    """A step must not hold a sequence of plain text twice."""
    if settings.pretraining_per_step > num_sequences:
        raise ConfigError(
            f"sft.pretraining_ratio {settings.pretraining_ratio:g} takes {settings.pretraining_per_step} sequences of text a "
            f"step, but data.pretraining has {num_sequences}; lower the ratio to at most "
            f"{num_sequences / settings.batch_size:g}, or add text"
        )
