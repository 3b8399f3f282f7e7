"""From a configuration to a finished reward-model run: data and checks (`prepare`), then roles, trainer, saved model and
report (`run_reward`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.data.datasets import PreferenceDataset, Split
from rlhf_dist.data.loading import load_preferences
from rlhf_dist.data.tokenizer import add_pad_token, load_tokenizer
from rlhf_dist.distributed.group import Session, WorkerSpec
from rlhf_dist.evaluation.bag_of_words import BagOfWords
from rlhf_dist.evaluation.reward_report import report_trained, score_moments_of
from rlhf_dist.models import score_moments
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.reward.low_margin import LowMargin
from rlhf_dist.reward.roles import PreferenceModelRole
from rlhf_dist.reward.trainer import RewardTask
from rlhf_dist.reward.worker import PreferenceModelWorker
from rlhf_dist.run.checks import check_micro_batches, check_model, check_vocabulary
from rlhf_dist.run.launch import check_run_folder, checkpoints, hosted
from rlhf_dist.run.prepared import Prepared, bad_rows, decoder
from rlhf_dist.run.run_summary import describe_data, describe_trained
from rlhf_dist.run.supervised import Schedule, SupervisedTrainer


@dataclass(frozen=True, kw_only=True)
class PreparedReward(Prepared[Split[PreferenceDataset]]):
    """A reward-model run that passed every check."""

    schedule: Schedule
    tokenizer: Any
    low_margin: LowMargin | None
    baseline: BagOfWords | None
    """Fitted before anything is trained, since fitting may fail."""


def load_data(config: RewardConfig, tokenizer: Any, keep_records: bool = False) -> Split[PreferenceDataset]:
    """The preferences of a run, before low-margin pairs are dropped. `keep_records` and errors as in `load_preferences`."""
    by_margin = config.reward.low_margin is not None
    use_margins = config.reward.margin_coef > 0 or by_margin
    return load_preferences(config.data, tokenizer, config.seed, use_margins, by_margin, keep_records)


def prepare(config: RewardConfig) -> PreparedReward:
    """Checks and tokenized data of a reward-model run; starts nothing.

    Raises:
        RlhfDistError: what a run of this configuration would end with.
    """
    limit, settings = config.data.max_length_tokens, config.reward
    check_micro_batches(config.model, limit, "model", num_sequences=2)  # a pair is the smallest
    model_config = check_model(config.model.model_path, limit, "trained", scalar=True)
    tokenizer = load_tokenizer(config.model.model_path, config.data.template_path)
    check_vocabulary(config.model, model_config, tokenizer)
    add_pad_token(tokenizer)
    data = load_data(config, tokenizer)
    most = max(part.most_responses for part in (data.train, data.eval) if part is not None)
    check_micro_batches(config.model, limit, "model", num_sequences=most)
    num_with_margins = data.train.num_with_margins
    if settings.margin_coef > 0 and num_with_margins == 0:
        raise ConfigError(
            f"reward.margin_coef is {settings.margin_coef} but no record of data.train has a margin above 0; set it to 0, or "
            "give records a margin (pairs) or ratings (rankings)"
        )
    low_margin, low_margin_summary = None, {}
    if settings.low_margin is not None:
        low_margin = LowMargin(settings.low_margin.below, settings.low_margin.weight)
        data, low_margin_summary = low_margin.apply(data)
    schedule = Schedule.of(settings, "reward", data.train, config.model, config.seed, None)
    summary = {
        **describe_data(training_records=data.train, held_out_records=data.eval),
        **describe_trained(config.model, "model", scalar=True),
        **schedule.describe(settings, mixed=False),
        **({"training records with margins": num_with_margins} if settings.margin_coef > 0 else {}),
        **low_margin_summary,
    }
    worker = partial(
        PreferenceModelWorker,
        config.model,
        num_steps=schedule.num_steps,
        template_path=config.data.template_path,
        margin_coef=settings.margin_coef,
        centering_coef=settings.centering_coef,
        pair_weights=low_margin,
    )
    return PreparedReward(
        [WorkerSpec("model", config.model, worker)],
        data,
        summary,
        num_steps=schedule.num_steps,
        bad_rows=bad_rows(data.train, data.eval),
        schedule=schedule,
        tokenizer=tokenizer,
        low_margin=low_margin,
        baseline=_baseline(config, data, tokenizer, low_margin) if settings.bag_of_words_baseline else None,
    )


def _baseline(
    config: RewardConfig, data: Split[PreferenceDataset], tokenizer: Any, low_margin: LowMargin | None
) -> BagOfWords:
    if data.eval is None:
        raise ConfigError(
            "reward.bag_of_words_baseline is true but there are no held-out records to compare on; set data.eval, or "
            "data.eval_fraction above 0"
        )
    return BagOfWords(data.train, decoder(tokenizer), low_margin, config.seed)


def run_reward(
    config: RewardConfig, session: Session | None = None, prepared: PreparedReward | None = None
) -> dict[str, Any]:
    """Reward modeling.

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
        model = PreferenceModelRole.of(groups["model"], config.model)
        classes = prepared.low_margin.classes if prepared.low_margin is not None else None
        trainer = SupervisedTrainer(
            run,
            RewardTask(model, prepared.data.train, prepared.data.eval, classes),
            config.reward,
            prepared.schedule,
            checkpoints(config, prepared),
            decoder(prepared.tokenizer),
        )
        summary = trainer.run(resume=config.resume == "auto")

        def score(dataset: PreferenceDataset, indices: Tensor) -> Tensor:
            return model.score_pairs(dataset.batch(indices)).result()

        # The model first: hours of training must not hang on a report.
        moments = score_moments_of(prepared.data, score, config.seed)
        run.save(model, {score_moments.FILE: moments.to_json()})
        if prepared.data.eval is not None:
            summary |= report_trained(config.run_dir, prepared.data.eval, score, prepared.baseline)
        return run.finish(summary)
