"""Distributed RLHF: instruction tuning, reward modeling and PPO on Ray and DeepSpeed.

The public Python API is what `__all__` lists. Names are imported when they are first used, so that `import rlhf_dist` loads
neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rlhf_dist.core.batches import (
        Experience,
        PreferenceBatch,
        PromptBatch,
        RolloutBatch,
        SequenceBatch,
        TokenBatch,
    )
    from rlhf_dist.core.errors import (
        ConfigError,
        DataError,
        ModelError,
        PlacementError,
        Preempted,
        RlhfDistError,
        RunFolderError,
        TrainingError,
        WorkerError,
    )
    from rlhf_dist.core.roles import (
        LanguageModel,
        LanguageModelScorer,
        Policy,
        PreferenceModel,
        Reference,
        RewardScorer,
        RolloutEngine,
        Trained,
        ValueFunction,
        WeightSync,
    )
    from rlhf_dist.core.steps import UpdateReport
    from rlhf_dist.evaluation.build import run_eval
    from rlhf_dist.evaluation.config import EvalConfig
    from rlhf_dist.pipeline.arguments import load_config
    from rlhf_dist.ppo.build import run_ppo
    from rlhf_dist.ppo.config import PPOConfig
    from rlhf_dist.reward.build import run_reward
    from rlhf_dist.reward.config import RewardConfig
    from rlhf_dist.sft.build import run_sft
    from rlhf_dist.sft.config import SFTConfig

_MODULES = {
    "pipeline.arguments": ("load_config",),
    "sft.build": ("run_sft",),
    "sft.config": ("SFTConfig",),
    "reward.build": ("run_reward",),
    "reward.config": ("RewardConfig",),
    "ppo.build": ("run_ppo",),
    "ppo.config": ("PPOConfig",),
    "evaluation.build": ("run_eval",),
    "evaluation.config": ("EvalConfig",),
    "core.batches": ("Experience", "PreferenceBatch", "PromptBatch", "RolloutBatch", "SequenceBatch", "TokenBatch"),
    "core.steps": ("UpdateReport",),
    "core.roles": (
        "LanguageModel",
        "LanguageModelScorer",
        "Policy",
        "PreferenceModel",
        "Reference",
        "RewardScorer",
        "RolloutEngine",
        "Trained",
        "ValueFunction",
        "WeightSync",
    ),
    "core.errors": (
        "ConfigError",
        "DataError",
        "ModelError",
        "PlacementError",
        "Preempted",
        "RlhfDistError",
        "RunFolderError",
        "TrainingError",
        "WorkerError",
    ),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ConfigError",
    "DataError",
    "EvalConfig",
    "Experience",
    "LanguageModel",
    "LanguageModelScorer",
    "ModelError",
    "PPOConfig",
    "PlacementError",
    "Policy",
    "Preempted",
    "PreferenceBatch",
    "PreferenceModel",
    "PromptBatch",
    "Reference",
    "RewardConfig",
    "RewardScorer",
    "RlhfDistError",
    "RolloutBatch",
    "RolloutEngine",
    "RunFolderError",
    "SFTConfig",
    "SequenceBatch",
    "TokenBatch",
    "Trained",
    "TrainingError",
    "UpdateReport",
    "ValueFunction",
    "WeightSync",
    "WorkerError",
    "__version__",
    "load_config",
    "run_eval",
    "run_ppo",
    "run_reward",
    "run_sft",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
