"""Configuration schemas. Nothing here imports torch."""

from rlhf_dist.config.data import (
    DataSettings,
    DataSource,
    PPOData,
    RecordKind,
    RewardData,
    SFTData,
    TrainingData,
    source_names,
)
from rlhf_dist.config.evaluate import EvalConfig, EvalData
from rlhf_dist.config.freeze import FreezeConfig, LoRAConfig
from rlhf_dist.config.hosting import (
    CheckpointConfig,
    FrozenModel,
    HostedRun,
    ModelHost,
    OptimizerConfig,
    Placement,
    PlacementStrategy,
    Precision,
    RayConfig,
    RunConfig,
    TrackingConfig,
    TrainedModel,
)
from rlhf_dist.config.pipeline import DataSet, DataStage, PipelineConfig
from rlhf_dist.config.ppo import PPOConfig, PPOSettings, RolloutConfig
from rlhf_dist.config.supervised import RewardConfig, RewardSettings, SFTConfig, SFTSettings, SupervisedSettings

__all__ = [
    "CheckpointConfig",
    "DataSet",
    "DataSettings",
    "DataSource",
    "DataStage",
    "EvalConfig",
    "EvalData",
    "FreezeConfig",
    "FrozenModel",
    "HostedRun",
    "LoRAConfig",
    "ModelHost",
    "OptimizerConfig",
    "PPOConfig",
    "PPOData",
    "PPOSettings",
    "PipelineConfig",
    "Placement",
    "PlacementStrategy",
    "Precision",
    "RayConfig",
    "RecordKind",
    "RewardConfig",
    "RewardData",
    "RewardSettings",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SFTData",
    "SFTSettings",
    "SupervisedSettings",
    "TrackingConfig",
    "TrainedModel",
    "TrainingData",
    "source_names",
]
