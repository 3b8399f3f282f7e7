"""Configuration of `rlhf-dist pipeline`: what the stages of a whole job do, in one file."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator
from typing_extensions import Self

from rlhf_dist.config.base import AbsolutePath, Count, Schema
from rlhf_dist.config.data_set import DataSet
from rlhf_dist.config.hosting import (
    DEFAULT_MODEL,
    CheckpointConfig,
    FrozenModel,
    Hosting,
    OptionalPath,
    TrackingConfig,
    TrainedModel,
)
from rlhf_dist.config.interpolation import STAGES, with_defaults
from rlhf_dist.evaluation.config import EvalStage
from rlhf_dist.ppo.config import PPOStage
from rlhf_dist.reward.config import RewardStage
from rlhf_dist.sft.config import SFTStage


class DataStage(Schema):
    """Makes the sets of records that later stages refer to: checked, divided, and kept with a manifest."""

    seed: Count | None = None
    """Draws which records come into which part; null takes the pipeline's."""
    sets: tuple[DataSet, ...] = Field(min_length=1)
    """The sets, each under a name of its own."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> DataStage:
        names = [item.name for item in self.sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"sets has {', '.join(twice)} more than once; give each set a name of its own")
        return self


class StageSettings(Schema):
    """What a stage may set for itself; null takes the pipeline's."""

    seed: Count | None = None
    """Seed of the stage's random draws; null takes the pipeline's."""
    tracking: TrackingConfig | None = None
    """Laid over the pipeline's `tracking`."""


class TrainedStageSettings(StageSettings):
    """What a stage that trains may set for itself; null takes the pipeline's."""

    checkpoint: CheckpointConfig | None = None
    """Laid over the pipeline's `checkpoint`."""


OfEarlierStage = OptionalPath()
"""`${STAGE.model}`, a path or a hub name; absent, `with_defaults` fills in the model of an earlier stage."""


class PipelineSFT(SFTStage, TrainedStageSettings):
    """Supervised fine-tuning."""


class PipelineReward(RewardStage, TrainedStageSettings):
    """Reward modeling; starts from the SFT stage's model unless `model.model_path` is set."""

    model: Annotated[TrainedModel, OfEarlierStage] = DEFAULT_MODEL


class PipelinePPO(PPOStage, TrainedStageSettings):
    """PPO of the SFT stage's model against the reward stage's, unless their `model_path`s are set."""

    policy: Annotated[TrainedModel, OfEarlierStage] = DEFAULT_MODEL
    reward: Annotated[FrozenModel, OfEarlierStage] = DEFAULT_MODEL


class PipelineEval(EvalStage, StageSettings):
    """Measures the tuned policy and the reward model on held-out records."""

    policy: Annotated[FrozenModel, OfEarlierStage] | None = None
    reward: Annotated[FrozenModel, OfEarlierStage] | None = None
    reference: Annotated[FrozenModel, OfEarlierStage] | None = None


class PipelineConfig(Hosting):
    """The stages data, sft, reward, ppo and eval, in this order; each may be absent. A stage refers to what an earlier one
    made: `${sft.model}` in a model_path, `${data.SET}` or `${data.SET.PART}` in the path of a source. Where a model_path is
    absent, it is the model of the earlier stage."""

    run_dir: AbsolutePath
    """Folder of the pipeline, on storage that every node sees: a run folder for each stage, named by the stage and by the
    content of its configuration and inputs. A stage that is done is skipped, a half done one resumed; none is overwritten.
    `{seed}` in it becomes the seed."""
    seed: Count = 0
    """Seed of every random draw, where a stage does not set its own."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    data: DataStage | None = None
    sft: PipelineSFT | None = None
    reward: PipelineReward | None = None
    ppo: PipelinePPO | None = None
    eval: PipelineEval | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _with_interpolations(cls, given: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        """Interpolations are checked beside the schema, so that all problems are reported together."""
        if not isinstance(given, dict):
            return check(given)
        filled, problems = with_defaults(given)
        try:
            config = check(filled)
        except ValidationError as error:
            kept = ("type", "loc", "input", "ctx")
            explained = {p.location for p in problems}
            errors = [e for e in error.errors() if e["loc"] not in explained]
            found: list[Any] = [{key: value for key, value in e.items() if key in kept} for e in errors]
        else:
            if not problems:
                return config
            found = []
        found += [
            {"type": "value_error", "loc": p.location, "input": p.value, "ctx": {"error": ValueError(p.message)}}
            for p in problems
        ]
        raise ValidationError.from_exception_data(cls.__name__, found)

    @model_validator(mode="after")
    def _something_to_do(self) -> PipelineConfig:
        if not self.stages:
            raise ValueError(f"the pipeline has no stage; add one or more of the sections {', '.join(STAGES)}")
        return self

    @property
    def stages(self) -> dict[str, Any]:
        """Name → section of the stages that are there, in the order in which they run."""
        return {name: getattr(self, name) for name in STAGES if getattr(self, name) is not None}
